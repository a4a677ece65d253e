"""Schedules against a simulation that appends one token after the other and cuts by the rule in words."""

from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.schedules.base import Limit, Schedule
from kvserve.schedules.end_of_prefill import EndOfPrefill
from kvserve.schedules.every_n import EveryN
from kvserve.schedules.over_budget import OverBudget
from kvserve.schedules.registry import SCHEDULES, make_schedule, schedule_class

RATES = st.sampled_from([1, 1.33, 2, 4, 7.5, 64])


@st.composite
def cases(draw, schedules=tuple(SCHEDULES)):
    """(schedule, limit, prompt_len)"""
    cls = SCHEDULES[draw(st.sampled_from(schedules))]
    parameters = {"name": cls.model_fields["name"].default, "chunk_tokens": draw(st.integers(0, 20))}
    if "interval" in cls.model_fields:
        parameters["interval"] = draw(st.integers(1, 20))
    protected = draw(st.integers(0, 12))
    if cls.needs_max_tokens or draw(st.booleans()):
        limit = Limit(max_tokens=draw(st.integers(max(protected, 1), 60)), protected=protected)
    else:
        limit = Limit(rate=draw(RATES), protected=protected)
    return make_schedule(parameters), limit, draw(st.integers(1, 90))


def simulate(schedule: Schedule, limit: Limit, prompt_len: int, length: int) -> tuple[list[int], list[int]]:
    """Tokens per head after each of the lengths 0..length, and the lengths at which a rule was applied."""
    held, history, points = 0, [0], []
    for now in range(1, length + 1):
        held += 1
        in_prompt = now == prompt_len or (
            now < prompt_len and schedule.chunk_tokens and now % schedule.chunk_tokens == 0
        )
        if isinstance(schedule, OverBudget):
            assert limit.max_tokens is not None
            due = now > limit.max_tokens if now <= prompt_len else held > limit.max_tokens
            due = bool(due and (in_prompt or now > prompt_len))
            kept = max(limit.max_tokens + 1 - schedule.interval, limit.protected, 1)
        else:
            again = isinstance(schedule, EveryN) and now > prompt_len and (now - prompt_len) % schedule.interval == 0
            due, kept = bool(in_prompt or again), limit.target(now)
        if due:
            points.append(now)
            held = min(held, kept)
        history.append(held)
    return history, points


@given(case=cases())
@settings(max_examples=400, deadline=None)
def test_held_tokens_are_those_of_a_sequence_that_grows_token_by_token(case):
    schedule, limit, prompt_len = case
    history, points = simulate(schedule, limit, prompt_len, 200)
    assert [schedule.held_tokens(limit, prompt_len, length) for length in range(201)] == history
    for length in range(200):
        last = max((point for point in points if point <= length), default=0)
        following = [point - length for point in points if point > length]
        distance = schedule.tokens_to_next_point(limit, prompt_len, length)
        assert schedule.last_point(limit, prompt_len, length) == last
        assert (distance == following[0]) if following else (distance is None or length + distance > 200)


@given(case=cases(), cuts=st.lists(st.integers(1, 40), min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_however_a_sequence_is_cut_into_steps_it_holds_the_same(case, cuts):
    schedule, limit, prompt_len = case
    computed = held = 0
    for new in cuts:
        assert schedule.peak_tokens(limit, prompt_len, computed, new) == held + new
        after = schedule.held_tokens(limit, prompt_len, computed + new)
        assert schedule.compress_now(limit, prompt_len, computed, new) == (after < held + new)
        assert after <= held + new  # a step never brings evicted tokens back
        computed, held = computed + new, after
    assert held == simulate(schedule, limit, prompt_len, computed)[0][-1]


@given(case=cases())
@settings(max_examples=100, deadline=None)
def test_between_points_each_token_adds_one_and_nothing_is_compressed(case):
    schedule, limit, prompt_len = case
    computed = 0
    for _ in range(30):
        distance = schedule.tokens_to_next_point(limit, prompt_len, computed)
        if distance is None:
            return
        assert distance >= 1
        if distance > 1:
            assert not schedule.compress_now(limit, prompt_len, computed, distance - 1)
        computed += distance
        assert schedule.last_point(limit, prompt_len, computed) == computed
        assert schedule.held_tokens(limit, prompt_len, computed) == schedule.kept_at(limit, computed)


@given(case=cases(("end-of-prefill", "every-n")))
@settings(max_examples=100, deadline=None)
def test_no_schedule_keeps_less_than_the_limit_allows(case):
    schedule, limit, prompt_len = case
    for length in range(200):
        assert limit.target(length) <= schedule.held_tokens(limit, prompt_len, length) <= length


@given(case=cases(("every-n",)))
@settings(max_examples=100, deadline=None)
def test_every_n_is_never_an_interval_above_the_limit_once_it_decodes(case):
    schedule, limit, prompt_len = case
    for length in range(prompt_len, 200):
        assert schedule.held_tokens(limit, prompt_len, length) < limit.target(length) + schedule.interval


@given(case=cases(("over-budget",)))
@settings(max_examples=100, deadline=None)
def test_over_budget_never_holds_more_than_its_maximum_once_it_decodes(case):
    schedule, limit, prompt_len = case
    held = [schedule.held_tokens(limit, prompt_len, length) for length in range(prompt_len, 300)]
    assert max(held) <= limit.max_tokens
    assert min(held[-20:]) >= max(limit.max_tokens + 1 - schedule.interval, limit.protected)
    if prompt_len <= limit.max_tokens:
        assert held[0] == prompt_len


@given(case=cases())
@settings(max_examples=100, deadline=None)
def test_chunks_bound_what_a_long_prompt_holds(case):
    schedule, limit, prompt_len = case
    chunk = schedule.chunk_tokens
    for length in range(prompt_len):
        if chunk and limit.max_tokens is not None:
            assert schedule.held_tokens(limit, prompt_len, length) < limit.max_tokens + chunk
        if not chunk:
            assert schedule.held_tokens(limit, prompt_len, length) == length


@pytest.mark.parametrize("name", ["end-of-prefill", "every-n"])
def test_rate_one_never_compresses(name):
    schedule, limit = make_schedule({"name": name, "chunk_tokens": 7}), Limit(rate=1)
    for length in range(300):
        assert schedule.held_tokens(limit, 100, length) == length
        assert not schedule.compress_now(limit, 100, length, 1)


@given(rate=RATES, protected=st.integers(0, 50), length=st.integers(0, 10**6))
def test_the_target_of_a_rate_is_its_share_rounded_up_but_not_below_the_protected(rate, protected, length):
    exact = ceil(Fraction(length) / Fraction(rate))
    target = Limit(rate=rate, protected=protected).target(length)
    assert abs(target - min(length, max(exact, protected))) <= (rate % 1 > 0)


@given(rate=st.floats(1, 100), maximum=st.integers(50, 90), protected=st.integers(0, 50), length=st.integers(0, 5000))
def test_targets_grow_with_the_length_by_at_most_one_per_token(rate, maximum, protected, length):
    for limit in (Limit(rate=rate, protected=protected), Limit(max_tokens=maximum, protected=protected)):
        assert 0 <= limit.target(length + 1) - limit.target(length) <= 1


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({}, "either"),
        ({"rate": 2, "max_tokens": 100}, "either"),
        ({"rate": 0.5}, "at least 1"),
        ({"rate": float("nan")}, "at least 1"),
        ({"rate": float("inf")}, "at least 1"),
        ({"rate": 2, "protected": -1}, "negative"),
        ({"max_tokens": 0}, "0 cached tokens"),
        ({"max_tokens": 63, "protected": 64}, "does not hold the 64 protected"),
    ],
)
def test_limits_that_make_no_sense_are_refused(arguments, part):
    with pytest.raises(ValueError, match=part):
        Limit(**arguments)


def test_over_budget_refuses_a_rate():
    with pytest.raises(ValueError, match="every-n"):
        OverBudget().held_tokens(Limit(rate=4), 10, 20)


def test_schedules_are_made_by_name():
    assert make_schedule({"name": "every-n", "interval": 5}) == EveryN(interval=5)
    for name, cls in SCHEDULES.items():
        assert schedule_class(name) is cls and issubclass(cls, Schedule)
    for content in ({"name": "never"}, {}):
        with pytest.raises(ValueError, match=", ".join(sorted(SCHEDULES))):
            make_schedule(content)


@pytest.mark.parametrize(
    "content",
    [
        {"name": "every-n", "interval": 0},
        {"name": "over-budget", "interval": 0},
        {"name": "end-of-prefill", "interval": 4},
        {"name": "end-of-prefill", "chunk_tokens": -1},
    ],
)
def test_parameters_out_of_range_are_refused(content):
    with pytest.raises(ValueError):
        make_schedule(content)


def test_the_end_of_the_prompt_is_the_only_point_of_end_of_prefill():
    schedule, limit = EndOfPrefill(), Limit(rate=4, protected=8)
    assert [schedule.held_tokens(limit, 100, length) for length in (99, 100, 101, 150)] == [99, 25, 26, 75]
    assert schedule.tokens_to_next_point(limit, 100, 30) == 70
    assert schedule.tokens_to_next_point(limit, 100, 100) is None
    assert schedule.compress_now(limit, 100, 60, 40) and not schedule.compress_now(limit, 100, 60, 39)
