"""The block manager beside vLLM's own for window layers: one pool, several groups, and what each block holds.

The simulated worker of test_manager also has window layers. It reads every token of a window before a step, so a block
that was given back too early, a hit on another text or on one computed from an evicted cache shows as wrong content.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.request import Request

from kvserve.accounting.plan import plan_eviction
from kvserve.engine.eviction_manager import EvictingPageManager, share_prompts_only
from kvserve.engine.spec import EvictingPageSpec, PageSpec
from kvserve.pages.layout import PageLayout
from kvserve.pages.windows import Hybrid, WindowGroups
from kvserve.schedules.base import Limit
from tests.accounting.test_eviction_manager import SCHEDULES, EvictingSimulation, evicting
from tests.accounting.test_manager import Simulation, make_layout

WINDOW, WINDOW_BLOCK, NUM_GROUPS, MAX_LEN, IN_FLIGHT = 100, 16, 2, 4096, 512


def hybrid_manager(layout: PageLayout, num_blocks: int, interval: int | None = None) -> KVCacheManager:
    """The pages' group, then those of the window layers."""
    heads = {"num_kv_heads": 1, "head_size": 64, "dtype": torch.float32}
    dense = FullAttentionSpec(block_size=layout.block_size, **heads)
    pages = (EvictingPageSpec if layout.state_blocks else PageSpec).from_attention(dense, layout)
    window = SlidingWindowSpec(block_size=WINDOW_BLOCK, **heads, sliding_window=WINDOW)
    specs = [pages, *[window] * NUM_GROUPS]
    groups = [KVCacheGroupSpec([f"layer {index}"], spec) for index, spec in enumerate(specs)]
    return KVCacheManager(
        KVCacheConfig(num_blocks, [], groups, prefix_cache_retention_interval=interval), max_model_len=MAX_LEN,
        scheduler_block_size=layout.block_size, hash_block_size=WINDOW_BLOCK, max_in_flight_tokens=IN_FLIGHT,
    )  # fmt: skip


class WithWindows(Simulation):
    """Adds the window layers to a simulation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.manager = hybrid_manager(self.layout, self.num_blocks)
        self.pool = self.manager.block_pool
        self.hasher = get_request_block_hasher(WINDOW_BLOCK, sha256)
        if self.layout.state_blocks:
            share_prompts_only(self.manager)

    def windows(self, request: Request) -> list[list[int]]:
        return [list(row) for row in self.manager.get_block_ids(request.request_id)[1:]]

    def held_beside(self, request: Request) -> list[int]:
        null = self.pool.null_block.block_id
        return [block for row in self.windows(request) for block in row if block != null]

    def work(self, request: Request, chunk: int) -> None:
        start, end = request.num_computed_tokens, request.num_computed_tokens + chunk
        for group, row in enumerate(self.windows(request)):
            for index in range(max(start - WINDOW + 1, 0) // WINDOW_BLOCK, -(-start // WINDOW_BLOCK)):
                written = min((index + 1) * WINDOW_BLOCK, start)
                assert self.contents[row[index]] == (group, self.tile(request, written)), "what the window sees"
            for index in range(start // WINDOW_BLOCK, -(-end // WINDOW_BLOCK)):
                self.contents[row[index]] = (group, self.tile(request, min((index + 1) * WINDOW_BLOCK, end)))
        super().work(request, chunk)


@dataclass
class HybridSimulation(WithWindows, Simulation):
    pass


@dataclass
class EvictingHybrid(WithWindows, EvictingSimulation):
    pass


@given(seed=st.integers(0, 2**32), sink_tokens=st.sampled_from([0, 16]), num_blocks=st.integers(130, 260))
@settings(max_examples=15, deadline=None)
def test_free_and_held_blocks_add_up_over_all_groups(seed: int, sink_tokens: int, num_blocks: int) -> None:
    HybridSimulation(make_layout(sink_tokens), num_blocks, seed).run(25)


@given(
    seed=st.integers(0, 2**32), sinks=st.sampled_from([0, 4]), num_blocks=st.integers(180, 300),
    schedule=st.sampled_from(SCHEDULES),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_free_and_held_blocks_add_up_where_prompts_are_evicted(seed, sinks, num_blocks, schedule) -> None:
    EvictingHybrid(evicting(schedule, sinks=sinks), num_blocks, seed).run(20)


def test_a_full_pool_preempts_and_prefixes_are_hit() -> None:
    simulation = HybridSimulation(make_layout(16), 150, seed=7)
    simulation.run(400)
    assert simulation.num_preempted > 20
    assert simulation.num_hit_tokens > 2000
    evicting_one = EvictingHybrid(evicting(), 190, seed=7)
    evicting_one.run(300)
    assert evicting_one.num_cuts > 60
    assert evicting_one.num_hit_tokens > 200


@pytest.mark.parametrize("interval", [None, 0])
def test_only_blocks_computed_from_a_whole_cache_serve_others(interval: int | None) -> None:
    """Also where vLLM keeps none but the blocks before the token at which an equal prompt could go on."""
    layout = evicting(sinks=0)
    manager = hybrid_manager(layout, 400, interval)
    share_prompts_only(manager)
    pages, hasher = EvictingPageManager.of(manager), get_request_block_hasher(WINDOW_BLOCK, sha256)
    first, again = (
        Request(name, list(range(452)), SamplingParams(max_tokens=200), None, block_hasher=hasher)
        for name in ("first", "again")
    )
    plan = plan_eviction(layout, Limit(4.0), 452, MAX_LEN)
    assert plan is not None and plan.reusable_tokens() == 384
    pages.plans["first"] = plan
    for chunk in (300, 152, *[1] * 150):
        assert manager.allocate_slots(first, chunk) is not None
        first.num_computed_tokens += chunk
        if first.num_computed_tokens >= 452:
            first.append_output_token_ids(7)
    for one in pages.windows:
        behind = one.req_to_blocks["first"][384 // WINDOW_BLOCK :]
        assert len(behind) > 12 and not any(block.block_hash for block in behind)
    manager.free(first)
    assert manager.get_computed_blocks(again)[1] == 384


def test_between_steps_window_layers_hold_what_the_arithmetic_says() -> None:
    layout = make_layout(16)
    simulation = HybridSimulation(layout, 400, seed=3)
    groups = WindowGroups(Hybrid(1, NUM_GROUPS, WINDOW), 1, 512, WINDOW_BLOCK)
    assert groups.num_groups == NUM_GROUPS
    request = Request("a", list(range(900)), SamplingParams(max_tokens=1), None, block_hasher=simulation.hasher)
    computed = 0
    for chunk in (1, 15, 70, 14, 1, 63, 200, 300, 1, 235):
        assert simulation.manager.allocate_slots(request, chunk) is not None
        computed += chunk
        request.num_computed_tokens = computed
        simulation.manager.remove_skipped_blocks(request.request_id, computed, 900)
        assert len(simulation.held_beside(request)) == groups.held_blocks(computed)


def test_a_request_can_have_what_window_layers_leave() -> None:
    manager = hybrid_manager(evicting(), 300)
    pages = EvictingPageManager.of(manager)
    assert pages.window == WINDOW and len(pages.windows) == NUM_GROUPS
    most = -(-(WINDOW - 1 + IN_FLIGHT) // WINDOW_BLOCK) + 1
    assert pages.usable_blocks(17) == 299 - NUM_GROUPS * 2
    assert pages.usable_blocks(3000) == 299 - NUM_GROUPS * most
