"""Model families through the real engine: tiny random models, chunked prefill on, compared with stock vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from tests.cases.engine_cases import engine, generate, prompt_logprobs, random_prompts, tokens
from tests.cases.tiny_models import COMMON, FAMILIES, make_tiny_model

# Lengths around the tile of 64 tokens and past the windows of 96; longer ones are prefilled in chunks of 128.
LENGTHS = [5, 63, 64, 65, 200, 333]
FAST = ("gemma3-mixed", "llama-gqa-64")  # windows among full layers, and none
SKIP_TOKENIZER = {"skip_tokenizer_init": True}


@pytest.mark.parametrize(
    "family", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in sorted(FAMILIES)]
)
def test_family_is_served_dense_and_compressed(family: str, tmp_path: Path) -> None:
    model = make_tiny_model(family, tmp_path)
    prompts = random_prompts(LENGTHS)
    outputs = {}
    for policy in (None, "none", "int8", "boost-2bit"):
        with engine(model, policy, **SKIP_TOKENIZER) as llm:
            outputs[policy] = generate(llm, prompts)
    for stock, none, int8, boost in zip(*outputs.values(), strict=True):
        assert tokens(none) == tokens(stock)
        assert prompt_logprobs(none) == pytest.approx(prompt_logprobs(stock), abs=2e-4)
        # Before the first tile is full nothing is compressed but the tail's 16-bit rounding.
        assert prompt_logprobs(boost)[:63] == pytest.approx(prompt_logprobs(stock)[:63], abs=0.05)
        difference = [abs(a - b) for a, b in zip(prompt_logprobs(int8), prompt_logprobs(stock), strict=True)]
        assert sum(difference) / len(difference) < 0.03


@pytest.mark.slow
def test_compression_changes_the_distribution_only_behind_the_first_tile(tmp_path: Path) -> None:
    model = make_tiny_model("llama-gqa-64", tmp_path)
    (prompt,) = random_prompts([400])
    logprobs = {}
    for policy in (None, "int8", "kivi-4bit", "kivi-2bit"):
        with engine(model, policy, **SKIP_TOKENIZER) as llm:
            logprobs[policy] = prompt_logprobs(generate(llm, [prompt])[0])
    distance = {
        policy: sum(abs(a - b) for a, b in zip(logprobs[policy][64:], logprobs[None][64:], strict=True))
        for policy in ("int8", "kivi-4bit", "kivi-2bit")
    }
    assert 0 < distance["int8"] < distance["kivi-4bit"] < distance["kivi-2bit"]


def test_a_window_that_no_request_exceeds_is_none_and_its_prompts_are_evicted(tmp_path: Path) -> None:
    model = make_tiny_model("mistral-window", tmp_path)
    config = json.loads((model / "config.json").read_text())
    prompts, outputs = random_prompts([333, 200]), {}
    for window in (512, None):
        (model / "config.json").write_text(json.dumps(config | {"sliding_window": window}))
        with engine(model, "snapkv", {"eviction.rate": 4}, max_model_len=512, **SKIP_TOKENIZER) as llm:
            outputs[window] = generate(llm, prompts)
    for windowed, plain in zip(outputs[512], outputs[None], strict=True):
        assert windowed.kv_transfer_params["kvserve"] == plain.kv_transfer_params["kvserve"]
        assert windowed.kv_transfer_params["kvserve"]["rate_effective"] > 1.5
        assert tokens(windowed) == tokens(plain)


def test_models_run_by_transformers_have_a_rotary_embedding_too(tmp_path: Path) -> None:
    config = GPTNeoXConfig(
        **{**COMMON, "hidden_size": 256, "tie_word_embeddings": False}, num_attention_heads=4,
        rope_parameters={"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024,
                         "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    with engine(tmp_path, "expected-attention", {"eviction.rate": 4}, **SKIP_TOKENIZER) as llm:
        (output,) = generate(llm, random_prompts([333]))
    assert output.kv_transfer_params["kvserve"]["rate_effective"] > 1.5
