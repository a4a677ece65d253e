"""Evicted requests in the block manager: the count is exact and known ahead, and what is freed is free at once.

The simulated worker of test_manager, with prompts that are evicted: it writes who kept what into the kept blocks, and
never looks at a block that was given back.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_manager import Simulation, make_layout
from vllm import SamplingParams
from vllm.v1.request import Request

from kvserve.engine.eviction_manager import EvictingPageManager
from kvserve.pages.layout import PageLayout
from kvserve.pages.plan import EvictionPlan, plan_eviction
from kvserve.policies.base import Eviction
from kvserve.schedules.base import Limit

EVICTION = Eviction(scorer="random", budget="uniform", rate=4)


@dataclass
class EvictingSimulation(Simulation):
    """Every request draws its own rate; some keep everything."""

    window: int = 8
    num_evicted: int = 0
    prompts: dict[str, EvictionPlan] = field(default_factory=dict)

    @property
    def pages(self) -> EvictingPageManager:
        (manager,) = self.manager.coordinator.single_type_managers
        return manager

    def new_request(self, name: int) -> Request:
        request = super().new_request(name)
        rate = self.random.choice([1.0, 2.0, 4.0, 16.0])
        plan = plan_eviction(self.layout, Limit(rate), request.num_prompt_tokens, self.window)
        if plan:
            self.pages.plans[request.request_id] = plan
        return request

    def chunk(self, request: Request, num_computed_tokens: int) -> int:
        plan = self.pages.plans.get(request.request_id)
        chunk = super().chunk(request, num_computed_tokens)
        return plan.clip_step(num_computed_tokens, chunk) if plan else chunk

    def work(self, request: Request, chunk: int) -> None:
        plan = self.pages.plans.get(request.request_id)
        start, end = request.num_computed_tokens, request.num_computed_tokens + chunk
        if plan is None:
            return super().work(request, chunk)
        row, layout = self.row(request), self.layout
        assert len(row) == plan.row_blocks(layout, end), "the row is exactly what the accounting says"
        kept = row[plan.kept_row : plan.kept_row + plan.kept_blocks]
        mine = ("kept", request.request_id, tuple(request.all_token_ids[: plan.prompt_len]))
        if start >= plan.prompt_len:
            assert all(self.contents[block] == mine for block in kept)
            replaced = [row[index] for indices in plan.replaced(layout) for index in indices]
            assert len(replaced) == plan.end // layout.block_size
            assert set(replaced) == {self.pool.null_block.block_id}, "what the kept blocks replace is given back"
            return self.decode(request, plan, end)
        assert end <= plan.prompt_len, "a step ends where its prompt is evicted"
        if end == plan.prompt_len:
            assert chunk >= self.window, "the last step has the rows of the window"
            for block in kept:
                self.contents[block] = mine
            self.num_evicted += 1
        self.pages.plans.pop(request.request_id)  # the rest of the row is an ordinary one
        try:
            self.manager_row(request, plan, chunk)
        finally:
            if request in self.running or request in self.waiting:
                self.pages.plans[request.request_id] = plan

    def manager_row(self, request: Request, plan: EvictionPlan, chunk: int) -> None:
        whole = self.row
        self.row = lambda r: [b for i, b in enumerate(whole(r)) if not self.is_kept(plan, i)]  # type: ignore[method-assign]
        try:
            super().work(request, chunk)
        finally:
            del self.row

    def is_kept(self, plan: EvictionPlan, index: int) -> bool:
        return plan.kept_row <= index < plan.kept_row + plan.kept_blocks

    def decode(self, request: Request, plan: EvictionPlan, end: int) -> None:
        """A step behind the prompt: the sealed tiles from `end` on lie behind the kept blocks."""
        row = [block for index, block in enumerate(self.row(request)) if not self.is_kept(plan, index)]
        tokens, tile = request.all_token_ids, self.layout.tile_tokens
        for index in range(plan.end // tile, request.num_computed_tokens // tile):
            assert self.contents[row[self.tile_position(index)]] == ("evicted", tuple(tokens[: (index + 1) * tile]))
        for index in range(request.num_computed_tokens // tile, end // tile):
            self.contents[row[self.tile_position(index)]] = ("evicted", tuple(tokens[: (index + 1) * tile]))
        self.finish_step(request, end)


@given(
    seed=st.integers(0, 2**32),
    sink_tokens=st.sampled_from([0, 4, 32]),
    num_blocks=st.integers(45, 110),
    window=st.sampled_from([1, 8, 70]),
)
@settings(max_examples=25, deadline=None)
def test_free_and_held_blocks_always_add_up(seed: int, sink_tokens: int, num_blocks: int, window: int) -> None:
    EvictingSimulation(make_layout(sink_tokens, eviction=EVICTION), num_blocks, seed, window=window).run(25)


def test_nothing_leaks_over_2500_requests() -> None:
    simulation = EvictingSimulation(make_layout(8, eviction=EVICTION), 66, seed=7)
    simulation.run(2500)
    assert simulation.num_evicted > 500
    assert simulation.num_preempted > 50
    assert simulation.num_hit_tokens > 10_000


def layout_of(block_size: int = 64, sink_tokens: int = 8) -> PageLayout:
    return make_layout(sink_tokens, block_size, EVICTION)


@pytest.mark.parametrize("rate", [2, 4, 8])
def test_a_long_prompt_keeps_the_asked_share_of_its_tile_blocks(rate: int) -> None:
    plan = plan_eviction(layout_of(), Limit(rate), 4096, window=8)
    assert plan is not None
    assert plan.kept_blocks == 64 // rate
    assert plan.end == 4096


@pytest.mark.parametrize("prompt_len", [1, 64, 100, 128])
def test_a_prompt_that_would_not_shrink_is_left_alone(prompt_len: int) -> None:
    plan = plan_eviction(layout_of(), Limit(1.01), prompt_len, window=8)
    assert plan is None or plan.kept_blocks < prompt_len // 64


@settings(max_examples=200, deadline=None)
@given(
    prompt_len=st.integers(130, 5000), rate=st.floats(1, 64), window=st.integers(1, 64),
    chunks=st.lists(st.integers(1, 600), min_size=1, max_size=50),
)  # fmt: skip
def test_steps_end_at_the_prompts_end_with_the_windows_rows_in_the_last(prompt_len, rate, window, chunks) -> None:
    plan = plan_eviction(layout_of(), Limit(rate), prompt_len, window)
    if plan is None:
        return
    computed, last, offers = 0, 0, itertools.cycle([*chunks, window])
    while computed < prompt_len:
        offer = next(offers)
        last = plan.clip_step(computed, offer)
        assert 0 <= last <= offer
        computed += last
    assert computed == prompt_len
    assert last >= window


def test_a_prompt_shorter_than_the_window_is_evicted_in_one_step() -> None:
    simulation = EvictingSimulation(make_layout(8, eviction=EVICTION), 60, seed=3, window=500)
    params = SamplingParams(max_tokens=3)
    params.update_from_generation_config({}, eos_token_id=0)
    request = Request("a", list(range(300)), params, None, block_hasher=simulation.hasher)
    plan = plan_eviction(simulation.layout, Limit(4.0), 300, 500)
    assert plan is not None
    simulation.pages.plans["a"] = plan
    assert plan.clip_step(0, 299) == 0 and plan.clip_step(0, 300) == 300
    simulation.pages.add_local_computed_blocks("a", [], 0, 0)
    assert simulation.manager.allocate_slots(request, 300) is not None
    assert simulation.pages.plans == {"a": plan}
    assert len(simulation.row(request)) == plan.row_blocks(simulation.layout, 300)


def test_only_prompt_tiles_enter_the_prefix_cache() -> None:
    simulation = EvictingSimulation(make_layout(8, eviction=EVICTION), 60, seed=3)
    params = SamplingParams(max_tokens=200)
    params.update_from_generation_config({}, eos_token_id=0)
    request = Request("a", list(range(500)), params, None, block_hasher=simulation.hasher)
    plan = plan_eviction(simulation.layout, Limit(4.0), 500, 8)
    assert plan is not None
    simulation.pages.plans["a"] = plan
    assert simulation.admit(request)
    while request in simulation.running:
        simulation.advance(request)
    again = Request("b", request.all_token_ids[:], SamplingParams(max_tokens=1), None, block_hasher=simulation.hasher)
    assert simulation.manager.get_computed_blocks(again)[1] == 448, "of 500 prompt tokens, the whole tiles before 492"
