"""Budgets against brute force on tiny cases, and their invariants on random ones."""

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.budgets.base import (
    Bounds,
    Budget,
    filled_pages,
    held_counts,
    search_lowest,
    select,
    sort_lowest,
    spread,
)
from kvserve.budgets.global_pages import GlobalPages
from kvserve.budgets.head_classes import HeadClasses
from kvserve.budgets.heads_in_layer import HeadsInLayer
from kvserve.budgets.pyramid import Pyramid
from kvserve.budgets.registry import BUDGETS, budget_class, make_budget
from kvserve.budgets.uniform import Uniform

INF = float("inf")
VARIANTS = [
    Uniform(),
    Pyramid(),
    Pyramid(beta=2),
    HeadsInLayer(),
    HeadsInLayer(floor=0),
    HeadsInLayer(floor=1),
    GlobalPages(),
    GlobalPages(metric="mean"),
    HeadClasses(),
    HeadClasses(whole=((0, 0),)),
    HeadClasses(whole="calibrated").calibrated({"heads.whole": torch.tensor([[1]], dtype=torch.int8)}),
]


def distinct_scores(layers: int, heads: int, n: int, seed: int = 0) -> torch.Tensor:
    """A random permutation of whole numbers: no ties."""
    order = torch.randperm(layers * heads * n, generator=torch.Generator().manual_seed(seed))
    return order.float().reshape(layers, heads, n)


@st.composite
def cases(draw, ragged: bool = True):
    """(scores, page_tokens, total_pages, minimum_pages) that can be met; scores have ties, +inf and empty slots."""
    layers, heads, n = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.randint(-draw(st.sampled_from([2, 1000])), 3, (layers, heads, n), generator=generator).float()
    scores[..., : draw(st.integers(0, 3))] = INF
    if ragged and draw(st.booleans()):
        held = torch.randint(1, n + 1, (layers, heads, 1), generator=generator)
        scores = scores.masked_fill(torch.arange(n) >= held, -INF)
    page_tokens, minimum = draw(st.integers(1, 9)), draw(st.integers(0, 4))
    exist = -(-(scores > -INF).sum(-1) // page_tokens)
    total = draw(st.integers(int(exist.clamp(max=minimum).sum()), int(exist.sum()) + 3))
    return scores, page_tokens, total, minimum


@pytest.mark.parametrize("budget", VARIANTS, ids=repr)
@given(case=cases())
@settings(max_examples=150, deadline=None)
def test_the_total_the_minimum_and_what_exists_are_respected(budget, case):
    scores, page_tokens, total, minimum = case
    untouched = scores.clone()
    pages = budget.allocate(scores, page_tokens, total, minimum)
    exist = -(-(scores > -INF).sum(-1) // page_tokens)
    assert pages.dtype == torch.int64 and pages.shape == scores.shape[:2]
    assert int(pages.sum()) == min(total, int(exist.sum()))
    assert (pages <= exist).all()
    assert (pages >= exist.clamp(max=minimum)).all()
    assert torch.equal(pages, budget.allocate(scores, page_tokens, total, minimum))
    assert torch.equal(scores, untouched)


@pytest.mark.parametrize("budget", VARIANTS, ids=repr)
@given(case=cases(ragged=False))
@settings(max_examples=50, deadline=None)
def test_the_order_of_the_tokens_of_a_head_does_not_matter(budget, case):
    scores, page_tokens, total, minimum = case
    shuffled = torch.stack([torch.stack([head[torch.randperm(len(head))] for head in layer]) for layer in scores])
    expected = budget.allocate(scores, page_tokens, total, minimum)
    assert torch.equal(budget.allocate(shuffled, page_tokens, total, minimum), expected)


@pytest.mark.parametrize("budget", VARIANTS, ids=repr)
def test_a_minimum_that_does_not_fit_is_refused(budget):
    scores = distinct_scores(2, 3, 20)
    assert budget.allocate(scores, 4, 12, 2).tolist() == [[2, 2, 2], [2, 2, 2]]
    with pytest.raises(ValueError, match="11 pages are too few for 2 in each of 6 heads"):
        budget.allocate(scores, 4, 11, 2)


@pytest.mark.parametrize("budget", VARIANTS, ids=repr)
def test_everything_is_kept_when_everything_fits(budget):
    scores = distinct_scores(3, 2, 21)
    assert (budget.allocate(scores, 4, 10**6) == 6).all()


@pytest.mark.parametrize("budget", VARIANTS, ids=repr)
def test_budgets_read_no_more_than_they_say(budget):
    scores = distinct_scores(4, 3, 32)
    pages = budget.allocate(scores, 4, 50, 1)
    if budget.reads == "shape":
        assert torch.equal(budget.allocate(torch.zeros_like(scores), 4, 50, 1), pages)
    changed = scores.clone()
    changed[2, 1] += 1e6
    moved = budget.allocate(changed, 4, 50, 1) != pages
    others = torch.tensor([True, True, False, True])
    assert moved.any() == (budget.reads != "shape" and getattr(budget, "floor", 0) < 1)
    assert moved[others].any() == (budget.reads == "sequence")


def test_uniform_differs_by_at_most_one_page():
    pages = Uniform().allocate(distinct_scores(3, 2, 64), 4, 50, 1)
    assert pages.tolist() == [[9, 9], [8, 8], [8, 8]]


def test_uniform_gives_what_short_heads_cannot_use_to_the_others():
    scores = torch.zeros(1, 3, 40)
    scores[0, 1, 8:] = -INF
    assert Uniform().allocate(scores, 4, 20).tolist() == [[9, 2, 9]]


@given(case=cases(), data=st.data())
@settings(max_examples=200, deadline=None)
def test_spread_moves_no_head_against_the_gap(case, data):
    scores, page_tokens, total, minimum = case
    high = filled_pages(held_counts(scores), page_tokens)
    low = high.clamp(max=minimum)
    bounds = Bounds(low, high, min(total, int(high.sum())))
    numbers = data.draw(st.lists(st.integers(-3, 45), min_size=low.numel(), max_size=low.numel()))
    wanted = torch.tensor(numbers).reshape(low.shape)
    moved = spread(wanted, bounds) - wanted.clamp(low, high)
    assert (moved >= 0).all() or (moved <= 0).all()
    free = (spread(wanted, bounds) != low) & (spread(wanted, bounds) != high)
    assert not free.any() or int(moved[free].max() - moved[free].min()) <= 1  # shared out evenly


def test_spread_gives_odd_pages_to_the_highest_priority():
    bounds = Bounds(torch.zeros(4, dtype=torch.long), torch.full((4,), 9), 6)
    assert spread(torch.ones(4).long(), bounds, torch.tensor([0.1, 0.9, 0.1, 0.9])).tolist() == [1, 2, 1, 2]
    assert spread(torch.ones(4).long(), bounds._replace(total=3), torch.tensor([0.5, 0.1, 0.1, 0.9])).tolist() == [
        1,
        1,
        0,
        1,
    ]


def pyramid_tokens(layers: int, n: int, cap: int, window: int, beta: int) -> list[Fraction]:
    """Tokens per head of each layer, from the description in words."""
    base = cap - window
    if layers == 1 or n < 2 * base:
        return [Fraction(cap)] * layers
    lowest = base // beta
    highest = 2 * base - lowest
    if highest > n - window:
        highest = n - window
        lowest = 2 * base - highest
    return [highest - Fraction(layer * (highest - lowest), layers - 1) + window for layer in range(layers)]


@given(
    layers=st.integers(1, 6),
    heads=st.integers(1, 3),
    n=st.integers(8, 200),
    share=st.floats(0.1, 1),
    page_tokens=st.integers(1, 8),
    minimum=st.integers(0, 2),
    beta=st.integers(1, 30),
)
@settings(max_examples=200, deadline=None)
def test_pyramid_is_the_line_to_within_a_page(layers, heads, n, share, page_tokens, minimum, beta):
    cap = max(int(n * share) // page_tokens, minimum, 1) * page_tokens
    total = layers * heads * cap // page_tokens
    if cap > n:
        return
    pages = Pyramid(beta=beta).allocate(torch.zeros(layers, heads, n), page_tokens, total, minimum)
    line = pyramid_tokens(layers, n, cap, minimum * page_tokens, beta)
    for row, tokens in zip(pages.tolist(), line, strict=True):
        assert abs(sum(row) - heads * tokens / page_tokens) <= 1
        assert max(row) - min(row) <= 1
    by_layer = pages.sum(1)
    assert (by_layer[1:] <= by_layer[:-1]).all()


def test_pyramid_has_the_papers_numbers():
    # 128 tokens per head beyond the window of 8, beta 20: 250 for the first layer, 6 for the last.
    pages = Pyramid(beta=20).allocate(torch.zeros(5, 1, 1000), 1, 5 * 136, 8)
    assert pages.flatten().tolist() == [258, 197, 136, 75, 14]


def test_a_pyramid_of_beta_one_is_uniform():
    scores = torch.zeros(4, 3, 100)
    for total in (48, 50, 77, 123):
        pages = Pyramid(beta=1).allocate(scores, 4, total, 1)
        by_layer = pages.sum(1)
        assert int(by_layer.max() - by_layer.min()) <= 1
    assert torch.equal(Pyramid(beta=1).allocate(scores, 4, 120), Uniform().allocate(scores, 4, 120))


@given(case=cases(), data=st.data())
@settings(max_examples=200, deadline=None)
def test_named_heads_keep_everything_and_the_others_share_the_rest_evenly(case, data):
    scores, page_tokens, total, minimum = case
    places = list(itertools.product(*map(range, scores.shape[:2])))
    whole = data.draw(st.lists(st.sampled_from(places), unique=True))
    pages = HeadClasses(whole=tuple(whole)).allocate(scores, page_tokens, total, minimum)
    high = filled_pages(held_counts(scores), page_tokens)
    low = high.clamp(max=minimum)
    named = torch.zeros(high.shape, dtype=torch.bool)
    for place in whole:
        named[place] = True
    if total >= int(high[named].sum() + low[~named].sum()):
        assert torch.equal(pages[named], high[named])
        free = (~named) & (pages > low) & (pages < high)
        assert not free.any() or int(pages[free].max() - pages[free].min()) <= 1
    else:
        assert torch.equal(pages[~named], low[~named])


def test_head_classes_without_names_are_uniform():
    scores = distinct_scores(3, 2, 64)
    assert torch.equal(HeadClasses().allocate(scores, 4, 50, 1), Uniform().allocate(scores, 4, 50, 1))


def test_named_heads_are_found_in_a_part_of_the_model():
    budget = HeadClasses(whole=((0, 0), (2, 3), (3, 2)))
    assert budget.part([0, 2, 3], range(2, 4)).whole == ((1, 1), (2, 0))
    scores = distinct_scores(4, 4, 64)
    pages = budget.choose(scores, 4, 7 * 16 + 9 * 2, spared=[1]).pages  # the spared layer is whole
    everything = {*budget.whole, *((1, head) for head in range(4))}
    for place in itertools.product(range(4), range(4)):
        assert int(pages[place]) == (16 if place in everything else 2)


def test_heads_that_a_model_lacks_are_refused():
    HeadClasses(whole=((3, 1),)).check(4, 2)
    for place in ((4, 0), (0, 2)):
        with pytest.raises(ValueError, match="the model has the layers 0 to 3 with the KV heads 0 to 1; leave it out"):
            HeadClasses(whole=(place,)).check(4, 2)


def won_tokens(layer: list[list[float]], budget: int) -> list[int]:
    """How many of the `budget` best tokens of a layer each head owns; no ties."""
    best = sorted(((score, head) for head, scores in enumerate(layer) for score in scores), reverse=True)[:budget]
    return [sum(owner == head for _, owner in best) for head in range(len(layer))]


@pytest.mark.parametrize("floor", [0, 0.2, 0.5, 1])
def test_heads_in_layer_with_pages_of_one_token_is_ada_kv(floor):
    scores = distinct_scores(3, 4, 30)
    per_layer = 40
    pages = HeadsInLayer(floor=floor).allocate(scores, 1, 3 * per_layer)
    for layer, row in zip(scores.tolist(), pages.tolist(), strict=True):
        won = won_tokens(layer, per_layer)
        ideal = [(1 - floor) * count + floor * per_layer / 4 for count in won]
        assert sum(row) == per_layer
        assert all(abs(got - want) < 1 for got, want in zip(row, ideal, strict=True))
        assert floor or row == won
        assert all(count >= int(floor * per_layer / 4) for count in row)


def test_heads_in_layer_rounds_to_whole_pages_by_largest_remainder():
    scores = torch.full((1, 3, 20), 0.0)
    scores[0, 0, :11], scores[0, 1, :6], scores[0, 2, :3] = 3.0, 2.0, 1.0
    assert HeadsInLayer(floor=0).allocate(scores, 4, 5).tolist() == [[3, 1, 1]]  # 11/4, 6/4, 3/4


def test_heads_in_layer_with_full_floor_is_uniform():
    scores = distinct_scores(4, 3, 40)
    assert torch.equal(HeadsInLayer(floor=1).allocate(scores, 4, 48), Uniform().allocate(scores, 4, 48))


@pytest.mark.parametrize("budget", [HeadsInLayer(floor=0), GlobalPages(), GlobalPages(metric="mean")], ids=repr)
@given(seed=st.integers(0, 1000), values=st.integers(1, 50), total=st.integers(0, 80))
@settings(max_examples=50, deadline=None)
def test_heads_with_the_same_scores_get_the_same_to_a_page(budget, seed, values, total):
    head = torch.randint(0, values, (37,), generator=torch.Generator().manual_seed(seed)).float()
    pages = budget.allocate(head.expand(3, 4, 37), 5, total)
    rows = pages if budget.reads == "layer" else pages.reshape(1, -1)
    assert all(int(row.max() - row.min()) <= 1 for row in rows)


@pytest.mark.parametrize("budget", [HeadsInLayer(floor=0), HeadsInLayer(), GlobalPages()], ids=repr)
def test_permuting_the_heads_permutes_their_pages(budget):
    scores = distinct_scores(2, 5, 40)
    order = torch.tensor([3, 0, 4, 1, 2])
    pages = budget.allocate(scores, 1, 130)
    assert torch.equal(budget.allocate(scores[:, order], 1, 130), pages[:, order])


def test_permuting_the_layers_permutes_the_global_pages():
    scores = distinct_scores(4, 2, 33)
    pages = GlobalPages().allocate(scores, 4, 30, 1)
    assert torch.equal(GlobalPages().allocate(scores[[2, 0, 3, 1]], 4, 30, 1), pages[[2, 0, 3, 1]])


@pytest.mark.parametrize("metric", ["max", "mean"])
@given(
    n=st.integers(1, 9),
    page_tokens=st.integers(1, 4),
    total=st.integers(0, 12),
    minimum=st.integers(0, 1),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=100, deadline=None)
def test_global_pages_keep_the_most_worth_of_all_divisions(metric, n, page_tokens, total, minimum, seed):
    scores = distinct_scores(2, 2, n, seed) + (0 if metric == "max" else torch.rand(2, 2, n) / 9)
    heads = scores.flatten(0, 1).double().tolist()
    exist = -(-n // page_tokens)
    total = min(max(total, 4 * minimum), 4 * exist)

    def worth(division: tuple[int, ...]) -> float:
        kept = 0.0
        for head, pages in zip(heads, division, strict=True):
            ranked = sorted(head, reverse=True)
            for start in range(0, pages * page_tokens, page_tokens):
                page = ranked[start : start + page_tokens]
                kept += max(page) if metric == "max" else sum(page) / len(page)
        return kept

    divisions = itertools.product(range(minimum, exist + 1), repeat=4)
    best = max(worth(division) for division in divisions if sum(division) == total)
    pages = GlobalPages(metric=metric).allocate(scores, page_tokens, total, minimum)
    assert worth(tuple(pages.flatten().tolist())) == pytest.approx(best)


@given(n=st.integers(1, 40), page_tokens=st.integers(1, 8), kept=st.integers(0, 30), seed=st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_global_pages_are_what_is_left_when_the_cheapest_page_goes_first(n, page_tokens, kept, seed):
    """KV-Compress as described: a head's next page costs the highest score that must go to empty its last page."""
    heads = [sorted(head) for head in distinct_scores(2, 3, n, seed).flatten(0, 1).tolist()]
    total = min(kept, 6 * -(-n // page_tokens))
    while sum(-(-len(head) // page_tokens) for head in heads) > total:
        hang = [len(head) % page_tokens or page_tokens for head in heads]
        costs = [head[h - 1] if head else INF for head, h in zip(heads, hang, strict=True)]
        cheapest = costs.index(min(costs))
        heads[cheapest] = heads[cheapest][hang[cheapest] :]
    pages = GlobalPages().allocate(distinct_scores(2, 3, n, seed), page_tokens, total)
    assert pages.flatten().tolist() == [-(-len(head) // page_tokens) for head in heads]


def test_protected_tokens_win_their_pages():
    scores = distinct_scores(2, 3, 40)
    scores[1, 2, 5:12] = INF
    assert int(GlobalPages().allocate(scores, 4, 12)[1, 2]) >= 2
    assert int(GlobalPages(metric="mean").allocate(scores, 4, 12)[1, 2]) >= 2


@given(
    heads=st.lists(st.lists(st.integers(0, 4), min_size=7, max_size=7), min_size=1, max_size=4),
    data=st.data(),
)
def test_select_keeps_exactly_the_best_and_the_lower_index_of_equals(heads, data):
    kept = data.draw(st.lists(st.integers(0, 7), min_size=len(heads), max_size=len(heads)))
    scores = torch.tensor(heads, dtype=torch.float32)
    chosen = select(scores, torch.tensor(kept), held_counts(scores))
    for head, count, indices in zip(heads, kept, chosen, strict=True):
        ranked = sorted(range(7), key=lambda index: (-head[index], index))
        assert indices.dtype == torch.int64
        assert indices.tolist() == sorted(ranked[:count])


def test_select_refuses_more_than_there_is():
    scores = torch.tensor([[1.0, INF, -INF]])
    held = held_counts(scores)
    assert [index.tolist() for index in select(scores, torch.tensor([2]), held)] == [[0, 1]]
    for count in (3, -1):
        with pytest.raises(ValueError, match=rf"heads with \[2\] tokens cannot keep \[{count}\]"):
            select(scores, torch.tensor([count]), held)


@given(case=cases(), data=st.data())
def test_a_gpu_finds_the_lowest_kept_score_that_a_cpu_finds(case, data):
    scores = case[0].flatten(0, 1)
    counts = [data.draw(st.integers(0, int(held))) for held in held_counts(scores)]
    assert torch.equal(sort_lowest(scores, torch.tensor(counts)[:, None]), search_lowest(scores, counts))


@pytest.mark.parametrize("budget", VARIANTS, ids=repr)
@given(case=cases())
@settings(max_examples=50, deadline=None)
def test_a_choice_fills_each_heads_pages_with_its_best_tokens(budget, case):
    scores, page_tokens, total, _ = case
    held = held_counts(scores)
    total = max(total, held.numel())  # a page for each
    pages, counts, tokens = budget.choose(scores, page_tokens, total)
    assert torch.equal(pages, budget.allocate(scores, page_tokens, total, 1))
    for place in itertools.product(*map(range, pages.shape)):
        ranked = sorted(range(int(held[place])), key=lambda index, head=scores[place]: (-head[index], index))
        best = sorted(ranked[: int(pages[place]) * page_tokens])
        assert tokens[place[0]][place[1]].tolist() == best and counts[place] == len(best)


@pytest.mark.parametrize("budget", VARIANTS, ids=repr)
@given(case=cases(), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_a_score_that_is_no_number_is_the_lowest_there_is(budget, case, seed):
    scores, page_tokens, total, minimum = case
    broken = (torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)) < 0.2) & (scores > -INF)
    lowest, nan = scores.masked_fill(broken, torch.finfo(torch.float32).min), scores.masked_fill(broken, torch.nan)
    expected = budget.allocate(lowest, page_tokens, total, minimum)
    assert torch.equal(budget.allocate(nan, page_tokens, total, minimum), expected)
    total = max(total, held_counts(scores).numel())
    wanted, got = (budget.choose(each, page_tokens, total) for each in (lowest, nan))
    assert torch.equal(got.pages, wanted.pages) and torch.equal(got.counts, wanted.counts)
    for rows in zip(got.tokens, wanted.tokens, strict=True):
        assert all(torch.equal(*heads) for heads in zip(*rows, strict=True))


def test_the_other_heads_keep_what_they_would_beside_a_head_of_low_scores():
    """A NaN sorts before every number: the head that has it must not win with it."""
    scores = distinct_scores(2, 3, 40)
    broken = scores.clone()
    scores[0, 1], broken[0, 1] = -1.0, torch.nan
    wanted, got = (GlobalPages().choose(each, 4, 30) for each in (scores, broken))
    assert torch.equal(got.pages, wanted.pages) and got.pages[0, 1] == 1
    for place in [(0, 0), (0, 2), (1, 0), (1, 1), (1, 2)]:
        assert torch.equal(got.tokens[place[0]][place[1]], wanted.tokens[place[0]][place[1]])


def test_budgets_are_made_by_name():
    assert make_budget({"name": "pyramid", "beta": 5}) == Pyramid(beta=5)
    for name, cls in BUDGETS.items():
        assert budget_class(name) is cls and issubclass(cls, Budget)
    for content in ({"name": "ada-kv"}, {}):
        with pytest.raises(ValueError, match=", ".join(sorted(BUDGETS))):
            make_budget(content)


@pytest.mark.parametrize(
    "content",
    [
        {"name": "pyramid", "beta": 0},
        {"name": "heads-in-layer", "floor": 1.1},
        {"name": "global-pages", "metric": "sum"},
        {"name": "uniform", "beta": 1},
        {"name": "head-classes", "whole": [[0, -1]]},
        {"name": "head-classes", "whole": [[0]]},
    ],
)
def test_parameters_out_of_range_are_refused(content):
    with pytest.raises(ValueError):
        make_budget(content)
