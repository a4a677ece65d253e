"""Chunks and preemption must not change what a request sees: both runs of a pair use engines of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvserve.default_model import prepare_default_model
from kvserve.engine.report import EngineReport
from kvserve.engine.settings import EngineSettings
from tests.cases.engine_cases import (
    MIB,
    STORY,
    assert_preempted_with_same_texts,
    encode,
    engine,
    generate,
    prompt_logprobs,
    steps,
)

NAMES = ["Anna", "Boris", "Chen", "Dalia", "Emeka", "Farah"]


@pytest.fixture(scope="module")
def model() -> Path:
    return prepare_default_model()


@pytest.mark.parametrize(
    "policy", ["kivi-2bit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("boost-2bit", "none"))]
)
def test_a_prompt_in_many_chunks_scores_like_one_in_few(policy: str, model: Path) -> None:
    with engine(model, policy, max_num_batched_tokens=100) as llm:
        prompt = encode(llm, STORY * 8)
        many_chunks = prompt_logprobs(generate(llm, [prompt])[0])
    with engine(model, policy, max_num_batched_tokens=1024) as llm:
        one_chunk = prompt_logprobs(generate(llm, [prompt])[0])
    assert many_chunks == pytest.approx(one_chunk, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["kivi-2bit", "boost-2bit"])
def test_preemption_under_a_tiny_budget_gives_the_same_text(policy: str, model: Path) -> None:
    with engine(model, policy, kv_cache_memory_bytes=256 * MIB) as llm:
        prompts = [encode(llm, f"{name} told this story. " + STORY * 3 + f"And {name} said:") for name in NAMES]
        expected = [steps(output) for output in generate(llm, prompts, max_tokens=150, logprobs=2)]
        settings = EngineSettings.from_vllm_config(llm.llm_engine.vllm_config)
        assert settings is not None
        report = EngineReport.from_vllm_config(llm.llm_engine.vllm_config, settings)
    # Room for the six prompts and a little of what they generate.
    num_blocks = 6 * report.layout.blocks_for(len(prompts[0])) + 4
    with engine(model, policy, kv_cache_memory_bytes=num_blocks * report.block_bytes) as llm:
        assert_preempted_with_same_texts(llm, prompts, expected, num_blocks)
