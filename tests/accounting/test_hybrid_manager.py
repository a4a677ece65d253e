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

from kvserve.engine.eviction_manager import EvictingPageManager, share_prompts_only
from kvserve.engine.spec import EvictingPageSpec, PageSpec
from kvserve.pages.layout import PageLayout
from kvserve.pages.windows import Hybrid, WindowGroups
from tests.accounting.test_eviction_manager import SCHEDULES, EvictingSimulation, evicting
from tests.accounting.test_manager import Simulation, make_layout

WINDOW, WINDOW_BLOCK, NUM_GROUPS, MAX_LEN, IN_FLIGHT = 100, 16, 2, 4096, 512


def hybrid_manager(layout: PageLayout, num_blocks: int) -> KVCacheManager:
    """The pages' group between the window layers': whichever comes first must not matter."""
    heads = {"num_kv_heads": 1, "head_size": 64, "dtype": torch.float32}
    dense = FullAttentionSpec(block_size=layout.block_size, **heads)
    pages = (EvictingPageSpec if layout.state_blocks else PageSpec).from_attention(dense, layout)
    window = SlidingWindowSpec(block_size=WINDOW_BLOCK, **heads, sliding_window=WINDOW)
    specs = [pages, *[window] * NUM_GROUPS]
    groups = [KVCacheGroupSpec([f"layer {index}"], spec) for index, spec in enumerate(specs)]
    return KVCacheManager(
        KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups), max_model_len=MAX_LEN,
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


@pytest.mark.parametrize("num_free", range(12))
def test_private_blocks_evict_no_hit_of_another_group(num_free: int) -> None:
    """The last free blocks that nobody holds are those that the prompt has hits in."""
    layout = make_layout(16)
    needed = layout.blocks_for(201) + NUM_GROUPS * -(-201 // WINDOW_BLOCK)
    manager = hybrid_manager(layout, needed + num_free)
    hasher = get_request_block_hasher(WINDOW_BLOCK, sha256)
    tokens = list(range(201))
    first = Request("first", tokens, SamplingParams(max_tokens=1), None, block_hasher=hasher)
    if manager.allocate_slots(first, 201) is None:
        return
    manager.free(first)
    again = Request("again", tokens, SamplingParams(max_tokens=1), None, block_hasher=hasher)
    hits, num_hit = manager.get_computed_blocks(again)[:2]
    assert num_hit == 192
    wanted = [[block.block_id for block in group] for group in hits.blocks]
    if manager.allocate_slots(again, 9, num_new_computed_tokens=192, new_computed_blocks=hits) is None:
        return
    rows = manager.get_block_ids("again")
    assert [block for block in rows[0] if block in wanted[0]] == wanted[0]
    assert [list(row[: 192 // WINDOW_BLOCK]) for row in rows[1:]] == wanted[1:]
    held = [block for row in rows for block in row if block != manager.block_pool.null_block.block_id]
    assert len(held) == len(set(held)), "no block is two things at once"


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
