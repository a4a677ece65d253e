"""What calibration methods fit, against searches, quantiles and codecs that know nothing of them."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvserve.calibration.kmeans import ascending, codebooks, line_levels, nearest_centroid
from kvserve.calibration.methods.base import HalfRows, Method
from kvserve.calibration.methods.cq import Cq
from kvserve.calibration.methods.kvquant import Kvquant, matched
from kvserve.calibration.methods.registry import RECIPES, make_method, method_of
from kvserve.calibration.methods.skvq import Skvq, channel_order
from kvserve.calibration.tables import check_table
from kvserve.codecs.base import Codec
from kvserve.codecs.outliers import Outliers
from kvserve.codecs.table import Table
from kvserve.codecs.tile import Half, Tile, TileShape
from kvserve.codecs.vector import Vector
from kvserve.errors import UnsupportedError

KV_HEADS, TOKENS, HEAD_DIM = 2, 640, 64


@pytest.fixture
def rows() -> torch.Tensor:
    """[kv_heads, tokens, head_dim]: channels differ in range and middle, and one element in 500 is far out."""
    torch.manual_seed(0)
    spread, middle = torch.rand(KV_HEADS, 1, HEAD_DIM) * 3 + 0.2, torch.randn(KV_HEADS, 1, HEAD_DIM) * 2
    found = torch.randn(KV_HEADS, TOKENS, HEAD_DIM) * spread + middle
    return torch.where(torch.rand(found.shape) < 0.002, found * 30, found)


def error(codec: Codec, half: Half, rows: torch.Tensor, tables: dict[str, torch.Tensor]) -> float:
    """Mean squared error of all tiles of all heads, written and read by a codec."""
    shape, total = TileShape(half, 64, HEAD_DIM), 0.0
    for head in range(KV_HEADS):
        own = {name: table[head] if table.dim() > 1 else table for name, table in tables.items()}
        for first in range(0, TOKENS, 64):
            tile = Tile.of(rows[head, first : first + 64])
            decoded = codec.decode(codec.encode(tile, shape, own), shape, own, tile.positions)
            total += float((decoded - tile.rows).square().mean())
    return total


# -- k-means -------------------------------------------------------------------------------------------------------


def split_cost(values: list[float], weights: list[float]) -> float:
    total = sum(weights)
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / total
    return sum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True))


def line_cost(values: torch.Tensor, weights: torch.Tensor, levels: torch.Tensor) -> float:
    distance = (values[:, None] - levels).square().amin(1)
    return float((distance * weights).sum())


def test_levels_of_separate_heaps_are_the_best_there_are() -> None:
    """The cheapest of all ways to cut the sorted values into three."""
    values = torch.tensor([0.0, 0.1, 0.3, 4.0, 4.2, 9.0, 9.1, 9.5])
    weights = torch.tensor([1.0, 3.0, 1.0, 1.0, 5.0, 2.0, 1.0, 1.0])
    levels = line_levels(values, weights, 3)
    v, w = values.tolist(), weights.tolist()
    best = min(
        split_cost(v[:a], w[:a]) + split_cost(v[a:b], w[a:b]) + split_cost(v[b:], w[b:])
        for a, b in itertools.combinations(range(1, len(v)), 2)
    )
    assert line_cost(values, weights, levels) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("num_levels", [4, 8, 16])
def test_levels_stay_where_lloyds_algorithm_leaves_them(num_levels: int) -> None:
    """Each level is the weighted mean of the values nearest to it."""
    torch.manual_seed(3)
    values, weights = torch.randn(4000), torch.rand(4000)
    levels = line_levels(values, weights, num_levels, iterations=2000)
    nearest = (values[:, None] - levels).abs().argmin(1)
    for index in range(num_levels):
        own = nearest == index
        mean = (values[own] * weights[own]).sum() / weights[own].sum()
        assert float(levels[index]) == pytest.approx(float(mean), abs=2e-4)


def test_a_weight_counts_as_copies() -> None:
    torch.manual_seed(4)
    values, counts = torch.randn(300), torch.randint(1, 5, (300,))
    copied = line_levels(values.repeat_interleave(counts), None, 4)
    torch.testing.assert_close(line_levels(values, counts.float(), 4), copied)


def test_values_that_coincide_still_give_ascending_levels() -> None:
    levels = line_levels(torch.tensor([0.5, 0.5, 0.7]), None, 4)
    assert (levels.diff() > 0).all() and levels[0] == 0.5
    bounded = ascending(torch.tensor([-3.0, 0.2, 5.0, 6.0]), 1.0)
    assert (bounded.diff() > 0).all() and bounded[0] == -1 and bounded[-1] == 1
    with pytest.raises(ValueError, match="positive weight"):
        line_levels(torch.ones(3), torch.zeros(3), 2)


def test_codebooks_find_the_places_that_points_come_from() -> None:
    torch.manual_seed(5)
    places = torch.randn(2, 32, 4) * 10
    points = places.repeat(1, 40, 1) + torch.randn(2, 1280, 4) * 0.01
    found = codebooks(points, None, 32, 20, seed=1)
    assert torch.cdist(places, found).amin(2).max() < 0.1 or _cost(points, found) < 1.3 * _cost(points, places)
    assert torch.equal(found, codebooks(points, None, 32, 20, seed=1))
    assert not torch.equal(found, codebooks(points, None, 32, 20, seed=2))


def _cost(points: torch.Tensor, centroids: torch.Tensor) -> float:
    return float(torch.cdist(points, centroids).amin(2).square().mean())


def test_points_without_weight_do_not_move_centroids() -> None:
    torch.manual_seed(6)
    near, far = torch.randn(1, 500, 2), torch.randn(1, 100, 2) + 50
    weights = torch.cat([torch.ones(1, 500), torch.zeros(1, 100)], 1)
    found = codebooks(torch.cat([near, far], 1), weights, 8, 30, seed=0)
    assert found.abs().max() < 6


def test_more_centroids_than_points_are_refused() -> None:
    with pytest.raises(ValueError, match="256 centroids need as many points, got 100"):
        codebooks(torch.randn(1, 100, 4), None, 256, 5, 0)


def test_the_nearest_centroid_is_the_nearest() -> None:
    torch.manual_seed(7)
    points, centroids = torch.randn(3000, 4), torch.randn(256, 4)
    assert torch.equal(nearest_centroid(points, centroids), torch.cdist(points.double(), centroids.double()).argmin(1))


# -- methods -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", sorted(name for name, method in RECIPES.items() if isinstance(method, Method)))
@pytest.mark.parametrize("half", list(Half))
def test_tables_are_what_the_method_announces_and_depend_on_rows_and_seed_alone(recipe, half, rows) -> None:
    method = RECIPES[recipe]
    found = method.fit(half, HalfRows(rows), seed=3)
    again = method.fit(half, HalfRows(rows.clone()), seed=3)
    announced = {table.name: table for table in method.tables(HEAD_DIM) if table.half is half}
    assert found.keys() == announced.keys()
    for name, table in announced.items():
        check_table(name, found[name], table, KV_HEADS)
        assert torch.equal(found[name], again[name])


@pytest.mark.parametrize(
    ("recipe", "codecs"),
    [
        *((f"kvquant-{bits}bit", (Table(bits=bits), Table(bits=bits))) for bits in (2, 3, 4)),
        *((f"cq-{couple}c8b", (Vector(couple=couple), Vector(couple=couple))) for couple in (2, 4, 8)),
    ],
)
def test_codecs_find_every_table_that_they_read(recipe, codecs) -> None:
    made = {(table.half, table.name): (table.axes, table.dtype) for table in RECIPES[recipe].tables(HEAD_DIM)}
    read = {
        (half, name): (spec.axes, spec.dtype)
        for half, codec in zip(Half, codecs, strict=True)
        for name, spec in codec.tables(TileShape(half, 64, HEAD_DIM)).items()
    }
    assert made == read


@pytest.mark.parametrize("half", list(Half))
def test_kvquants_levels_lose_less_than_even_ones(half, rows) -> None:
    method = Kvquant(bits=3)
    tables = method.fit(half, HalfRows(rows), 0)
    codec = Outliers(fraction=0.01, inner=Table(bits=3))
    even = {**tables, "table.levels": torch.linspace(-1, 1, 8)}
    assert error(codec, half, rows, tables) < 0.8 * error(codec, half, rows, even)


def test_ranges_of_keys_leave_half_the_outliers_on_each_side(rows) -> None:
    tables = Kvquant(outliers=0.1).fit(Half.KEY, HalfRows(rows), 0)
    half_range, middle = tables["table.range"].unbind(1)
    for head, channel in ((0, 0), (1, 17)):
        low, high = torch.quantile(rows[head, :, channel], torch.tensor([0.05, 0.95]), interpolation="nearest")
        assert float(middle[head, channel] + half_range[head, channel]) == pytest.approx(float(high), abs=1e-5)
        assert float(middle[head, channel] - half_range[head, channel]) == pytest.approx(float(low), abs=1e-5)


def test_without_outliers_the_range_is_that_of_all_tokens(rows) -> None:
    half_range, middle = Kvquant(outliers=0).fit(Half.KEY, HalfRows(rows), 0)["table.range"].unbind(1)
    torch.testing.assert_close(middle + half_range, rows.amax(1))
    torch.testing.assert_close(middle - half_range, rows.amin(1))


def test_outliers_do_not_spoil_the_levels_of_values(rows) -> None:
    """Elements that the codec stores apart change nothing, however far out they are."""
    wild = torch.where(rows.abs() > 40, rows * 100, rows)
    assert not torch.equal(wild, rows)
    tame, levels = (Kvquant().fit(Half.VALUE, HalfRows(part), 0)["table.levels"] for part in (rows, wild))
    torch.testing.assert_close(tame, levels, rtol=0, atol=0.02)


def test_levels_are_finer_where_errors_count(rows) -> None:
    """Weights on the upper part of every channel's range pull levels there."""
    tables = Kvquant(bits=3, q_norm=False).fit(Half.KEY, HalfRows(rows), 0)
    half_range, middle = tables["table.range"][:, :1], tables["table.range"][:, 1:]
    weights = torch.where((rows - middle) / half_range > 0.3, 100.0, 1.0)
    pulled = Kvquant(bits=3, q_norm=False).fit(Half.KEY, HalfRows(rows, weights), 0)
    assert (pulled["table.levels"] > 0.3).sum() > (tables["table.levels"] > 0.3).sum()
    assert torch.equal(pulled["table.range"], tables["table.range"])


def test_q_norm_keeps_mean_and_deviation() -> None:
    torch.manual_seed(8)
    values = torch.randn(20_000) * 0.2 + 0.1
    levels = line_levels(values, None, 4)
    quantised = lambda table: table[(values[:, None] - levels).abs().argmin(1)]  # noqa: E731
    assert float(quantised(levels).std()) < 0.95 * float(values.std())
    restored = quantised(matched(levels, values))
    assert float(restored.std()) == pytest.approx(float(values.std()), rel=1e-3)
    assert float(restored.mean()) == pytest.approx(float(values.mean()), abs=1e-3)


def test_q_norm_is_for_two_bits_unless_asked_for(rows) -> None:
    def levels(**parameters) -> torch.Tensor:
        return Kvquant(**parameters).fit(Half.VALUE, HalfRows(rows), 0)["table.levels"]

    assert torch.equal(levels(bits=2), levels(bits=2, q_norm=True))
    assert torch.equal(levels(bits=4), levels(bits=4, q_norm=False))
    assert not torch.equal(levels(bits=2), levels(bits=2, q_norm=False))


@pytest.mark.parametrize("couple", [2, 4, 8])
def test_codebooks_beat_those_of_other_channels(couple, rows) -> None:
    tables = Cq(couple=couple, iterations=8).fit(Half.KEY, HalfRows(rows), 0)
    shifted = {"vector.codebook": tables["vector.codebook"].roll(1, 1)}
    codec = Vector(couple=couple)
    assert error(codec, Half.KEY, rows, tables) < 0.2 * error(codec, Half.KEY, rows, shifted)


def test_codes_of_fewer_channels_lose_less(rows) -> None:
    errors = [
        error(Vector(couple=couple), Half.VALUE, rows, Cq(couple=couple).fit(Half.VALUE, HalfRows(rows), 0))
        for couple in (2, 4, 8)
    ]
    assert errors == sorted(errors) and errors[0] < errors[2] / 2


def test_skvq_puts_channels_of_alike_range_together() -> None:
    torch.manual_seed(9)
    spread = torch.tensor([0.1, 10.0]).repeat(HEAD_DIM // 2)[torch.randperm(HEAD_DIM)]
    rows = torch.randn(1, 500, HEAD_DIM) * spread
    order = channel_order(rows, HEAD_DIM // 32, 0)[0].long()
    assert sorted(order.tolist()) == list(range(HEAD_DIM))
    assert set(spread[order[:32]].tolist()) != set(spread[order[32:]].tolist())
    assert len(set(spread[order[:32]].tolist())) == len(set(spread[order[32:]].tolist())) == 1


def test_skvq_clips_where_that_loses_less(rows) -> None:
    """The chosen factors against a direct search in the first group."""
    tables = Skvq().fit(Half.VALUE, HalfRows(rows), 0)
    own = rows[0][:, tables["permutation.order"][0, :32].long()]
    low, high = own.amin(1, keepdim=True), own.amax(1, keepdim=True)

    def loss(clip: float) -> float:
        step = (high - low) * clip / 3
        return float((((own - low * clip) / step).round().clamp(0, 3) * step + low * clip - own).square().sum())

    candidates = [0.5 + 0.05 * step for step in range(11)]
    assert loss(float(tables["affine.clip"][0, 0])) == pytest.approx(min(map(loss, candidates)), rel=1e-5)
    assert 0.5 <= float(tables["affine.clip"].min()) < 1


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("kvquant-5bit", (), "the calibrations are kvquant-2bit"),
        ("kvquant-2bit", ("bits",), "--set takes KEY=VALUE"),
        ("kvquant-2bit", ("centroids=3",), "the keys of kvquant-2bit are"),
        ("kvquant-2bit", ("bits=7",), "bits is 7"),
        ("kvquant-2bit", ("name=cq",), "--set takes KEY=VALUE"),
        ("cq-4c8b", ("couple=many",), "couple is 'many'"),
    ],
)
def test_what_is_no_method_is_refused(recipe, changes, message) -> None:
    with pytest.raises(UnsupportedError, match=message):
        make_method(recipe, changes)


def test_parameters_are_changed_by_their_names() -> None:
    assert make_method("kvquant-2bit", ("outliers=0", "keys=after-rope")) == Kvquant(outliers=0, keys="after-rope")
    assert method_of(make_method("cq-8c8b").model_dump()) == Cq(couple=8)
    with pytest.raises(ValueError, match="couple 8 does not divide head_dim 100"):
        Cq(couple=8).tables(100)
    with pytest.raises(ValueError, match="group_size 64 does not divide head_dim 96"):
        Skvq(group_size=64).tables(96)
