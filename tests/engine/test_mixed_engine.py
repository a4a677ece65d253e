"""Layers with codecs of their own, through the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm import SamplingParams

from kvserve.default_model import prepare_default_model
from tests.cases.engine_cases import (
    MIB,
    STORY,
    assert_preempted_with_same_texts,
    encode,
    engine,
    free_blocks,
    generate,
    prompt_logprobs,
    steps,
    tokens,
)

NUM_LAYERS = 30
MIXED = {"layers": {0: "dense", 1: "int8", 10: "kivi-4bit", -1: "dense"}}


@pytest.fixture(scope="module")
def model() -> Path:
    return prepare_default_model()


def every_layer(codec: str) -> dict:
    return {"layers": dict.fromkeys(range(NUM_LAYERS), codec)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "codec", "alone"), [("kivi-2bit", "dense", "none"), ("dense", "kivi-2bit", "kivi-2bit")]
)
def test_one_codec_named_for_every_layer_gives_the_texts_of_its_policy(
    base: str, codec: str, alone: str, model: Path
) -> None:
    texts, logprobs = [], []
    sinks = {"sink_tokens": 0}
    for policy, changes in ((base, every_layer(codec) | sinks), (alone, sinks)):
        with engine(model, policy, changes, kv_cache_memory_bytes=256 * MIB) as llm:
            prompts = [encode(llm, f"{name} told this story. " + STORY * 4 + "Then") for name in ("Anna", "Bo", "Chen")]
            outputs = generate(llm, prompts, max_tokens=40)
            texts.append([tokens(output) for output in outputs])
            logprobs.append([prompt_logprobs(output) for output in outputs])
    assert texts[0] == texts[1]
    for found, expected in zip(*logprobs, strict=True):
        assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_layers_of_one_codec_evict_as_its_policy_does(model: Path) -> None:
    """Every layer of 2-bit snapkv in 8 bits: the tokens that stay, their texts, and the blocks given back."""
    outcomes = []
    for changes in ({"codec": "kivi-2bit", "sink_tokens": 0} | every_layer("int8"), {"sink_tokens": 0}):
        with engine(model, "snapkv", changes, kv_cache_memory_bytes=256 * MIB) as llm:
            before = free_blocks(llm)
            outputs = generate(llm, [encode(llm, STORY * 8 + "In the morning")], max_tokens=40)
            outcomes.append(([tokens(output) for output in outputs], outputs[0].kv_transfer_params["kvserve"]))
            assert free_blocks(llm) == before
    (found, report), (expected, alone) = outcomes
    assert found == expected
    for name in ("tokens_cached", "tokens_kept", "rate_effective", "bytes_held"):
        assert report[name] == alone[name]
    assert report["rate_effective"] > 2


@pytest.mark.slow
def test_layers_that_differ_give_back_what_they_evict(model: Path) -> None:
    changes = {"codec": "kivi-2bit", "layers": {0: "int8", -1: "boost-2bit"}}
    with engine(model, "snapkv", changes, kv_cache_memory_bytes=256 * MIB) as llm:
        prompts = [encode(llm, f"{name} told this story. " + STORY * 8 + "Then") for name in ("Anna", "Bo")]
        alone = [tokens(generate(llm, [prompt], max_tokens=40)[0]) for prompt in prompts]
        outputs = generate(llm, prompts, max_tokens=40)
    assert [tokens(output) for output in outputs] == alone
    for output in outputs:
        report = output.kv_transfer_params["kvserve"]
        assert report["tokens_kept"] < 0.5 * report["tokens_cached"]


def test_a_prefix_hit_gives_the_text_of_a_miss(model: Path) -> None:
    with engine(model, "kivi-2bit", MIXED, kv_cache_memory_bytes=256 * MIB) as llm:
        prompt = encode(llm, STORY * 6 + "In the morning")
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, logprobs=0, max_tokens=40)
        miss, hit = (llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0] for _ in range(2))
        assert (miss.num_cached_tokens, hit.num_cached_tokens) == (0, (len(prompt) - 1) // 64 * 64)
        assert tokens(hit) == tokens(miss)


@pytest.mark.slow
def test_preempted_requests_go_on_as_if_nothing_had_happened(model: Path) -> None:
    names = ["Anna", "Boris", "Chen", "Dalia", "Emeka", "Farah"]
    with engine(model, "kivi-4bit", MIXED, kv_cache_memory_bytes=256 * MIB) as llm:
        prompts = [encode(llm, f"{name} told this story. " + STORY * 5 + f"And {name} said:") for name in names]
        expected = [steps(output) for output in generate(llm, prompts, max_tokens=150, logprobs=2)]
        (manager,) = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.coordinator.single_type_managers
        layout = manager.layout
    num_blocks = 2 * layout.blocks_for(len(prompts[0])) + 3  # two prompts, not their answers
    block_bytes = NUM_LAYERS * 3 * layout.cell_bytes
    with engine(model, "kivi-4bit", MIXED, kv_cache_memory_bytes=num_blocks * block_bytes, max_model_len=700) as llm:
        assert_preempted_with_same_texts(llm, prompts, expected, num_blocks)
