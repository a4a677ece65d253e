"""Evicted requests on the Triton kernels: attention over kept pages, reading and writing them."""

from __future__ import annotations

import pytest
import torch

from kvserve.attention.base import Answers, NewRows, Stored
from tests.cases.attention_cases import POISON, make_policy
from tests.cases.kept_cases import LAYERS, SPARE, Ask, KeptCase, build_kept_case, write_kept

pytest.importorskip("triton")
from kvserve.attention.base import Received
from kvserve.attention.reference import ReferenceAttention
from kvserve.attention.triton import TritonAttention
from kvserve.pages.kept import KeptRows, arena_of, kept_page
from tests.cases.affine_numbers import affine_family
from tests.cases.triton_cases import DEVICE, batch_on, cells_on, run

slow = pytest.mark.slow
FAMILIES = ["kivi-2", "dense-pages", *(pytest.param(family, marks=slow) for family in ("int8", "kivi-4", "boosted"))]
TOLERANCE = 5e-6
# Evicted with a sealed tile and a tail behind it; evicted at the last token before the step; never evicted.
MIXED = (Ask(128, 200, 1, (70, 3, 0, 124)), Ask(64, 64, 20, (60, 17, 1, 40)), Ask(0, 70, 1))


HEAD_DIM = {"kivi-2": 96}  # of cases that ask for none; else 64


def kept_case(family: str, **options) -> KeptCase:
    options = {"head_dim": HEAD_DIM.get(family, 64)} | options
    return build_kept_case(make_policy(family, *options.pop("tiling", (64, 4))), list(MIXED), group=2, **options)


def answer(case: KeptCase, layer: int, arena: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    attention = TritonAttention(case.layout, case.spec)
    query = torch.cat(case.query[layer])
    key, value = (case.new_rows(rows) for rows in (case.key[layer], case.value[layer]))
    cells = (case.arena if arena is None else arena)[:, :, layer]
    return run(attention, query, key, value, cells, case.batch)[:2]


def check(case: KeptCase, layers: tuple[int, ...] = LAYERS) -> None:
    for layer in layers:
        expected, expected_lse = case.expected(layer)
        output, lse = answer(case, layer)
        assert (output - expected).abs().max() <= TOLERANCE
        assert (lse - expected_lse).abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_equals_a_plain_softmax_over_what_each_head_keeps(family: str):
    check(kept_case(family, head_dim=64), LAYERS[1:])


@slow
@pytest.mark.parametrize(("tiling", "tiles_per_block"), [((64, 4), 2), ((128, 16), 1), ((128, 0), 2)])
def test_every_geometry_equals_the_softmax(tiling: tuple[int, int], tiles_per_block: int):
    size = tiling[0]
    asks = [Ask(2 * size, 4 * size + 3, 1, (size + 1, size, 7)), Ask(2 * size, 2 * size + 9, 20, (size - 20, 1))]
    policy = make_policy("kivi-2", *tiling)
    check(build_kept_case(policy, asks, tiles_per_block=tiles_per_block, head_dim=128))


def same_bytes(cells: torch.Tensor, layer: int, expected: torch.Tensor, family: str) -> bool:
    """Whether the arena around a layer's cells is as expected, but for rare ties of rotated values."""
    whole = torch.empty(0, dtype=torch.uint8).set_(cells_on(torch.device("cpu"), cells).untyped_storage())
    assert torch.equal(cells.cpu(), whole.view_as(expected)[:, :, layer])
    return bool((whole.view_as(expected) != expected).float().mean() <= (1e-3 if family == "boosted" else 0))


@pytest.mark.parametrize("family", FAMILIES)
def test_written_pages_and_headers_equal_the_reference(family: str):
    case = kept_case(family)
    attention = TritonAttention(case.layout, case.spec)
    for layer, r in case.chosen:
        expected = torch.full_like(case.arena, POISON)
        cells = cells_on(DEVICE, expected[:, :, layer])
        write_kept(case, ReferenceAttention(case.layout, case.spec), layer, r, expected)
        rows = case.kept_rows[layer, r]
        moved = KeptRows(*([head.to(DEVICE) for head in side] for side in (rows.keys, rows.values)))
        state_block = int(case.batch.block_table[r, 0])
        attention.write_kept(cells, state_block, case.kept_of(r), case.first_pages[layer, r], moved)
        assert same_bytes(cells, layer, expected, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_each_head_keeps_is_read_back_as_the_reference_reads_it(family: str):
    case = kept_case(family)
    for layer, r in case.chosen:
        place = int(case.batch.block_table[r, 0]), case.kept_of(r)
        expected = ReferenceAttention(case.layout, case.spec).read_kept(case.arena[:, :, layer], *place)
        cells = cells_on(DEVICE, case.arena[:, :, layer])
        found = TritonAttention(case.layout, case.spec).read_kept(cells, *place)
        for side, expected_side in zip(found[:2], expected[:2], strict=True):
            torch.testing.assert_close([rows.cpu() for rows in side], expected_side, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("sinks", [4, pytest.param(0, marks=slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_sums_over_what_each_head_holds_equal_the_reference(family: str, sinks: int):
    case = kept_case(family, tiling=(64, sinks))
    reference, attention = ReferenceAttention(case.layout, case.spec), TritonAttention(case.layout, case.spec)
    query = torch.randn(9, case.spec.num_heads, case.layout.head_dim, generator=torch.Generator().manual_seed(3))
    for r, tokens in ((0, 200), (2, 70)):
        cells, row, held = case.arena[:, :, 2], case.batch.block_table[r], (tokens, case.kept_of(r))
        expected = reference.attention_sums(query, Stored(cells, row, *held), 2)
        there = Stored(cells_on(DEVICE, cells), row.to(DEVICE), *held)
        sums = attention.attention_sums(query.to(DEVICE), there, 2)
        torch.testing.assert_close(sums.cpu(), expected, rtol=2e-5, atol=2e-6)


# Evicted or whole, a new token that completes a tile, a head that keeps nothing, several rows, a first token.
RECEIVING = [
    *(Ask(128, 200, 1, (70, 3, 0, 124)), Ask(0, 70, 1), Ask(64, 71, 5, (60, 17))),
    *(Ask(64, 127, 1, (0, 9, 60, 33)), Ask(0, 0, 1)),
]


@pytest.mark.parametrize(("power", "sinks"), [(1, 4), pytest.param(2, 0, marks=slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_tokens_receive_in_a_decode_step_equals_the_reference(family: str, power: int, sinks: int):
    """Keys that the codec represents exactly: they are the same before and after their tile is full."""
    head_dim = HEAD_DIM.get(family, 64)
    case = build_kept_case(make_policy(family, 64, sinks), RECEIVING, head_dim=head_dim, exact=True)
    asked = [0, 1, 3, 4]
    for layer in LAYERS[1:]:
        found = case.received(
            TritonAttention(case.layout, case.spec), layer, power, asked, batch_on(DEVICE, case.batch)
        )
        expected = case.received(ReferenceAttention(case.layout, case.spec), layer, power, asked)
        for r in asked:
            torch.testing.assert_close(found[r], expected[r], rtol=1e-3, atol=2e-5)
            assert (found[r][:, -SPARE:] == 1).all()


def test_sums_of_requests_with_several_rows_and_columns_that_a_table_lacks_are_left_alone():
    case = build_kept_case(make_policy("kivi-2"), RECEIVING)
    attention, batch = TritonAttention(case.layout, case.spec), batch_on(DEVICE, case.batch)
    assert (case.received(attention, 2, 1, [1, 2], batch)[2] == 1).all()
    room = torch.ones(case.spec.num_kv_heads * 50 + 100, device=DEVICE)
    short = room[: case.spec.num_kv_heads * 50].view(-1, 50)
    query = torch.cat(case.query[2]).to(DEVICE)
    key, value = (case.new_rows(rows).to(DEVICE) for rows in (case.key[2], case.value[2]))
    cells, output = case.arena.clone().to(DEVICE)[:, :, 2], torch.empty_like(query)
    attention.forward(NewRows(query, key, value), cells, batch, Answers(output), Received(1, {1: short}))
    attention.forward(NewRows(query, key, value), cells, batch, Answers(output), Received(1, {}))
    assert (short > 1).all() and (room[short.numel() :] == 1).all()


def test_the_probabilities_of_a_kv_heads_queries_sum_to_their_number():
    """Also where the step's token completes a tile, whose keys its query saw as they were."""
    case = build_kept_case(make_policy("kivi-2"), RECEIVING)
    attention, batch = TritonAttention(case.layout, case.spec), batch_on(DEVICE, case.batch)
    for table in case.received(attention, 2, 1, [0, 1, 3, 4], batch).values():
        torch.testing.assert_close((table - 1).sum(1), torch.full((2,), float(case.spec.group)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("poison", [0xFF, pytest.param(0x7B, marks=slow)])
@pytest.mark.parametrize("family", ["boosted", "dense-pages"])
def test_the_unused_columns_of_a_page_are_never_visible(family: str, poison: int):
    case = kept_case(family)
    size = case.layout.tile_tokens
    changed = case.arena.clone()
    for (layer, r), chosen in case.chosen.items():
        arena = arena_of(changed[:, :, layer], case.layout)
        for first, tokens in zip(case.first_pages[layer, r], chosen, strict=True):
            if used := len(tokens) % size:
                page = kept_page(arena, case.layout, case.kept_of(r), first + len(tokens) // size)
                if family == "dense-pages":
                    page[used * case.layout.slot_bytes :] = poison  # NaN, or a huge number
                else:
                    first_scale = affine_family(case.layout.tile_format).value_scales
                    page[first_scale : first_scale + 2 * size][2 * used :] = poison
    assert (changed != case.arena).any()
    assert torch.equal(answer(case, 2, changed)[0], answer(case, 2)[0])
