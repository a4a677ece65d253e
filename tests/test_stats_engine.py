"""Metrics and per-request reports of a real engine whose prompts are evicted, against arithmetic on the prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from engine_cases import engine, random_prompts
from prometheus_client import REGISTRY
from tiny_models import make_tiny_model
from vllm import LLM, SamplingParams
from vllm.v1.metrics.loggers import PerEngineStatLoggerAdapter

from kvserve.engine.eviction_manager import EvictingPageManager
from kvserve.engine.metrics import KvserveStatLogger

LAYERS, KV_HEADS, RATE = 2, 2, 4


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """All heads compete, so they keep different numbers of tokens; no sinks, so pages are full."""
    model = make_tiny_model("llama-gqa-64", tmp_path_factory.mktemp("model"))
    with engine(model, "kv-compress", skip_tokenizer_init=True, disable_log_stats=False) as llm:
        # The API server finds it as a plugin; `LLM` does not look for those.
        loggers = PerEngineStatLoggerAdapter(llm.llm_engine.vllm_config, [0], KvserveStatLogger)
        loggers.log_engine_initialized()
        llm.llm_engine.logger_manager.stat_loggers.append(loggers)
        yield llm


def manager_of(llm: LLM) -> EvictingPageManager:
    (manager,) = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.coordinator.single_type_managers
    return manager


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"kvserve:{name}", labels) or 0.0


def evicted_tokens() -> float:
    return sample("kv_tokens_evicted_total", policy="kv-compress")


def expected_evicted(prompt_len: int) -> int:
    """Tokens that a KV head loses on average: of the whole tiles, what does not fit beside the unfinished one."""
    end = prompt_len // 64 * 64
    kept_blocks = max(-(-(-(-prompt_len // RATE) - (prompt_len - end)) // 64), 1)
    return end - kept_blocks * 64


def run(llm: LLM, prompts: list[list[int]], **params: Any) -> list[dict[str, Any]]:
    """The reports of finished requests."""
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, **params)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    reports = []
    for output in outputs:
        assert output.kv_transfer_params is not None
        reports.append(output.kv_transfer_params["kvserve"])
    return reports


@pytest.mark.parametrize("max_tokens", [1, 30])
def test_every_request_is_counted_once_and_reported(llm: LLM, max_tokens: int) -> None:
    lengths = [700, 300, 450, 40]
    before, heads_before = evicted_tokens(), sample("kept_tokens_count", layer="1")
    reports = run(llm, random_prompts(lengths, seed=max_tokens), max_tokens=max_tokens)
    evicted = [expected_evicted(length) for length in lengths[:3]] + [0]
    assert evicted_tokens() - before == sum(evicted)
    assert sample("kept_tokens_count", layer="1") - heads_before == 3 * KV_HEADS
    layout = manager_of(llm).layout
    for length, gone, report in zip(lengths, evicted, reports, strict=True):
        cached = length + max_tokens - 1
        blocks = layout.blocks_for(cached) - gone // 64
        assert report == {
            "tokens_cached": cached,
            "tokens_kept": cached - gone,
            "bytes_held": blocks * LAYERS * KV_HEADS * layout.cell_bytes,
            "rate_requested": 4.0,
            "rate_effective": pytest.approx(length / (length - gone), abs=1e-3),
        }


def test_a_request_reports_its_own_limit(llm: LLM) -> None:
    (prompt,) = random_prompts([500], seed=11)
    (report,) = run(llm, [prompt], max_tokens=2, extra_args={"kvserve_max_tokens": 128})
    assert report["max_tokens_requested"] == 128 and report["tokens_kept"] < 200
    (report,) = run(llm, [prompt], max_tokens=2, extra_args={"kvserve_off": 1})
    assert (report["rate_requested"], report["rate_effective"], report["tokens_kept"]) == (1.0, 1.0, 501)


def test_several_answers_to_one_prompt_are_evicted_each_and_reported_by_the_last(llm: LLM) -> None:
    (prompt,) = random_prompts([333], seed=12)
    before = evicted_tokens()
    sampling = SamplingParams(n=3, temperature=1.0, max_tokens=5, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    assert len(output.outputs) == 3
    assert output.kv_transfer_params["kvserve"]["tokens_cached"] == 337
    assert evicted_tokens() - before == 3 * expected_evicted(333)


def test_gauges_follow_what_running_requests_hold_and_an_aborted_one_leaves_nothing(llm: LLM) -> None:
    llm.reset_prefix_cache()
    core, manager = llm.llm_engine, manager_of(llm)
    pool = core.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    (prompt,) = random_prompts([600], seed=13)
    sampling = SamplingParams(max_tokens=300, ignore_eos=True, detokenize=False)
    core.add_request("running", {"prompt_token_ids": prompt}, sampling)
    generated = 0
    while generated < 5:
        generated = sum(len(output.outputs[0].token_ids) for output in core.step())
    layout, per_block = manager.layout, LAYERS * KV_HEADS
    (row,), (((_, kept),),) = manager.req_to_blocks.values(), manager.kept.values()
    held = sum(not block.is_null for block in row) + len(kept)
    pages = {state: sample("pages", state=state) / per_block for state in ("sealed", "kept", "dense", "free")}
    assert pages == {
        "kept": (600 // 64 * 64 - expected_evicted(600)) // 64,
        "dense": layout.private_blocks,
        "free": pool.get_num_free_blocks(),
        "sealed": held - pages["kept"] - layout.private_blocks,
    }
    sixteen_bit_bytes = (600 + generated - 1) * per_block * (64 + 64) * 2
    assert sample("compression_ratio", kind="effective") == pytest.approx(
        sixteen_bit_bytes / (held * per_block * layout.cell_bytes), rel=2e-3
    )
    core.abort_request(["running"])
    run(llm, random_prompts([5], seed=14), max_tokens=2)
    connector = core.engine_core.engine_core.scheduler.connector
    assert not connector.accounting.requests
    assert sample("pages", state="kept") == sample("pages", state="dense") == 0
