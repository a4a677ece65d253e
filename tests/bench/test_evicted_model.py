"""Going on from an evicted prompt, against transformers with a cache cut by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.evicted_model import EvictedModel, Prompt
from benchmarks.eviction_prompts import Continued, PromptSet, Question
from benchmarks.eviction_quality import Measurement, kept_counts
from kvserve.policies.loading import load_policy
from tests.cases.tiny_models import make_tiny_model

PROMPT_TOKENS, HEAD_DIM = 300, 64
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama-gqa-64", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> EvictedModel:
    return EvictedModel(str(folder))


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return torch.randint(0, 512, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module")
def prompt(model: EvictedModel, tokens: list[int]) -> Prompt:
    return model.prefill(tokens)


def cut_by_hand(folder: Path, tokens: list[int], kept: torch.Tensor, continuation: list[int]) -> torch.Tensor:
    """Logits [t, vocabulary] for each token of the continuation; all heads of a layer keep the same number."""
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cache, rows = DynamicCache(), []
    with torch.inference_mode():
        rows.append(reference(torch.tensor([tokens]), past_key_values=cache).logits[0, -1])
        for layer, heads in zip(cache.layers, kept, strict=True):
            index = torch.stack([head.nonzero()[:, 0] for head in heads])[None, :, :, None].expand(-1, -1, -1, HEAD_DIM)
            layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)
        for offset, token in enumerate(continuation[:-1]):
            position = torch.tensor([[len(tokens) + offset]])
            step = reference(torch.tensor([[token]]), past_key_values=cache, position_ids=position, use_cache=True)
            rows.append(step.logits[0, -1])
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["knorm@2", "pyramidkv@4"])
def test_text_and_likelihood_are_those_of_a_cache_cut_by_hand(
    name: str, folder: Path, model: EvictedModel, tokens: list[int], prompt: Prompt
) -> None:
    kept = model.kept_tokens(prompt, load_policy(name))
    whole = torch.ones_like(kept)
    text, dense_text = model.generate(prompt, torch.stack([kept, whole]), NEW_TOKENS, set())
    nats, dense_nats = model.log_likelihoods(prompt, torch.stack([kept, whole]), text)
    for mask, output, sum_of_nats, expected_text in ((kept, text, nats, text), (whole, text, dense_nats, None)):
        logits = cut_by_hand(folder, tokens, mask, output)
        expected = float(logits.log_softmax(-1).gather(1, torch.tensor(output)[:, None]).sum())
        assert sum_of_nats == pytest.approx(expected, abs=1e-3)
        assert expected_text is None or logits.argmax(-1).tolist() == expected_text
    assert cut_by_hand(folder, tokens, whole, dense_text).argmax(-1).tolist() == dense_text
    assert nats != pytest.approx(dense_nats, abs=1e-2)


@pytest.mark.parametrize("name", ["snapkv", "kv-compress", "ada-snapkv", "pyramidkv", "random"])
@pytest.mark.parametrize(("rate", "expected"), [("1", 300), ("2", 172), ("4", 108)])
def test_policies_keep_what_the_block_manager_counts(
    name: str, rate: str, expected: int, model: EvictedModel, prompt: Prompt
) -> None:
    kept = model.kept_tokens(prompt, load_policy(f"{name}@{rate}"))
    assert int(kept.sum()) == expected * kept[..., 0].numel()
    assert bool(kept[..., 256:].all())
    prompts = PromptSet(0, [0], [Question([1] * PROMPT_TOKENS, "1")], [Continued([1] * 70, [2])])
    assert kept_counts(prompts, [rate], HEAD_DIM) == {"questions": {rate: [expected]}, "texts": {rate: [70]}}


def test_an_answer_ends_with_its_end_token(model: EvictedModel, prompt: Prompt) -> None:
    kept = torch.ones(1, len(prompt.layers), 2, PROMPT_TOKENS, dtype=torch.bool)
    (free,) = model.generate(prompt, kept, NEW_TOKENS, set())
    (ended,) = model.generate(prompt, kept, NEW_TOKENS, {free[2]})
    assert ended == free[: free.index(free[2]) + 1]


def test_prompts_survive_a_file() -> None:
    prompts = PromptSet(3, [7], [Question([1, 2], "1234567")], [Continued([3], [4, 5])])
    assert PromptSet.from_json(prompts.to_json()) == prompts


def test_a_stopped_measurement_goes_on_where_it_ended_and_only_on_the_same_prompts(
    model: EvictedModel, tokens: list[int], tmp_path: Path
) -> None:
    prompts = PromptSet(0, [0], [Question(tokens, "1")], [Continued(tokens, [3, 4]), Continued(tokens[:280], [5, 6])])
    content: dict[str, Any] = {"prompts_sha256": prompts.digests(), "policies": {}, "rates": ["2"], "model": {}}

    def measurement() -> Measurement:
        return Measurement(model, [("knorm", "2", load_policy("knorm@2"))], str)

    at_once = measurement()
    for index in range(2):
        at_once.read(prompts, index)
    stopped, out = measurement(), tmp_path / "out.json"
    stopped.resume(content, out)
    stopped.read(prompts, 0)
    tables = {"answers": {}, "kept_tokens": {}, "log_likelihoods_nats": stopped.log_likelihoods}
    out.write_text(json.dumps({**content, **tables}), encoding="utf-8")
    resumed = measurement()
    resumed.resume(content, out)
    resumed.read(prompts, 1)
    assert resumed.log_likelihoods == at_once.log_likelihoods
    assert len(resumed.log_likelihoods["knorm"]["2"]) == 2
    other = PromptSet(0, [0], [Question(tokens, "1")], [Continued(tokens, [3, 5])]).digests()
    with pytest.raises(ValueError, match="another prompts_sha256: remove it or choose another --out"):
        measurement().resume({**content, "prompts_sha256": other}, out)
