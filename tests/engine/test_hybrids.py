"""Models with window layers among full ones: the full layers are compressed and evicted, the windows are vLLM's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from kvserve.accounting.plan import widest_request
from kvserve.engine.backend import KvserveImpl
from kvserve.engine.probe_worker import kvserve_layers
from kvserve.engine.report import EngineReport
from kvserve.engine.self_test import EXTENSION_PATH
from kvserve.probe.distances import ProbeReport, complaints
from kvserve.probe.request import TestPlan as Plan
from kvserve.probe.request import num_queries, plan_test, prompt_tokens
from tests.cases.engine_cases import (
    assert_preempted_with_same_texts,
    engine,
    free_blocks,
    generate,
    prompt_logprobs,
    random_prompts,
    report_of,
    steps,
    tokens,
)
from tests.cases.greedy import assert_same_texts
from tests.cases.tiny_models import HYBRIDS, make_tiny_model

# Around a tile, past the windows of 64 and 96, and far past them.
LENGTHS = [5, 64, 65, 200, 333, 700]
GROWING, MORE = [40, 41, 42, 43, 44, 45, 46, 200], 200  # prompts, and what they generate
ROOMY: dict[str, Any] = {"skip_tokenizer_init": True, "max_num_batched_tokens": 1024}
EVICTING = ("kv-compress-2bit", {"eviction.rate": 2})
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("int8", {}), "kivi-2bit": ("kivi-2bit", {}), "kv-compress-2bit": EVICTING,
    "kv-compress-live": ("kv-compress-live", {}), "mikv": ("mikv", {}),
}  # fmt: skip


SLOW = ("olmo3-3-to-1", "gemma4-shared")


@pytest.fixture(
    scope="module",
    params=["gemma3-5-to-1", "gemma3n-shared", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)],
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(request.param, tmp_path_factory.mktemp(request.param))


@contextmanager
def serving(model: Path, name: str, **options: Any) -> Iterator[LLM]:
    policy, changes = POLICIES.get(name, (name, {}))
    with engine(model, policy, changes, **(ROOMY | options)) as llm:
        yield llm


def kv_config(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config


def config_of(model: Path) -> Any:
    return next(config for name, config in HYBRIDS.items() if name in model.name)


def check_layers(llm: LLM, model: Path) -> None:
    """Which layers are compressed, and that vLLM gives the others blocks for their windows alone."""
    kinds = config_of(model).layer_types
    impls: list[KvserveImpl] = [impl for _, impl in kvserve_layers(llm.llm_engine.vllm_config)]
    assert [impl.is_dense for impl in impls] == [kind == "sliding_attention" for kind in kinds]
    specs = [group.kv_cache_spec for group in kv_config(llm).kv_cache_groups]
    windows = [spec for spec in specs if type(spec) is SlidingWindowSpec]
    assert len(windows) == len(specs) - 1 == report_of(llm).windows.num_groups
    assert all(group.layer_names for group in kv_config(llm).kv_cache_groups)


def check_capacity(llm: LLM, evicts: bool) -> None:
    report, cache = report_of(llm), llm.llm_engine.vllm_config.cache_config
    assert report.num_blocks == 64 * 2**20 // report.block_bytes == kv_config(llm).num_blocks
    if not evicts:
        assert report.effective_capacity_tokens == cache.kv_cache_size_tokens
    table = report.table()
    assert f"{report.windows.hybrid.num_windows} more layers keep the last" in table
    assert f"{report.windows.waste:.1%} of their blocks is unused" in table


def check_self_test(llm: LLM) -> None:
    config = llm.llm_engine.vllm_config
    plan: Plan = plan_test(report_of(llm).layout, config.model_config.max_model_len)
    prompt, seen = prompt_tokens(None, 500, plan.prompt_len), 0
    llm.collective_rpc("kvserve_probe_start")
    for length, params in plan.requests():
        llm.collective_rpc("kvserve_probe_begin")
        params |= {"prompt_logprobs": None}
        (output,) = llm.generate([{"prompt_token_ids": prompt[:length]}], sampling(params), use_tqdm=False)
        seen += num_queries(length, output.num_cached_tokens, params["max_tokens"])
    found = ProbeReport.of_ranks(llm.collective_rpc("kvserve_probe_finish"))
    assert len(found.layers) == len(kvserve_layers(config))
    assert complaints(found, seen) == []


def sampling(params: dict[str, Any]) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**params)


def test_a_dense_cache_answers_like_stock_and_int8_nearly_so(model: Path) -> None:
    prompts, outputs = random_prompts(LENGTHS), {}
    for policy in (None, "none", "int8"):
        with engine(model, policy, **ROOMY) as llm:
            outputs[policy] = generate(llm, prompts)
            if policy == "int8":
                check_layers(llm, model)
                check_capacity(llm, evicts=False)
                assert free_blocks(llm) == kv_config(llm).num_blocks - 1
    for stock, none, int8 in zip(*outputs.values(), strict=True):
        assert tokens(none) == tokens(stock)
        difference = [abs(a - b) for a, b in zip(prompt_logprobs(int8), prompt_logprobs(none), strict=True)]
        assert sum(difference) / len(difference) < 0.02


@pytest.mark.parametrize(
    "name", [name if name == "kv-compress-2bit" else pytest.param(name, marks=pytest.mark.slow) for name in POLICIES]
)
def test_chunks_prefix_hits_and_preemption_change_no_text(model: Path, name: str) -> None:
    """A roomy engine that computes prompts whole, and one with chunks of 100 tokens and few blocks.

    What is preempted has grown into its windows, and the last request was cut before, where the policy evicts.
    """
    prompts, growing = random_prompts([200, 333, 400, 270], seed=1), random_prompts(GROWING, seed=2)
    evicts = POLICIES[name][0] not in ("int8", "kivi-2bit")
    with serving(model, name, worker_extension_cls=EXTENSION_PATH) as llm:
        check_layers(llm, model)
        check_capacity(llm, evicts)
        check_self_test(llm)
        whole = [prompt_logprobs(output) for output in generate(llm, prompts)]
        llm.reset_prefix_cache()
        first = generate_plain(llm, prompts, 60)
        again = generate_plain(llm, prompts, 60)
        if evicts:
            kept = [output.kv_transfer_params["kvserve"] for output in first]
            assert all(one["rate_effective"] > 1.2 or one.get("tokens_demoted", 0) > 50 for one in kept)
        if name not in ("kv-compress-live", "mikv"):  # which compute whole prompts
            assert all(output.num_cached_tokens >= 128 for output in again)
        assert_same_texts([steps(output) for output in first], [steps(output) for output in again])
        expected = [steps(output) for output in generate(llm, growing, max_tokens=MORE, logprobs=2)]
        assert free_blocks(llm) == kv_config(llm).num_blocks - 1
        report = report_of(llm)
    small = report.block_bytes * few_blocks(report, 410)
    with serving(model, name, kv_cache_memory_bytes=small, max_model_len=410, max_num_batched_tokens=100) as llm:
        num_blocks = kv_config(llm).num_blocks
        assert_preempted_with_same_texts(llm, growing, expected, num_blocks)
        chunks = [prompt_logprobs(output) for output in generate(llm, prompts)]
    for some, all_at_once in zip(chunks, whole, strict=True):
        assert some == pytest.approx(all_at_once, abs=0.02)


def generate_plain(llm: LLM, prompts: list[list[int]], max_tokens: int) -> Any:
    """Greedy outputs that may be read from the prefix cache, which prompt logprobs do not allow."""
    params = {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, "logprobs": 2, "detokenize": False}
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling(params), use_tqdm=False)


def few_blocks(report: EngineReport, max_len: int) -> int:
    """A pool that takes in all growing prompts, and holds any one request of at most `max_len` tokens."""
    groups, layout = report.windows, report.layout
    admitted = sum(layout.blocks_for(n) + groups.num_groups * -(-n // groups.block_size) for n in GROWING)
    return 2 + max(admitted, widest_request(layout, max_len) + groups.most_blocks(max_len, 200))
