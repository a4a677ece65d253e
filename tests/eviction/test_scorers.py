"""Scores against loops in float64 that share no code with the scorers."""

import dataclasses
import math

import pytest
import torch

from kvserve.eviction.collector import received
from kvserve.scorers.accumulated_attention import AccumulatedAttention
from kvserve.scorers.base import LOWEST, Accumulation, LayerView, Scorer, protect
from kvserve.scorers.expected_attention import ExpectedAttention
from kvserve.scorers.key_diff import KeyDiff
from kvserve.scorers.key_norm import KeyNorm
from kvserve.scorers.position import Position
from kvserve.scorers.query_window import PlainWindow
from kvserve.scorers.random import Random
from kvserve.scorers.registry import SCORERS, make_scorer, scorer_class
from kvserve.scorers.rotary import QueryStatistics, Rotary
from kvserve.scorers.window_attention import WindowAttention

HEADS, KV_HEADS, DIM, TOKENS, WINDOW = 6, 2, 8, 13, 4
GROUP = HEADS // KV_HEADS
PLAIN = {"pool": "none", "keep_window": False}
INF = float("inf")


def rotary(interleaved: bool = False, dims: int = DIM) -> Rotary:
    return Rotary(10.0 ** -torch.arange(dims // 2).float(), interleaved)


def make_view(tokens: int = TOKENS, window: int = WINDOW, seed: int = 0, **changes) -> LayerView:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    statistics = QueryStatistics.of(normal(HEADS, 20, DIM) + 1, torch.arange(20), rotary())
    keys, values, scale = normal(KV_HEADS, tokens, DIM), normal(KV_HEADS, tokens, DIM), 0.4
    positions = changes.get("positions", torch.arange(tokens))
    fields = {
        "kv_heads": KV_HEADS,
        "positions": positions,
        "scale": scale,
        "keys": keys,
        "values": values,
        "query_window": PlainWindow(normal(HEADS, window, DIM), keys, positions, scale),
        "accumulated": normal(KV_HEADS, tokens).abs(),
        "query_statistics": statistics,
        "kept_tokens": 6,
        "request_id": "cmpl-1",
    }
    return LayerView(**{**fields, **changes})


def plain_window(view: LayerView) -> PlainWindow:
    assert isinstance(view.query_window, PlainWindow)
    return view.query_window


def with_window(view: LayerView, **changes) -> LayerView:
    """The view with other `queries` or `keys` in its window."""
    return dataclasses.replace(view, query_window=dataclasses.replace(plain_window(view), **changes))


def attention(view: LayerView, head: int, row: int) -> list[float]:
    """Probabilities of one window row, for every cached token."""
    window = plain_window(view)
    at = int(view.positions[-1]) + 1 - window.queries.shape[1] + row
    query = window.queries[head, row].double()
    weights = []
    for token, position in enumerate(view.positions.tolist()):
        dot = float(query @ window.keys[head // GROUP, token].double()) * view.scale
        weights.append(math.exp(dot) if position <= at else 0.0)
    return [weight / sum(weights) for weight in weights]


def reduced(values: list[float], how: str) -> float:
    return {"sum": sum(values), "mean": sum(values) / len(values), "max": max(values)}[how]


def pooled(values: list[float], how: str, kernel: int) -> list[float]:
    if how == "none":
        return values
    half = kernel // 2
    around = [[values[j] for j in range(i - half, i + half + 1) if 0 <= j < len(values)] for i in range(len(values))]
    return [max(near) if how == "max" else sum(near) / kernel for near in around]


def window_oracle(scorer: WindowAttention, view: LayerView) -> list[list[float]]:
    available = plain_window(view).queries.shape[1]
    rows = list(range(max(0, available - scorer.window), available))
    scored = view.num_tokens
    if scorer.keep_window:
        scored = sum(position < view.positions[-1] + 1 - len(rows) for position in view.positions.tolist())
    by_head = []
    for head in range(HEADS):
        probabilities = [attention(view, head, row) for row in rows]
        tokens = [reduced([p[t] ** scorer.exponent for p in probabilities], scorer.reduce) for t in range(scored)]
        by_head.append(pooled(tokens, scorer.pool, scorer.kernel))
    result = []
    for kv_head in range(KV_HEADS):
        members = range(kv_head * GROUP, (kv_head + 1) * GROUP) if scorer.heads == "group" else range(HEADS)
        tokens = [reduced([by_head[h][t] for h in members], scorer.head_reduce) for t in range(scored)]
        result.append(tokens + [INF] * (view.num_tokens - scored))
    return result


def assert_scores(actual: torch.Tensor, expected) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("keep_window", [True, False])
@pytest.mark.parametrize("heads", ["group", "layer"])
@pytest.mark.parametrize("head_reduce", ["mean", "max"])
@pytest.mark.parametrize(("pool", "kernel"), [("none", 1), ("avg", 5), ("max", 3)])
@pytest.mark.parametrize(("reduce", "exponent"), [("mean", 1), ("sum", 2), ("max", 1)])
def test_window_attention_is_softmax_then_power_rows_pool_heads(
    reduce, exponent, pool, kernel, head_reduce, heads, keep_window
):
    scorer = WindowAttention(
        window=3,
        exponent=exponent,
        reduce=reduce,
        pool=pool,
        kernel=kernel,
        heads=heads,
        head_reduce=head_reduce,
        keep_window=keep_window,
    )
    view = make_view()
    assert_scores(scorer.score(view), window_oracle(scorer, view))


def test_window_rows_compare_positions_and_not_slots():
    positions = torch.tensor([0, 1, 2, 5, 7, 8, 11, 12, 14])
    view = make_view(tokens=9, window=4, positions=positions)
    for keep_window in (True, False):
        scorer = WindowAttention(window=4, pool="max", kernel=3, keep_window=keep_window)
        assert_scores(scorer.score(view), window_oracle(scorer, view))


def test_a_row_that_sees_nothing_adds_nothing():
    view = make_view(tokens=2, window=3, positions=torch.tensor([8, 9]))
    scores = WindowAttention(window=3, **PLAIN).score(view)  # the first row stands at 7
    last_rows = with_window(view, queries=plain_window(view).queries[:, 1:])
    assert torch.equal(scores, WindowAttention(window=2, **PLAIN).score(last_rows))


def test_a_window_of_the_whole_prompt_gives_the_column_sums_of_attention():
    view = make_view(window=TOKENS)
    sums = torch.zeros(KV_HEADS, TOKENS, dtype=torch.float64)
    for head in range(HEADS):
        logits = plain_window(view).queries[head].double() @ view.keys[head // GROUP].double().T * view.scale
        sums[head // GROUP] += logits.masked_fill(torch.ones_like(logits).triu(1) > 0, -INF).softmax(-1).sum(0)
    assert_scores(GROUP * WindowAttention(window=TOKENS, **PLAIN).score(view), sums)


def test_a_window_longer_than_the_rows_uses_the_rows_there_are():
    view = make_view(window=3)
    assert torch.equal(WindowAttention(window=64).score(view), WindowAttention(window=3).score(view))
    assert WindowAttention(window=64).score(make_view(tokens=3, window=3)).isposinf().all()


def test_tova_is_a_window_of_one_over_all_heads_of_the_layer():
    view = make_view()
    scores = WindowAttention(window=1, heads="layer", **PLAIN).score(view)
    mean = [sum(attention(view, h, WINDOW - 1)[t] for h in range(HEADS)) / HEADS for t in range(TOKENS)]
    assert_scores(scores, [mean] * KV_HEADS)


def test_permuting_the_tokens_before_an_unpooled_window_permutes_the_scores():
    view = make_view()
    order = torch.cat([torch.randperm(TOKENS - WINDOW), torch.arange(TOKENS - WINDOW, TOKENS)])
    permuted = with_window(view, keys=view.keys[:, order])
    scorer = WindowAttention(window=WINDOW, **PLAIN)
    torch.testing.assert_close(scorer.score(permuted), scorer.score(view)[:, order])


def test_accumulated_attention_keeps_the_recent_share_of_what_is_kept():
    view = make_view(kept_tokens=7)
    scores = AccumulatedAttention().score(view)
    assert_scores(scores[:, :-3], view.accumulated[:, :-3])
    assert scores[:, -3:].isposinf().all()
    assert_scores(AccumulatedAttention(recent_share=0).score(view), view.accumulated)


def test_accumulated_attention_per_row_divides_by_the_rows_that_could_see_the_token():
    view = make_view(tokens=3, positions=torch.tensor([0, 4, 9]), accumulated=torch.full((KV_HEADS, 3), 30.0))
    scores = AccumulatedAttention(recent_share=0, per_row=True).score(view)
    assert_scores(scores, [[30 / 10, 30 / 6, 30 / 1]] * KV_HEADS)


@pytest.mark.parametrize("exponent", [1, 2])
def test_steps_accumulate_to_what_all_rows_pay(exponent):
    view = make_view(window=TOKENS)
    queries, sums = plain_window(view).queries, torch.zeros(KV_HEADS, TOKENS)
    for start, stop in ((0, 1), (1, 6), (6, TOKENS)):
        keys, positions = view.keys[:, :stop], view.positions[:stop]
        window = PlainWindow(queries[:, start:stop], keys, positions, view.scale)
        sums[:, :stop] += received(window, KV_HEADS, Accumulation(exponent))
    expected = [[0.0] * TOKENS for _ in range(KV_HEADS)]
    for head in range(HEADS):
        for row in range(TOKENS):
            for token, share in enumerate(attention(view, head, row)):
                expected[head // GROUP][token] += share**exponent
    assert_scores(sums, expected)


def test_key_norm_prefers_short_keys():
    view = make_view()
    expected = [[-math.sqrt(sum(x * x for x in key)) for key in head] for head in view.keys.double().tolist()]
    assert_scores(KeyNorm().score(view), expected)


def test_key_diff_prefers_keys_unlike_the_mean_direction():
    view = make_view()
    expected = []
    for head in view.keys.double().tolist():
        unit = [[x / math.hypot(*key) for x in key] for key in head]
        mean = [sum(column) / len(unit) for column in zip(*unit, strict=True)]
        expected.append([-sum(a * b for a, b in zip(u, mean, strict=True)) / math.hypot(*mean) for u in unit])
    assert_scores(KeyDiff().score(view), expected)


def test_key_diff_of_zero_keys_is_finite():
    assert KeyDiff().score(make_view(keys=torch.zeros(KV_HEADS, TOKENS, DIM))).isfinite().all()


def rotation_matrix(rope: Rotary, position: int) -> torch.Tensor:
    """One 2 x 2 block per pair of channels, float64 [DIM, DIM]."""
    frequencies = rope.inverse_frequencies.tolist()
    matrix = torch.eye(DIM, dtype=torch.float64)
    for pair, frequency in enumerate(frequencies):
        a, b = (2 * pair, 2 * pair + 1) if rope.interleaved else (pair, pair + len(frequencies))
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = cos, -sin, sin, cos
    return matrix


@pytest.mark.parametrize("rope", [rotary(), rotary(interleaved=True), rotary(dims=4), rotary(True, 4)])
def test_rotary_is_a_rotation_per_pair_of_channels(rope):
    x, positions = torch.randn(3, 5, DIM, dtype=torch.float64), torch.tensor([0, 1, 7, 100, 131072])
    for row, position in enumerate(positions.tolist()):
        expected = x[:, row] @ rotation_matrix(rope, position).T
        torch.testing.assert_close(rope.rotate(x, positions)[:, row], expected)
    torch.testing.assert_close(rope.rotate(rope.rotate(x, positions), -positions), x)
    mean = sum(rotation_matrix(rope, p) for p in range(9, 14)) / 5
    torch.testing.assert_close(rope.mean_rotation(9, 5, DIM).double(), mean, rtol=1e-5, atol=1e-6)


def test_query_statistics_of_chunks_merge_to_those_of_the_whole():
    queries, positions = torch.randn(HEADS, 30, DIM) + 3, torch.arange(4, 34)
    merged = QueryStatistics.of(queries[:, :1], positions[:1], rotary())
    for start, stop in ((1, 9), (9, 11), (11, 30)):
        merged = merged.merge(QueryStatistics.of(queries[:, start:stop], positions[start:stop], rotary()))
    turned_back = [queries[:, i].double() @ rotation_matrix(rotary(), int(p)) for i, p in enumerate(positions)]
    plain = torch.stack(turned_back)  # [rows, heads, head_dim]
    assert merged.count == 30
    torch.testing.assert_close(merged.mean.double(), plain.mean(0), rtol=1e-4, atol=1e-5)
    for head in range(HEADS):
        expected = torch.cov(plain[:, head].T, correction=0)
        torch.testing.assert_close(merged.covariance[head].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("covariance", [True, False])
@pytest.mark.parametrize(("value_norm", "epsilon"), [(True, 0.0), (True, 0.02), (False, 0.0)])
def test_expected_attention_is_the_gaussian_expectation(covariance, value_norm, epsilon):
    view = make_view()
    scorer = ExpectedAttention(future=5, sinks=2, covariance=covariance, value_norm=value_norm, epsilon=epsilon)
    statistics = view.query_statistics
    rotation = sum(rotation_matrix(statistics.rotary, TOKENS + step) for step in range(5)) / 5
    expected = torch.full((KV_HEADS, TOKENS), epsilon, dtype=torch.float64)
    for head in range(HEADS):
        mean = rotation @ statistics.mean[head].double()
        spread = rotation @ statistics.covariance[head].double() @ rotation.T
        weights = []
        for key in view.keys[head // GROUP, 2:].double():
            exponent = view.scale * mean @ key + covariance * view.scale**2 * (key @ spread @ key) / 2
            weights.append(math.exp(exponent))
        expected[head // GROUP, 2:] += torch.tensor(weights, dtype=torch.float64) / sum(weights) / GROUP
    if value_norm:
        expected *= view.values.double().norm(dim=-1)
    expected[:, :2] = INF
    assert_scores(scorer.score(view), expected)


def test_the_gaussian_expectation_is_what_sampled_queries_pay():
    torch.manual_seed(0)
    queries = torch.randn(HEADS, 20000, DIM, dtype=torch.float64) @ torch.randn(DIM, DIM).double() * 0.3 + 0.5
    still = Rotary(torch.zeros(DIM // 2))  # no rotation: the statistics are those of the samples
    view = make_view(query_statistics=QueryStatistics.of(queries, torch.zeros(20000), still))
    paid = (queries @ view.keys.double().repeat_interleave(GROUP, 0).mT * view.scale).exp().mean(1)
    expected = (paid / paid.sum(-1, keepdim=True)).unflatten(0, (KV_HEADS, GROUP)).mean(1)
    scores = ExpectedAttention(sinks=0, value_norm=False).score(view)
    torch.testing.assert_close(scores.double(), expected, rtol=0.1, atol=0.005)


def test_expected_attention_of_a_prompt_of_sinks_keeps_all():
    assert ExpectedAttention(sinks=4).score(make_view(tokens=3)).isposinf().all()


def test_position_keeps_sinks_and_then_the_newest():
    view = make_view(tokens=6, positions=torch.tensor([0, 1, 2, 10, 20, 30]))
    assert Position(sinks=2).score(view).tolist() == [[INF, INF, 2, 10, 20, 30]] * KV_HEADS


def test_random_scores_depend_on_who_and_where_and_nothing_else():
    view = make_view(tokens=200)
    scores = Random().score(view)
    assert torch.equal(scores, Random().score(make_view(tokens=200, seed=9)))
    part = make_view(tokens=50, positions=torch.arange(100, 200, 2))
    assert torch.equal(Random().score(part), scores[:, 100::2])
    second_head = dataclasses.replace(view, kv_heads=1, first_head=1)
    assert torch.equal(Random().score(second_head), scores[1:])
    for other in (
        Random(seed=1).score(view),
        Random().score(dataclasses.replace(view, request_id="cmpl-2")),
        Random().score(dataclasses.replace(view, layer=1)),
        scores.flip(0),
    ):
        assert (other != scores).all()


def test_random_scores_are_uniform_and_uncorrelated():
    scores = Random().score(make_view(tokens=20000)).double()
    assert scores.min() >= 0 and scores.max() < 1
    assert (torch.histc(scores, 10, 0, 1) / scores.numel() - 0.1).abs().max() < 0.005
    for a, b in ((scores[0], scores[1]), (scores[:, 1:], scores[:, :-1])):
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.03


def test_protect_sets_the_ends_and_leaves_its_argument_alone():
    scores = torch.arange(6.0).reshape(1, 6)
    assert protect(scores, 1, 2).tolist() == [[INF, 1, 2, 3, INF, INF]]
    assert scores.isfinite().all()
    assert torch.equal(protect(scores, 0, 0), scores)
    assert protect(scores, 4, 4).isposinf().all() and protect(scores, 0, 99).isposinf().all()
    with pytest.raises(ValueError, match="negative"):
        protect(scores, 0, -1)


@pytest.mark.parametrize("name", sorted(SCORERS))
@pytest.mark.parametrize("tokens", [1, 5, TOKENS])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_scores_are_float32_per_head_and_never_nan_or_minus_infinity(name, tokens, size):
    view = make_view(tokens=tokens, window=min(tokens, WINDOW))
    view = dataclasses.replace(view, keys=view.keys * size, values=view.values * size)
    view = with_window(view, keys=view.keys, queries=plain_window(view).queries * size)
    scores = make_scorer({"name": name}).score(view)
    assert scores.shape == (KV_HEADS, tokens) and scores.dtype == torch.float32
    assert (scores > -INF).all()  # false for nan, too


@pytest.mark.parametrize("damage", [math.nan, INF, 1e30], ids=["nan", "infinite", "too-long"])
@pytest.mark.parametrize("name", [*sorted(SCORERS), "tova"])
def test_keys_that_are_no_numbers_cost_their_own_head_alone(name, damage):
    tova = {"name": "window-attention", "window": 2, "heads": "layer", "pool": "none", "keep_window": False}
    scorer, view = make_scorer(tova if name == "tova" else {"name": name}), make_view()
    keys, accumulated = view.keys.clone(), view.accumulated.clone()
    keys[0, 3] = damage
    accumulated[0, 3] = math.nan
    broken = dataclasses.replace(with_window(view, keys=keys), keys=keys, accumulated=accumulated)
    if name == "tova":  # one score for all heads: that of a layer whose first head pays nothing
        sound = view.query_window.attention(2)[GROUP:].sum(0) / HEADS
        if math.isnan(damage):
            assert_scores(scorer.score(broken)[1], sound)
        return
    scores = scorer.score(broken)
    assert torch.equal(scores[1], scorer.score(view)[1])
    assert (scores > -INF).all(), "every token has a score"


def test_a_key_beyond_all_norms_goes_first():
    view = make_view()
    view.keys[1, 5] = 1e30  # its norm is infinite in float32
    scores = KeyNorm().score(view)
    assert scores[1, 5] == LOWEST == scores.min() and scores[1].argmin() == 5


@pytest.mark.parametrize("name", sorted(SCORERS))
def test_heads_scored_alone_get_the_scores_they_get_together(name):
    view = make_view()
    scores = make_scorer({"name": name}).score(view)
    for head in range(KV_HEADS):
        kv, q = slice(head, head + 1), slice(head * GROUP, (head + 1) * GROUP)
        statistics = view.query_statistics
        alone = dataclasses.replace(
            with_window(view, queries=plain_window(view).queries[q], keys=view.keys[kv]),
            kv_heads=1,
            keys=view.keys[kv],
            values=view.values[kv],
            accumulated=view.accumulated[kv],
            query_statistics=dataclasses.replace(
                statistics, mean=statistics.mean[q], covariance=statistics.covariance[q]
            ),
            first_head=head,
        )
        torch.testing.assert_close(make_scorer({"name": name}).score(alone), scores[kv])


@pytest.mark.parametrize("name", sorted(SCORERS))
def test_needs_are_optional_fields_of_the_view_and_all_that_is_needed(name):
    scorer = make_scorer({"name": name})
    optional = {field.name for field in dataclasses.fields(LayerView) if field.default is None}
    assert scorer.needs <= optional
    scorer.score(make_view(**dict.fromkeys(optional - scorer.needs)))
    for field in scorer.needs:
        with pytest.raises(ValueError, match=field):
            scorer.score(make_view(**{field: None}))


def test_only_scorers_that_read_no_attention_serve_other_questions():
    agnostic = {name for name, cls in SCORERS.items() if cls.query_agnostic}
    assert agnostic == set(SCORERS) - {"window-attention", "accumulated-attention"}


def test_scorers_are_made_by_name():
    assert make_scorer({"name": "window-attention", "window": 8}) == WindowAttention(window=8)
    for name, cls in SCORERS.items():
        assert scorer_class(name) is cls and issubclass(cls, Scorer)
    for content in ({"name": "tova"}, {}):
        with pytest.raises(ValueError, match=", ".join(sorted(SCORERS))):
            make_scorer(content)


@pytest.mark.parametrize(
    "content",
    [
        {"name": "window-attention", "window": 0},
        {"name": "window-attention", "kernel": 4},
        {"name": "window-attention", "exponent": 3},
        {"name": "window-attention", "windows": 8},
        {"name": "accumulated-attention", "recent_share": 1.5},
        {"name": "expected-attention", "future": 0},
        {"name": "position", "sinks": -1},
        {"name": "random", "seed": -1},
    ],
)
def test_parameters_out_of_range_are_refused(content):
    with pytest.raises(ValueError):
        make_scorer(content)


def test_scorers_are_immutable():
    with pytest.raises(ValueError, match="frozen"):
        WindowAttention().window = 1  # type: ignore[misc]
