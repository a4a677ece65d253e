"""How many blocks a request holds, and the widest one of a policy, against a sequence that grows token by token."""

from __future__ import annotations

import time
from dataclasses import replace
from fractions import Fraction
from math import ceil, floor
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvserve.accounting.admission import Admission
from kvserve.accounting.plan import Cut, plan_eviction, policy_plan, widest_request, widest_under
from kvserve.codecs.affine import Affine
from kvserve.pages.layout import PageLayout
from kvserve.policies.base import Eviction, Policy
from kvserve.policies.loading import load_policy
from kvserve.schedules.base import Limit
from tests.eviction.test_schedules import simulate

NUM_LAYERS = 12


def make_layout(schedule: dict[str, Any], tile_tokens: int = 64, tiles: int = 1, sinks: int = 0, **eviction: Any):
    limit = {"max_tokens": 300} if schedule["name"] == "over-budget" else {"rate": 4}
    policy = Policy(
        name="test", summary="", tile_tokens=tile_tokens, sink_tokens=sinks, key=Affine(bits=2, group_size=64),
        value=Affine(bits=2),
        eviction=Eviction(**({"scorer": "key-norm", "budget": "uniform", "schedule": schedule} | limit | eviction)),
    )  # fmt: skip
    return PageLayout.build(policy, 64, tile_tokens * tiles, torch.float32, num_layers=NUM_LAYERS)


@st.composite
def cases(draw) -> tuple[PageLayout, Limit]:
    schedule: dict[str, Any] = {"name": draw(st.sampled_from(["end-of-prefill", "every-n", "over-budget"]))}
    schedule["chunk_tokens"] = draw(st.sampled_from([0, 0, 1, 50, 64, 100, 192]) | st.integers(1, 300))
    if schedule["name"] != "end-of-prefill":
        schedule["interval"] = draw(st.sampled_from([1, 2, 63, 64, 65]) | st.integers(1, 200))
    sinks, recent = draw(st.sampled_from([0, 4, 32, 63])), draw(st.sampled_from([0, 8, 70]))
    layout = make_layout(
        schedule, draw(st.sampled_from([64, 128])), draw(st.integers(1, 3)), sinks,
        spare_layers=draw(st.sampled_from([(), (0,), (0, -1), (2, 3, 4, 5)])),
    )  # fmt: skip
    if schedule["name"] == "over-budget" or draw(st.booleans()):
        return layout, Limit(max_tokens=draw(st.integers(max(sinks + recent, 1), 700)), protected=sinks + recent)
    return layout, Limit(draw(st.sampled_from([1, 1.02, 1.5, 4, 7.3, 64]) | st.floats(1, 9)), protected=sinks + recent)


def kept_by_hand(layout: PageLayout, limit: Limit, point: int, kept_tokens: int) -> int:
    """Blocks for what stays of [sinks, end), where a KV head keeps `kept_tokens` of `point` on average."""
    size, sinks = layout.block_size, layout.policy.sink_tokens
    spared, end = len(layout.spared_layers), point // size * size
    if kept_tokens >= point:
        return end // size
    elsewhere = Fraction(kept_tokens - sinks - (point - end), size)
    protected = Fraction(limit.protected - sinks - (point - end), size)
    least = Fraction(spared * (end // size) + (NUM_LAYERS - spared) * max(ceil(protected), 1), NUM_LAYERS)
    return max(ceil(elsewhere) if limit.rate else floor(elsewhere), ceil(least))


def grow(layout: PageLayout, limit: Limit, prompt_len: int, max_len: int) -> tuple[list[Cut], list[int], list[int]]:
    """Cuts, and by length the blocks held and the most held on the way."""
    schedule = layout.policy.eviction.schedule
    points = set(simulate(schedule, limit, prompt_len, max_len)[1])
    cuts, held, peak = [Cut(0, 0, 0)], [layout.private_blocks], [layout.private_blocks]
    for length in range(1, max_len + 1):
        last = cuts[-1]
        tiles = -(-(length // layout.tile_tokens) // layout.tiles_per_block)
        own = layout.private_blocks + (layout.sink_blocks if tiles else 0) + tiles
        now = most = own - last.end // layout.block_size + last.kept_blocks
        if length in points:
            end = length // layout.block_size
            kept = kept_by_hand(layout, limit, length, schedule.kept_at(limit, length))
            if own - end + kept < now:
                cuts.append(Cut(length, end * layout.block_size, kept))
                now, most = own - end + kept, now + kept
        held.append(now)
        peak.append(max(peak[-1], most))
    return cuts, held, peak


@given(case=cases(), prompt_len=st.integers(1, 1200), max_len=st.integers(1, 1200))
@settings(max_examples=150, deadline=None)
def test_a_plan_is_that_of_a_sequence_that_grows_token_by_token(case, prompt_len: int, max_len: int) -> None:
    layout, limit = case
    prompt_len = min(prompt_len, max_len)
    cuts, held, peak = grow(layout, limit, prompt_len, max_len)
    plan = plan_eviction(layout, limit, prompt_len, max_len)
    assert (plan is not None) == (len(cuts) > 1)
    if plan is None:
        return
    for length in [*range(max_len, 0, -97), *range(1, max_len + 1, 53)]:
        assert plan.last_cut(length) == max(cut for cut in cuts if cut.point <= length)
        assert plan.next_cut(length) == min((cut for cut in cuts if cut.point > length), default=None)
        assert (plan.held_blocks(length), plan.peak_blocks(length)) == (held[length], peak[length])
    assert sorted({plan.last_cut(length) for length in range(max_len + 1)}) == cuts


EVERY_189 = make_layout({"name": "every-n", "interval": 189, "chunk_tokens": 1}, sinks=8)


@given(case=cases(), max_len=st.integers(1, 350))
@example(case=(EVERY_189, Limit(2, protected=8)), max_len=484)
@settings(max_examples=30, deadline=None)
def test_the_widest_request_is_the_widest_of_all_prompts_at_all_lengths(case, max_len: int) -> None:
    layout, limit = case
    """In the example it is at the second point of a prompt."""
    widest = max(grow(layout, limit, prompt_len, max_len)[2][-1] for prompt_len in range(1, max_len + 1))
    assert widest_under(layout, limit, max_len) == widest


@given(case=cases(), max_len=st.integers(1, 1200), prompt_len=st.integers(1, 1200), data=st.data())
@settings(max_examples=100, deadline=None)
def test_whichever_cuts_a_prefix_hit_leaves_out_the_request_stays_within_its_bound(case, max_len, prompt_len, data):
    layout, limit = case
    plan = plan_eviction(layout, limit, min(prompt_len, max_len), max_len)
    if plan is not None:
        first = plan.window_start(plan.next_cut(0))  # a hit up to here leaves none out
        hit = data.draw(st.integers(first + 1, max_len))
        assert replace(plan, first_window=hit).peak_blocks(max_len) <= plan.uncut_blocks(max_len)


@pytest.mark.parametrize(("max_len", "blocks"), [(2048, 35), (4096, 67), (32768, 515)])
def test_the_widest_request_of_chunked_prompts_is_a_short_one_that_generates(max_len: int, blocks: int) -> None:
    policy = load_policy("kv-compress", ["eviction.schedule.name=end-of-prefill", "eviction.schedule.chunk_tokens=512"])
    assert widest_request(PageLayout.build(policy, 64, 64, torch.float32, num_layers=30), max_len) == blocks


@pytest.mark.parametrize("schedule", ["over-budget", "every-n"])
@pytest.mark.parametrize("chunk_tokens", [0, 1])
def test_a_schedule_with_a_point_at_each_of_131072_tokens_costs_little(schedule: str, chunk_tokens: int) -> None:
    """The bounds leave room for a slow machine: it was 12 s, and 1.6 s."""
    layout = make_layout({"name": schedule, "interval": 1, "chunk_tokens": chunk_tokens})
    start = time.process_time()
    widest = widest_request(layout, 131072)
    assert time.process_time() - start < 1
    plan = policy_plan(layout, 100, 131072)
    assert plan is not None
    start = time.process_time()
    assert plan.peak_blocks(131072) <= widest
    assert time.process_time() - start < 0.1


def test_of_a_request_the_last_generated_token_is_never_cached() -> None:
    layout = make_layout({"name": "end-of-prefill"})
    assert Admission(layout, None, 63, 1, 1024).peak_blocks(1) == layout.blocks_for(63)
    assert Admission(layout, None, 63, 2, 1024).peak_blocks(2) == layout.blocks_for(64)
    assert Admission(layout, None, 63, 5000, 128).peak_blocks(5000) == layout.blocks_for(127)


@given(case=cases(), prompt_len=st.integers(1, 900), max_tokens=st.integers(1, 900), num_blocks=st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_a_refusal_names_a_number_of_tokens_that_fits_and_no_larger_one(case, prompt_len, max_tokens, num_blocks):
    layout, limit = case
    ask = Admission(layout, limit, prompt_len, max_tokens, 1000)
    if ask.fits(num_blocks):
        return
    fitting, reason = ask.most_tokens(num_blocks), ask.refusal(num_blocks)
    assert f"set max_tokens to at most {fitting}" in reason if fitting else "shorten the prompt" in reason
    assert not replace(ask, max_tokens=fitting + 1).fits(num_blocks)
    assert not fitting or replace(ask, max_tokens=fitting).fits(num_blocks)
