"""Evicted requests in the block manager: the count is exact and known ahead, and what is freed is free at once.

The simulated worker of test_manager, with requests that are cut: it writes who kept what into the kept blocks, and
never looks at a block that was given back.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.v1.request import Request, RequestStatus

from kvserve.accounting.plan import EvictionPlan, plan_eviction
from kvserve.engine.eviction_manager import EvictingPageManager
from kvserve.pages.layout import PageLayout
from kvserve.policies.base import Eviction
from kvserve.schedules.base import Limit
from tests.accounting.test_manager import Simulation, make_layout, make_manager

MAX_LEN = 4096
SCHEDULES = [
    {"name": "end-of-prefill"},
    {"name": "end-of-prefill", "chunk_tokens": 128},
    {"name": "every-n", "interval": 64},
    {"name": "every-n", "interval": 7, "chunk_tokens": 100},
    {"name": "over-budget", "interval": 64},
    {"name": "over-budget", "interval": 1, "chunk_tokens": 192},
]


def evicting(
    schedule: dict | str = "end-of-prefill", window: int = 8, sinks: int = 8, block_size: int = 64,
    spare: tuple[int, ...] = (),
) -> PageLayout:  # fmt: skip
    eviction = Eviction(
        scorer={"name": "window-attention", "window": window, "keep_window": False}, budget="uniform",
        schedule=schedule, max_tokens=300, spare_layers=spare,
    )  # fmt: skip
    return make_layout(sinks, block_size, eviction)


@dataclass
class EvictingSimulation(Simulation):
    """Every request draws its own limit; some keep everything."""

    num_cuts: int = 0
    hits: dict[str, int] = field(default_factory=dict)

    @property
    def pages(self) -> EvictingPageManager:
        return EvictingPageManager.of(self.manager)

    def plan(self, request: Request) -> EvictionPlan | None:
        return self.pages.plans.get(request.request_id)

    def new_request(self, name: int) -> Request:
        request = super().new_request(name)
        rates = [Limit(rate) for rate in (1.0, 2.0, 4.0, 16.0)]
        budgets = [Limit(max_tokens=count, protected=8) for count in (64, 150, 300)]
        eviction = self.layout.policy.eviction
        limit = self.random.choice(budgets if eviction.schedule.needs_max_tokens else rates + budgets)
        plan = plan_eviction(self.layout, limit, request.num_prompt_tokens, MAX_LEN)
        if plan:
            self.pages.plans[request.request_id] = plan
            request.skip_reading_prefix_cache = plan.computes_all
        return request

    def chunk(self, request: Request, num_computed_tokens: int) -> int:
        plan, chunk = self.plan(request), super().chunk(request, num_computed_tokens)
        if not request.num_computed_tokens:
            self.hits[request.request_id] = num_computed_tokens
        return plan.clip_step(num_computed_tokens, chunk) if plan else chunk

    def work(self, request: Request, chunk: int) -> None:
        plan, start = self.plan(request), request.num_computed_tokens
        if plan:
            before, cut = plan.last_cut(start), plan.last_cut(start + chunk)
            self.check_kept(request, before.point)
            held = self.layout.blocks_for(start + chunk) - before.end // self.layout.block_size + before.kept_blocks
            if cut != before:
                assert cut.point == start + chunk, "a step ends where its request is cut"
                self.check_window(request, chunk, plan.window_start(cut))
                held += cut.kept_blocks
                for block in self.pages.kept_at(request.request_id, cut.point).blocks:
                    self.contents[block] = self.kept(request, cut.point)
                self.num_cuts += 1
            assert len(self.held(request)) == held, "the blocks are exactly what the accounting says"
        super().work(request, chunk)

    def check_kept(self, request: Request, point: int) -> None:
        blocks = self.pages.kept_at(request.request_id, point).blocks
        assert all(self.contents[block] == self.kept(request, point) for block in blocks)

    def check_window(self, request: Request, chunk: int, window_start: int) -> None:
        """Every query that the scorer needs was computed: in this step, or in one that could remember it."""
        if self.layout.remembered_queries:
            assert self.hits[request.request_id] <= window_start
        else:
            assert request.num_computed_tokens <= window_start

    def kept(self, request: Request, point: int) -> object:
        return ("kept", request.request_id, tuple(request.all_token_ids[:point]))

    def first_token(self, request: Request) -> int:
        plan = self.plan(request)
        return plan.last_cut(request.num_computed_tokens).end if plan else 0

    def tile(self, request: Request, end: int) -> object:
        """Tokens behind the first cut are computed from what the request kept."""
        plan = self.plan(request)
        first = plan.next_cut(0) if plan else None
        tokens = super().tile(request, end)
        return (request.request_id, tokens) if first and end > first.point else tokens

    def held(self, request: Request) -> list[int]:
        kept = self.pages.kept.get(request.request_id, [])
        return super().held(request) + [block.block_id for entry in kept for block in entry.blocks]

    def finish(self, request: Request, status: RequestStatus) -> None:
        self.pages.plans.pop(request.request_id, None)
        super().finish(request, status)


@given(
    seed=st.integers(0, 2**32), sinks=st.sampled_from([0, 4, 32]), num_blocks=st.integers(60, 130),
    window=st.sampled_from([1, 8, 70]), schedule=st.sampled_from(SCHEDULES), block_size=st.sampled_from([64, 64, 128]),
    spare=st.sampled_from([(), (0, -1), (2, 3, 4, 5)]),
)  # fmt: skip
@example(seed=0, sinks=4, num_blocks=60, window=70, schedule=SCHEDULES[1], block_size=64, spare=())
@settings(max_examples=40, deadline=None)
def test_free_and_held_blocks_always_add_up(seed, sinks, num_blocks, window, schedule, block_size, spare) -> None:
    """The example has a window that begins before the last cut but one."""
    EvictingSimulation(evicting(schedule, window, sinks, block_size, spare), num_blocks, seed).run(20)


@pytest.mark.parametrize("schedule", [SCHEDULES[0], SCHEDULES[3], SCHEDULES[4]], ids=lambda s: s["name"])
def test_nothing_leaks_over_400_requests(schedule: dict) -> None:
    simulation = EvictingSimulation(evicting(schedule), 66, seed=7)
    simulation.run(400)
    assert simulation.num_cuts > 80
    assert simulation.num_preempted > 8
    assert simulation.num_hit_tokens > 200


@pytest.mark.parametrize("rate", [2, 4, 8])
def test_a_long_prompt_keeps_the_asked_share_of_its_tile_blocks(rate: int) -> None:
    plan = plan_eviction(evicting(), Limit(rate), 4096, MAX_LEN)
    assert plan is not None
    assert plan.last_cut(4096)[:3] == (4096, 4096, 64 // rate)
    assert plan.last_cut(4095).point == 0


@pytest.mark.parametrize("prompt_len", [1, 64, 100, 128])
def test_a_prompt_that_would_not_shrink_is_left_alone(prompt_len: int) -> None:
    plan = plan_eviction(evicting(), Limit(1.01), prompt_len, MAX_LEN)
    assert plan is None or plan.last_cut(prompt_len).kept_blocks < prompt_len // 64


@pytest.mark.parametrize("schedule", ["end-of-prefill", "every-n"])
def test_a_prompt_within_its_maximum_stays_whole(schedule: str) -> None:
    layout = evicting(schedule, sinks=8)
    assert plan_eviction(layout, Limit(max_tokens=300), 299, 300) is None
    plan = plan_eviction(layout, Limit(max_tokens=300), 320, MAX_LEN)
    assert plan is not None and plan.last_cut(320).kept_blocks == 4


@settings(max_examples=200, deadline=None)
@given(
    prompt_len=st.integers(1, 1000), budget=st.integers(64, 600), length=st.integers(1, 3000),
    interval=st.integers(1, 200), chunk_tokens=st.sampled_from([0, 64, 200]), sinks=st.sampled_from([0, 8]),
)  # fmt: skip
def test_over_budget_never_holds_more_than_its_maximum_while_it_generates(
    prompt_len, budget, length, interval, chunk_tokens, sinks
) -> None:
    """Whatever is beyond the maximum is a page: one at least is kept, and tokens leave a tile at a time."""
    schedule = {"name": "over-budget", "interval": interval, "chunk_tokens": chunk_tokens}
    plan = plan_eviction(
        evicting(schedule, sinks=sinks), Limit(max_tokens=budget, protected=sinks), prompt_len, MAX_LEN
    )
    if plan is None or length < prompt_len:
        return
    cut = plan.last_cut(length)
    held = (sinks if cut.end else 0) + 64 * cut.kept_blocks + length - cut.end
    assert held <= max(budget, sinks + 64 + 63 + interval) + 63
    if interval >= 64 and budget >= sinks + 127 + interval:
        assert held <= budget


@settings(max_examples=200, deadline=None)
@given(
    prompt_len=st.integers(130, 3000), rate=st.floats(1, 64), window=st.integers(1, 64),
    chunks=st.lists(st.integers(1, 600), min_size=1, max_size=50), schedule=st.sampled_from(SCHEDULES[:4]),
)  # fmt: skip
def test_steps_end_at_every_cut_with_the_windows_rows_in_the_last(prompt_len, rate, window, chunks, schedule) -> None:
    layout = evicting(schedule, window)
    plan = plan_eviction(layout, Limit(rate), prompt_len, MAX_LEN)
    if plan is None:
        return
    computed, offers = 0, itertools.cycle([*chunks, window])
    while computed < prompt_len:
        offer = next(offers)
        step = plan.clip_step(computed, offer)
        assert 0 <= step <= offer
        following = plan.next_cut(computed)
        assert following is None or computed + step <= following.point
        if following and computed + step == following.point and not layout.remembered_queries:
            assert step >= min(window, following.point)
        computed += step


def test_every_tile_block_of_a_decode_goes_back_as_the_next_one_fills() -> None:
    layout = evicting({"name": "over-budget", "interval": 64})
    plan = plan_eviction(layout, Limit(max_tokens=320), 100, MAX_LEN)
    assert plan is not None
    kept = layout.private_blocks + layout.sink_blocks + 3  # 8 sinks, 3 pages, and 64 to come are at most 320
    held = [plan.held_blocks(length) for length in range(400, 4000)]
    assert set(held) == {kept, kept + 1}
    assert plan.peak_blocks(4000) == kept - 3 + 5 + 3, "the first cut has 5 tiles, and the new pages beside them"


def test_a_prompt_compressed_as_it_arrives_needs_a_bounded_number_of_blocks() -> None:
    schedule = {"name": "end-of-prefill", "chunk_tokens": 256}
    chunked, whole = (
        plan_eviction(evicting(s), Limit(max_tokens=256), 4096, MAX_LEN) for s in (schedule, SCHEDULES[0])
    )
    assert chunked is not None and whole is not None
    assert whole.peak_blocks(4096) > 64
    assert chunked.peak_blocks(4096) < 24
    assert chunked.held_blocks(4096) == whole.held_blocks(4096)


def make_request(simulation: EvictingSimulation, num_tokens: int, max_tokens: int) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    params.update_from_generation_config({}, eos_token_id=0)
    request = Request("a", list(range(num_tokens)), params, None, block_hasher=simulation.hasher)
    plan = plan_eviction(simulation.layout, Limit(4.0), num_tokens, MAX_LEN)
    assert plan is not None
    simulation.pages.plans["a"] = plan
    return request


def test_a_prompt_shorter_than_the_window_is_evicted_in_one_step() -> None:
    simulation = EvictingSimulation(evicting(window=500), 60, seed=3)
    request = make_request(simulation, 300, max_tokens=3)
    plan = simulation.plan(request)
    assert plan.clip_step(0, 299) == 0 and plan.clip_step(0, 300) == 300
    simulation.pages.add_local_computed_blocks("a", [], 0, 0)
    assert simulation.manager.allocate_slots(request, 300) is not None
    assert simulation.pages.plans == {"a": plan}
    assert len(simulation.pages.kept_at("a", 300).blocks) == 1


def test_only_prompt_tiles_enter_the_prefix_cache() -> None:
    simulation = EvictingSimulation(evicting(), 60, seed=3)
    request = make_request(simulation, 500, max_tokens=200)
    assert simulation.admit(request)
    while request in simulation.running:
        simulation.advance(request)
    again = Request("b", request.all_token_ids[:], SamplingParams(max_tokens=1), None, block_hasher=simulation.hasher)
    assert simulation.manager.get_computed_blocks(again)[1] == 448, "of 500 prompt tokens, the whole tiles before 492"


def test_only_tiles_before_the_first_cut_of_a_prompt_enter_the_prefix_cache() -> None:
    simulation = EvictingSimulation(evicting({"name": "end-of-prefill", "chunk_tokens": 256}), 60, seed=3)
    request = make_request(simulation, 500, max_tokens=2)
    assert simulation.admit(request)
    while request in simulation.running:
        simulation.advance(request)
    again = Request("b", request.all_token_ids[:], SamplingParams(max_tokens=1), None, block_hasher=simulation.hasher)
    assert simulation.manager.get_computed_blocks(again)[1] == 192, "of 500, the whole tiles before the window of 256"


def test_a_cut_waits_for_the_step_that_reaches_it_however_far_a_draft_model_writes_ahead() -> None:
    layout = evicting()
    manager = make_manager(layout, 80)
    pages, request = (
        EvictingPageManager.of(manager),
        Request("a", list(range(400)), SamplingParams(max_tokens=99), None),
    )
    plan = plan_eviction(layout, Limit(4.0), 400, MAX_LEN)
    assert plan is not None and plan.next_cut(0) is not None
    pages.plans["a"] = plan
    assert manager.allocate_slots(request, 390, num_lookahead_tokens=30) is not None
    assert pages.kept_at("a", 420).blocks == ()
    request.num_computed_tokens = 390
    assert manager.allocate_slots(request, 10, num_lookahead_tokens=30) is not None
    assert len(pages.kept_at("a", 420).blocks) == plan.last_cut(400).kept_blocks > 0
