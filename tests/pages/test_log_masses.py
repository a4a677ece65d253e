"""Kept tokens that stand for several: a log-mass each, in every softmax over kept pages."""

from __future__ import annotations

import functools

import pytest
import torch

from kvserve.attention.base import Answers, LayerSpec, NewRows, Stored
from kvserve.attention.native import NativeAttention, available_isas
from kvserve.attention.reference import ReferenceAttention
from kvserve.codecs.format import TileFormat
from kvserve.codecs.tile import Tile
from kvserve.pages.kept import Kept, KeptRows, KeptTable, arena_of, kept_page, read_header
from kvserve.pages.layout import PageLayout
from tests.cases.attention_cases import POISON, make_batch, make_policy
from tests.cases.kept_cases import LAYERS, Ask, KeptCase, build_kept_case, grid_rows, with_masses, write_kept

ISAS = available_isas()
FAMILIES = ["int8", "kivi-4", "kivi-2", "boosted"]
DECODE_TOLERANCE = 4e-4  # the decode kernel rounds its factors to integers, of the heaviest tokens most
EXTEND_TOLERANCE = 3e-5

DECODE = (Ask(128, 200, 1, (70, 3, 0, 124)), Ask(0, 70, 1), Ask(64, 64, 1, (60, 17, 1, 40)))
EXTEND = (Ask(128, 200, 70, (70, 3, 0, 124)), Ask(0, 70, 30), Ask(64, 64, 65, (60, 17, 1, 40)))
STEPS = {"decode": (DECODE, DECODE_TOLERANCE), "extend": (EXTEND, EXTEND_TOLERANCE)}


@functools.cache
def weighed_case(family: str, asks: tuple[Ask, ...], mass: float | None = 4.0, **options) -> KeptCase:
    return build_kept_case(make_policy(family, options.pop("tile_tokens", 64)), list(asks), mass=mass, **options)


def sums_of(attention, case: KeptCase, layer: int, r: int, rows: int, power: int = 1, reduce: str = "sum"):
    query = torch.randn(rows, case.spec.num_heads, 64, generator=torch.Generator().manual_seed(5))
    place = Stored(case.arena[:, :, layer], case.batch.block_table[r], case.asks[r].computed, case.kept_of(r))
    return attention.attention_sums(query, place, power, reduce)


# -- where they lie ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_log_masses_lie_behind_every_section_and_nothing_else_moves(family: str):
    policy = make_policy(family)
    plain, weighed = (TileFormat.of(policy.key, policy.value, 64, 64, has_mass) for has_mass in (False, True))
    assert plain.mass is None and (plain.keys, plain.values) == (weighed.keys, weighed.values)
    assert weighed.mass == plain.tile_bytes and weighed.tile_bytes == plain.tile_bytes + 64 * 4
    rows = [Tile.of(torch.randn(64, 64, generator=torch.Generator().manual_seed(i))) for i in (0, 1)]
    page, zeros = weighed.encode_tile(*rows, log_mass=torch.tensor([1.0, 2.5])), weighed.encode_tile(*rows)
    assert torch.equal(page[: weighed.mass], plain.encode_tile(*rows))
    assert weighed.log_mass(page).tolist() == [1.0, 2.5, *[0.0] * 62] and not weighed.log_mass(zeros).any()
    for found, expected in zip(weighed.decode_tile(page), plain.decode_tile(page[: weighed.mass]), strict=True):
        assert torch.equal(found, expected)


def test_pages_have_log_masses_where_the_retention_has():
    policy = make_policy("int8")
    layouts = [PageLayout.build(p, 64, 64, torch.float32, state_blocks=1) for p in (policy, with_masses(policy))]
    assert [layout.tile_format.mass is None for layout in layouts] == [True, False]


# -- reading and writing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", ["int8", "kivi-2"])
def test_written_pages_equal_the_reference(family: str, isa: str):
    case = weighed_case(family, DECODE)
    arenas = [torch.full_like(case.arena, POISON) for _ in range(2)]
    for arena, kind in zip(arenas, (ReferenceAttention, lambda *a: NativeAttention(*a, isa)), strict=True):
        for layer, r in case.chosen:
            write_kept(case, kind(case.layout, case.spec), layer, r, arena)
    assert torch.equal(*arenas)


@pytest.mark.parametrize("isa", ISAS)
def test_log_masses_are_read_back_as_they_were_written(isa: str):
    case = weighed_case("kivi-4", DECODE)
    for (layer, r), written in case.kept_rows.items():
        place = case.arena[:, :, layer], int(case.batch.block_table[r, 0]), case.kept_of(r)
        for attention in (ReferenceAttention(case.layout, case.spec), NativeAttention(case.layout, case.spec, isa)):
            read = attention.read_kept(*place)
            assert all(torch.equal(a, b) for a, b in zip(read.log_mass, written.log_mass, strict=True))
        arena = arena_of(place[0], case.layout)
        for head, masses in enumerate(written.log_mass):
            (run,) = read_header(arena, place[1], head).runs
            if not run.num_tokens:
                continue
            last = kept_page(arena, case.layout, case.kept_of(r), run.first_page + (run.num_tokens - 1) // 64)
            assert not case.layout.tile_format.log_mass(last)[(len(masses) - 1) % 64 + 1 :].any()


def test_log_masses_that_do_not_fit_are_refused_by_name():
    rows = [torch.zeros(3, 64)] * 2
    for mass, log_mass, message in (
        (None, [torch.zeros(3)] * 2, "these pages have no log-masses"),
        (1.0, [torch.zeros(3), torch.zeros(2)], r"log-masses must be float32 \[3\]"),
        (1.0, [torch.zeros(3).double()] * 2, r"log-masses must be float32 \[3\]"),
        (1.0, [torch.zeros(3)], "need rows of 2 KV heads, got 2 and 1"),
    ):
        case = weighed_case("int8", DECODE, mass)
        for kind in (ReferenceAttention, NativeAttention):
            with pytest.raises(ValueError, match=message):
                kind(case.layout, case.spec).write_kept(
                    case.arena.clone()[:, :, 0], 0, case.kept_of(0), [0, 1], KeptRows(rows, rows, log_mass)
                )


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_equals_a_plain_softmax_with_log_masses(family: str, step: str):
    case = weighed_case(family, STEPS[step][0])
    for layer in LAYERS:
        expected = case.expected(layer)
        output, lse = case.run(ReferenceAttention(case.layout, case.spec), layer)
        assert (output - expected[0]).abs().max() <= EXTEND_TOLERANCE and (lse - expected[1]).abs().max() <= 1e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_native_kernels_equal_the_softmax_with_log_masses(family: str, step: str, isa: str):
    asks, tolerance = STEPS[step]
    case = weighed_case(family, asks)
    for layer in LAYERS:
        expected = case.expected(layer)
        output, lse = case.run(NativeAttention(case.layout, case.spec, isa), layer)
        assert (output - expected[0]).abs().max() <= tolerance and (lse - expected[1]).abs().max() <= DECODE_TOLERANCE


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("new", [1, 20])
@pytest.mark.parametrize(("tiles_per_block", "group"), [(1, 1), (2, 8)])
def test_tiles_of_two_panels_and_every_group_size_equal_the_softmax(
    tiles_per_block: int, group: int, new: int, isa: str
):
    asks = (Ask(256, 300, new, (200, 127, 64, 65)), Ask(128, 137, new, (128, 1)))
    case = weighed_case("kivi-2", asks, tile_tokens=128, tiles_per_block=tiles_per_block, group=group)
    for layer in LAYERS:
        output, lse = case.run(NativeAttention(case.layout, case.spec, isa), layer)
        expected = case.expected(layer)
        assert (output - expected[0]).abs().max() <= DECODE_TOLERANCE
        assert (lse - expected[1]).abs().max() <= DECODE_TOLERANCE


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("family", ["int8", "kivi-2", "boosted"])
def test_log_masses_of_zero_change_no_bit(family: str, step: str, isa: str):
    plain, weighed = (weighed_case(family, STEPS[step][0], mass) for mass in (None, 0.0))
    for layer in LAYERS:
        found = [case.run(NativeAttention(case.layout, case.spec, isa), layer) for case in (plain, weighed)]
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
        sums = [sums_of(NativeAttention(case.layout, case.spec, isa), case, layer, 0, 7) for case in (plain, weighed)]
        assert torch.equal(*sums)


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("family", ["int8", "kivi-2"])
def test_attention_sums_are_those_of_a_softmax_with_log_masses(family: str, reduce: str):
    """Probabilities with log-masses are those without, times exp(mass), over their sum."""
    plain, weighed = (weighed_case(family, DECODE, mass) for mass in (None, 4.0))
    for layer in LAYERS:
        bare = sums_of(ReferenceAttention(plain.layout, plain.spec), plain, layer, 0, 1).double()
        masses, sinks = weighed.kept_rows[layer, 0].log_mass, 4
        for head, row in enumerate(bare):
            mass = masses[head // weighed.spec.group].double()
            row[sinks : sinks + len(mass)] *= mass.exp()
        expected = bare / bare.sum(1, keepdim=True)
        kinds = [ReferenceAttention(weighed.layout, weighed.spec)]
        kinds += [NativeAttention(weighed.layout, weighed.spec, isa) for isa in ISAS]
        for attention in kinds:
            found = sums_of(attention, weighed, layer, 0, 1, 1, reduce).double()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("power", "reduce"), [(1, "sum"), (2, "sum"), (1, "max")])
@pytest.mark.parametrize("tile_tokens", [64, 128])
def test_attention_sums_of_many_rows_match_the_reference(tile_tokens: int, power: int, reduce: str, isa: str):
    asks = (Ask(128, 200, 1, (70, 3, 0, 124)), Ask(256, 300, 1, (200, 127, 64, 65)))
    case = weighed_case("boosted", asks, tile_tokens=tile_tokens)
    kinds = NativeAttention(case.layout, case.spec, isa), ReferenceAttention(case.layout, case.spec)
    for layer in LAYERS:
        for r, rows in ((0, 31), (1, 7)):
            found, expected = (sums_of(attention, case, layer, r, rows, power, reduce) for attention in kinds)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("power", [1, 2])
def test_what_tokens_receive_counts_their_log_masses(power: int, isa: str):
    case = weighed_case("kivi-2", DECODE, exact=True)
    for layer in LAYERS:
        found = case.received(NativeAttention(case.layout, case.spec, isa), layer, power, [0, 2])
        expected = case.received(ReferenceAttention(case.layout, case.spec), layer, power, [0, 2])
        for r in (0, 2):
            torch.testing.assert_close(found[r], expected[r], rtol=2e-3, atol=1e-4)


# -- one row for many tokens, and rows in any order -------------------------------------------------------------------


def answer(attention, rows: KeptRows, count: int) -> torch.Tensor:
    """Of three new queries to a request that keeps `rows` of its first 128 tokens, after 130."""
    layout, spec = attention.layout, attention.spec
    pages = 2 * -(-count // 64)
    cells = torch.zeros(12 + pages, 2, 1, layout.cell_bytes, dtype=torch.uint8)[:, :, 0]
    kept = Kept(128, tuple(range(12, 12 + pages)))
    attention.write_kept(cells, 0, kept, [0, pages // 2], rows)
    batch = make_batch(layout, [130, 130], [1, 2], torch.arange(12, dtype=torch.int32).expand(2, -1).contiguous())
    batch.kept = KeptTable.of([kept, kept])
    generator = torch.Generator().manual_seed(7)
    query, key, value = (torch.randn(3, n, 64, generator=generator) for n in (spec.num_heads, 2, 2))
    output = torch.empty_like(query)
    attention.forward(NewRows(query, key, value), cells, batch, Answers(output))
    return output


def both(isa: str) -> list:
    layout = PageLayout.build(with_masses(make_policy("int8", 64, 0)), 64, 64, torch.float32, state_blocks=1)
    spec = LayerSpec(6, 2, 0.5)
    return [NativeAttention(layout, spec, isa), ReferenceAttention(layout, spec)]


@pytest.mark.parametrize("isa", ISAS)
def test_one_row_with_the_log_of_three_answers_as_three_equal_tokens(isa: str):
    generator = torch.Generator().manual_seed(3)
    keys, values = (list(grid_rows(32, 2, 64, generator).unbind(1)) for _ in range(2))
    thrice = KeptRows([k.repeat(3, 1) for k in keys], [v.repeat(3, 1) for v in values])
    merged = KeptRows(keys, values, [torch.full((32,), 3.0).log()] * 2)
    for attention in both(isa):
        found, expected = answer(attention, merged, 32), answer(attention, thrice, 96)
        assert (found - expected).abs().max() <= DECODE_TOLERANCE
        bare = answer(attention, merged._replace(log_mass=None), 32)
        assert (bare - expected).abs().max() > 100 * DECODE_TOLERANCE


@pytest.mark.parametrize("isa", ISAS)
def test_the_order_of_kept_rows_does_not_matter(isa: str):
    generator = torch.Generator().manual_seed(4)
    keys, values = (list(grid_rows(96, 2, 64, generator).unbind(1)) for _ in range(2))
    masses = [2 * torch.rand(96, generator=generator) for _ in range(2)]
    rows = KeptRows(keys, values, masses)
    # Every run of 16 rows has both extremes of every channel, whatever their order, so all codes are exact.
    order = (torch.randperm(6, generator=generator)[:, None] * 16 + torch.randperm(16, generator=generator)).flatten()
    mixed = KeptRows(*([head[order] for head in part] for part in rows[:3]))
    for attention in both(isa):
        assert (answer(attention, mixed, 96) - answer(attention, rows, 96)).abs().max() <= DECODE_TOLERANCE
        unmoved = rows._replace(keys=mixed.keys, values=mixed.values)
        assert (answer(attention, unmoved, 96) - answer(attention, rows, 96)).abs().max() > 10 * DECODE_TOLERANCE
