"""What vLLM does with a cache, on compressed pages: chunks, prefix hits, preemption, recompute, aborts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from engine_cases import MIB, engine, generate, prompt_logprobs, tokens
from vllm import LLM, SamplingParams

from kvserve.default_model import prepare_default_model
from kvserve.engine.report import EngineReport
from kvserve.engine.settings import EngineSettings

STORY = (
    "The harbour master counted the boats twice that evening, for the storm had come in early and three of them "
    "were still out beyond the point. He wrote their names in the ledger: the Margaret, the Blue Heron and the old "
    "Constance, whose skipper never listened to warnings. Then he lit the second lamp and waited. "
)


@pytest.fixture(scope="module")
def model() -> Path:
    return prepare_default_model()


@pytest.fixture(scope="module", params=["kivi-2bit", "boost-2bit", "none"])
def roomy(request: pytest.FixtureRequest, model: Path) -> Iterator[LLM]:
    with engine(model, request.param, kv_cache_memory_bytes=256 * MIB, max_model_len=2048) as llm:
        yield llm


def encode(llm: LLM, text: str) -> list[int]:
    return llm.get_tokenizer().encode(text)


def distinct_prompts(llm: LLM, count: int) -> list[list[int]]:
    names = ["Anna", "Boris", "Chen", "Dalia", "Emeka", "Farah", "Goran", "Hana"]
    return [encode(llm, f"{name} told this story. " + STORY * 4 + f"And {name} said:") for name in names[:count]]


def test_a_prefix_hit_gives_the_text_of_a_miss(roomy: LLM) -> None:
    prompt = encode(roomy, STORY * 6 + "In the morning")
    roomy.reset_prefix_cache()
    params = {"max_tokens": 40}
    # Prompt logprobs make vLLM recompute the prompt, so these requests go without.
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, logprobs=0, **params)
    miss, hit = (roomy.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0] for _ in range(2))
    assert miss.num_cached_tokens == 0
    assert hit.num_cached_tokens == (len(prompt) - 1) // 64 * 64
    assert tokens(hit) == tokens(miss)
    assert hit.outputs[0].cumulative_logprob == pytest.approx(miss.outputs[0].cumulative_logprob, abs=1e-2)


def test_a_prompt_in_many_chunks_scores_like_one_in_few(roomy: LLM, model: Path) -> None:
    policy = roomy.llm_engine.vllm_config.additional_config["kvserve"]["policy"]
    prompt = encode(roomy, STORY * 8)
    many_chunks = prompt_logprobs(generate(roomy, [prompt])[0])
    with engine(model, policy, max_num_batched_tokens=1024) as llm:
        one_chunk = prompt_logprobs(generate(llm, [prompt])[0])
    assert many_chunks == pytest.approx(one_chunk, abs=0.02)


@pytest.mark.parametrize("policy", ["kivi-2bit", "boost-2bit"])
def test_preemption_under_a_tiny_budget_gives_the_same_text(policy: str, model: Path) -> None:
    with engine(model, policy, kv_cache_memory_bytes=256 * MIB) as llm:
        prompts = distinct_prompts(llm, 6)
        expected = [tokens(output) for output in generate(llm, prompts, max_tokens=150)]
        settings = EngineSettings.from_vllm_config(llm.llm_engine.vllm_config)
        assert settings is not None
        report = EngineReport.from_vllm_config(llm.llm_engine.vllm_config, settings)
    # Room for the six prompts and a little of what they generate.
    num_blocks = 6 * report.layout.blocks_for(len(prompts[0])) + 4
    with engine(model, policy, kv_cache_memory_bytes=num_blocks * report.block_bytes) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        with patch.object(scheduler, "_preempt_request", wraps=scheduler._preempt_request) as preempt:
            outputs = generate(llm, prompts, max_tokens=150)
        assert preempt.call_count > 0
        assert [tokens(output) for output in outputs] == expected
        assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == num_blocks - 1


def test_an_aborted_request_gives_its_blocks_back(roomy: LLM) -> None:
    core = roomy.llm_engine
    pool = core.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    free_before = pool.get_num_free_blocks()
    prompt = {"prompt_token_ids": encode(roomy, STORY * 3)}
    core.add_request("to-abort", prompt, SamplingParams(max_tokens=500, ignore_eos=True))
    for _ in range(6):
        core.step()
    assert pool.get_num_free_blocks() < free_before
    core.abort_request(["to-abort"])
    core.step()
    assert pool.get_num_free_blocks() == free_before


def test_samples_of_one_prompt_share_its_pages_and_differ(roomy: LLM) -> None:
    prompt = {"prompt_token_ids": encode(roomy, STORY * 4 + "Then")}
    sampling = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=30, ignore_eos=True)
    (output,) = roomy.generate([prompt], sampling, use_tqdm=False)
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 3


def test_the_capacity_vllm_reports_is_the_capacity_of_the_layout(roomy: LLM) -> None:
    config = roomy.llm_engine.vllm_config
    settings = EngineSettings.from_vllm_config(config)
    assert settings is not None
    report = EngineReport.from_vllm_config(config, settings)
    core = roomy.llm_engine.engine_core.engine_core
    assert core.vllm_config.cache_config.kv_cache_size_tokens == report.effective_capacity_tokens
    assert report.pool_bytes <= 256 * MIB < report.pool_bytes + 2 * report.block_bytes
