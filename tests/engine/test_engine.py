"""What vLLM does with a cache, on compressed pages: prefix hits, sharing, aborts, capacity."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm import LLM, SamplingParams

from kvserve.default_model import prepare_default_model
from kvserve.engine.report import EngineReport
from kvserve.engine.settings import EngineSettings
from tests.cases.engine_cases import MIB, STORY, encode, engine, tokens


@pytest.fixture(scope="module")
def model() -> Path:
    return prepare_default_model()


@pytest.fixture(scope="module", params=["kivi-2bit", "boost-2bit", "none"])
def roomy(request: pytest.FixtureRequest, model: Path) -> Iterator[LLM]:
    with engine(model, request.param, kv_cache_memory_bytes=256 * MIB, max_model_len=2048) as llm:
        yield llm


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
