"""Models that cap their attention logits (Gemma 2) or have learned sinks (gpt-oss): tiny ones, through the real engine.

What they should answer comes from transformers' eager attention.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, PretrainedConfig

from kvserve.engine.self_test import EXTENSION_PATH
from tests.cases.attention_cases import random_sinks
from tests.cases.engine_cases import engine, generate, prompt_logprobs, random_prompts, tokens
from tests.cases.tiny_models import COMMON

LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 96}
YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": False, "original_max_position_embeddings": 4096}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "gemma2": Gemma2Config(
        **COMMON, **LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=64, query_pre_attn_scalar=16,
        attn_logit_softcapping=1.5, final_logit_softcapping=30.0,
    ),
    "gpt-oss": GptOssConfig(
        **{**COMMON, "tie_word_embeddings": False, "max_position_embeddings": 131072}, **LAYERS, num_attention_heads=6,
        num_key_value_heads=2, head_dim=64, num_local_experts=4, num_experts_per_tok=2, rope_parameters=YARN,
    ),
}  # fmt: skip
LENGTHS = [5, 64, 200, 333]
OPTIONS: dict[str, Any] = {"skip_tokenizer_init": True}


class Served(NamedTuple):
    """A model's folder, and the log-probabilities of some prompts' tokens from the second on."""

    folder: Path
    prompts: list[list[int]]
    expected: list[list[float]]


def transformers_logprobs(folder: Path, prompts: list[list[int]], **changes: Any) -> list[list[float]]:
    """By transformers' eager attention, after changes to the model's attributes, by their dotted names."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    for layer in model.model.layers:
        for name, value in changes.items():
            getattr(layer.self_attn, name).fill_(value) if name == "sinks" else setattr(layer.self_attn, name, value)
    found = []
    for prompt in prompts:
        logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        found.append(logprobs[torch.arange(len(prompt) - 1), prompt[1:]].tolist())
    return found


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder, prompts = tmp_path_factory.mktemp(request.param), random_prompts(LENGTHS)
    torch.manual_seed(0)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.float32)
        for layer in model.model.layers:
            if hasattr(layer.self_attn, "sinks"):
                layer.self_attn.sinks.copy_(random_sinks(6))
        model.save_pretrained(folder)
        expected = transformers_logprobs(folder, prompts)
        without = {"gemma2": {"attn_logit_softcapping": None}, "gpt-oss": {"sinks": -1e9}}[request.param]
        ignored = transformers_logprobs(folder, prompts, **without)
    assert distance(ignored[-1], expected[-1]) > 0.1, "caps and sinks are no small matter in this model"
    return Served(folder, prompts, expected)


def distance(found: list[float], expected: list[float]) -> float:
    """The largest difference."""
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("policy", ["none", pytest.param(None, marks=pytest.mark.slow)])
def test_a_dense_cache_answers_as_transformers_does(served: Served, policy: str | None) -> None:
    with engine(served.folder, policy, **OPTIONS) as llm:
        outputs = generate(llm, served.prompts)
    for output, expected in zip(outputs, served.expected, strict=True):
        assert distance(prompt_logprobs(output), expected) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["int8", "kivi-2bit"])
def test_codecs_lose_what_their_bits_cost_and_nothing_else(served: Served, policy: str) -> None:
    with engine(served.folder, policy, worker_extension_cls=EXTENSION_PATH, **OPTIONS) as llm:
        outputs = generate(llm, served.prompts)
        llm.collective_rpc("kvserve_probe_start")
        (again,) = generate(llm, random_prompts([200], seed=1), max_tokens=70)
        (report,) = llm.collective_rpc("kvserve_probe_finish")
    assert len(report["layers"]) == 2 and not report["problems"] and len(tokens(again)) == 70
    assert max(max(layer["kernel_heads"]) for layer in report["layers"]) < 2e-3
    for output, expected in zip(outputs, served.expected, strict=True):
        differences = [abs(a - b) for a, b in zip(prompt_logprobs(output), expected, strict=True)]
        assert max(differences[:63]) < 0.05, "nothing but the tail's rounding before a tile is full"
        assert policy != "int8" or sum(differences) / len(differences) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "window"), [("snapkv", 512), ("h2o", 512), ("snapkv", 96)])
def test_evicting_policies_cut_and_pass_the_probe(served: Served, policy: str, window: int, tmp_path: Path) -> None:
    """Windows that no request exceeds are none; others keep their layers dense."""
    for file in served.folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((served.folder / "config.json").read_text()) | {"sliding_window": window}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = {"max_model_len": 512, "worker_extension_cls": EXTENSION_PATH, **OPTIONS}
    with engine(tmp_path, policy, {"eviction.rate": 4}, **options) as llm:
        llm.collective_rpc("kvserve_probe_start")
        (output,) = generate(llm, random_prompts([333]), max_tokens=20)
        (report,) = llm.collective_rpc("kvserve_probe_finish")
    assert output.kv_transfer_params["kvserve"]["rate_effective"] > 1.5
    assert not report["problems"] and max(max(layer["kernel_heads"]) for layer in report["layers"]) < 2e-3
