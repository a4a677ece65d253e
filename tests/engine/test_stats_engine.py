"""Metrics and per-request reports of a real engine whose prompts are evicted, against arithmetic on the prompts."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from prometheus_client import REGISTRY
from prometheus_client.samples import Sample
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

from kvserve.engine.eviction_manager import EvictingPageManager
from kvserve.engine.metrics import KvserveStatLogger
from kvserve.engine.own_requests import own_request_id
from tests.cases.engine_cases import engine, random_prompts
from tests.cases.tiny_models import make_tiny_model

LAYERS, KV_HEADS, RATE = 2, 2, 4


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """All heads compete, so they keep different numbers of tokens; no sinks, so pages are full."""
    model = make_tiny_model("llama-gqa-64", tmp_path_factory.mktemp("model"))
    with engine(model, "kv-compress", skip_tokenizer_init=True, disable_log_stats=False) as llm:
        # The API server finds it as a plugin; `LLM` does not look for those.
        stat_logger = KvserveStatLogger(llm.llm_engine.vllm_config, [0])
        stat_logger.log_engine_initialized()
        llm.llm_engine.logger_manager.stat_loggers.append(stat_logger)
        yield llm


def manager_of(llm: LLM) -> EvictingPageManager:
    (manager,) = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.coordinator.single_type_managers
    return manager


def sample(name: str, **labels: str) -> float:
    """A sample of this process' last engine, under the labels that vLLM gives its own metrics."""
    (running,) = [sample for sample in samples() if sample.name == "vllm:num_requests_running"]
    return REGISTRY.get_sample_value(f"kvserve:{name}", running.labels | labels) or 0.0


def samples() -> list[Sample]:
    return [sample for family in REGISTRY.collect() for sample in family.samples]


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


def test_no_external_prefix_cache_is_reported(llm: LLM) -> None:
    """kvserve's connector moves no KV, so nobody asks another cache for what the prefix cache does not have."""
    run(llm, random_prompts([300], seed=15), max_tokens=2)
    totals = {sample.name: sample.value for sample in samples() if "prefix_cache" in sample.name}
    assert totals["vllm:prefix_cache_queries_total"] > 300
    assert totals["vllm:external_prefix_cache_queries_total"] == 0


def test_kvserves_own_requests_leave_no_trace(llm: LLM) -> None:
    """Of the self-test and /ready: the ratio stays that of the users' last step, nothing counts as evicted."""
    run(llm, random_prompts([200], seed=16), max_tokens=2)
    told = ("kv_tokens_evicted_total", "kept_tokens_count", "compression_ratio")
    before = {(s.name, str(s.labels)): s.value for s in samples() if s.name.removeprefix("kvserve:") in told}
    core, done = llm.llm_engine, []
    (prompt,) = random_prompts([600], seed=17)
    sampling = SamplingParams(max_tokens=3, ignore_eos=True, detokenize=False)
    core.add_request(own_request_id("test"), {"prompt_token_ids": prompt}, sampling)
    while core.has_unfinished_requests():
        done += core.step()
    core.step()
    assert done[-1].kv_transfer_params["kvserve"]["rate_effective"] > 2, "it was evicted"
    after = {(s.name, str(s.labels)): s.value for s in samples() if s.name.removeprefix("kvserve:") in told}
    assert len(before) == 2 + 1 + LAYERS and after == before


def test_several_engines_have_a_series_each(llm: LLM) -> None:
    """Of data parallelism: vLLM adds up their blocks, and names the engine in every record."""
    config, told = llm.llm_engine.vllm_config, ("pages", "compression_ratio", "kv_capacity_tokens", "policy_info")
    pool = sum(sample("pages", state=state) for state in ("sealed", "kept", "dense", "free"))
    with patch.object(config.cache_config, "num_gpu_blocks", 3 * config.cache_config.num_gpu_blocks):
        stat_logger = KvserveStatLogger(config, [0, 1, 2])
        stat_logger.log_engine_initialized()
    for index, usage in enumerate((0.25, 0.5, 1.0)):
        held = {"tokens": 640, "blocks": 5 * (index + 1), "kept": 0, "dense": 0}
        stats = {
            "evicted_head_tokens": 4 * index,
            "demoted_head_tokens": 0,
            "kept_tokens": [],
            "holding": held,
            "users": held,
        }
        step = SimpleNamespace(kv_connector_stats=stats, kv_cache_usage=usage, num_running_reqs=1)
        stat_logger.record(step, None, engine_idx=index)
    free = [sample("pages", state="free", engine=str(engine)) for engine in range(3)]
    assert free == pytest.approx([pool * 0.75, pool * 0.5, 0], abs=LAYERS * KV_HEADS)
    assert all(len([s for s in samples() if s.name == f"kvserve:{name}"]) % 3 == 0 for name in told)
    ratios = [sample("compression_ratio", kind="effective", engine=str(engine)) for engine in range(3)]
    assert ratios[0] == pytest.approx(2 * ratios[1]) == pytest.approx(3 * ratios[2])
    evicted = [sample("kv_tokens_evicted_total", policy="kv-compress", engine=str(engine)) for engine in (1, 2)]
    assert evicted == [4 / (LAYERS * KV_HEADS), 8 / (LAYERS * KV_HEADS)]


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


def test_a_request_that_the_pool_can_never_hold_comes_back_as_an_error_with_the_reason(llm: LLM) -> None:
    """The pool has more blocks than kvserve is made to believe here."""
    prompts = [{"prompt_token_ids": prompt} for prompt in random_prompts([900, 200], seed=9)]
    params = [SamplingParams(max_tokens=3, detokenize=False, extra_args=own) for own in ({"kvserve_rate": 1.3}, None)]
    with patch.object(EvictingPageManager, "usable_blocks", lambda *_: 20):
        refused, answered = llm.generate(prompts, params, use_tqdm=False)
    assert refused.outputs[0].finish_reason == "error" and refused.outputs[0].token_ids == []
    assert "pool of 20 blocks can never hold this request" in str(refused.outputs[0].stop_reason)
    assert answered.outputs[0].finish_reason == "length"


def test_a_limit_that_cannot_be_followed_is_refused_and_harms_nobody(llm: LLM) -> None:
    with pytest.raises(VLLMValidationError, match="kvserve_rate must be a number from 1 to 1024, got 1e"):
        run(llm, random_prompts([100]), max_tokens=2, extra_args={"kvserve_rate": 1e308})
    # Types and ranges are checked before the engine; what depends on its configuration, in it.
    too_long = SamplingParams(max_tokens=2, detokenize=False, extra_args={"kvserve_max_tokens": 5000})
    (output,) = llm.generate([{"prompt_token_ids": random_prompts([100])[0]}], too_long, use_tqdm=False)
    assert output.outputs[0].finish_reason == "error"
    assert "from 1 to 1024, the longest sequence" in str(output.outputs[0].stop_reason)
    (report,) = run(llm, random_prompts([300]), max_tokens=2, extra_args={"kvserve_rate": 2})
    assert report["rate_requested"] == 2 and report["rate_effective"] > 1
