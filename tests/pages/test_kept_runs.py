"""Kept tokens in two formats: where their tiles lie, and attention over them, for every built instruction set."""

from __future__ import annotations

import functools

import pytest
import torch

from kvserve.attention.base import LayerSpec, Stored
from kvserve.attention.native import NativeAttention, available_isas
from kvserve.attention.reference import ReferenceAttention
from kvserve.codecs.affine import Affine
from kvserve.codecs.symmetric import Symmetric
from kvserve.pages.kept import Header, Kept, KeptRows, Run, arena_of, read_header
from kvserve.pages.layout import PageLayout
from kvserve.pages.page_size import MAX_WASTE, page_size
from kvserve.policies.base import Policy
from tests.cases.attention_cases import POISON, make_policy
from tests.cases.kept_cases import (
    LAYERS,
    NUM_LAYERS,
    Ask,
    KeptCase,
    build_kept_case,
    coded,
    demoting,
    rotated,
    run_counts,
    write_kept,
)

ISAS = available_isas()
DECODE = (Ask(128, 200, 1, (70, 3, 0, 124)), Ask(0, 70, 1), Ask(64, 64, 1, (60, 17, 1, 40)))
EXTEND = (Ask(128, 200, 70, (70, 3, 0, 124)), Ask(0, 70, 30), Ask(64, 64, 65, (60, 17, 1, 40)))
MIXED = (Ask(128, 140, 1, (64, 65, 100, 2)), Ask(128, 128, 40, (5, 99)), Ask(0, 30, 1), Ask(0, 0, 66))
LONG = (Ask(7040, 7050, 1, (7000, 6200)), Ask(0, 20, 1))  # more than one chunk of either format
TOLERANCE = 2e-4

# Formats read in integers; one of two decoded; several tiles of both in a page; values rotated.
LOW = {
    "int8, 2 bits": ("int8", Affine(bits=2, group_size=32), Affine(bits=2, group_size=64)),
    "int8, decoded": ("int8", Affine(bits=2, group_size=32, axis="token"), Affine(bits=2, axis="channel")),
    "4 bits, 4 and 2": ("kivi-4", Affine(bits=4, group_size=64), Affine(bits=2, group_size=64)),
    "rotated": ("rotated", Affine(bits=2, group_size=32), Symmetric(bits=2)),
}


def policy_of(formats: str, tile_tokens: int = 64, sinks: int = 4) -> Policy:
    family, key, value = LOW[formats]
    if family == "rotated":
        own = make_policy("int8", tile_tokens, sinks).model_copy(update={"value": Symmetric(bits=8)})
    else:
        own = make_policy(family, tile_tokens, sinks)
    return demoting(own, key, value)


@functools.cache
def case_of(formats: str, asks: tuple[Ask, ...], tile_tokens: int = 64, sinks: int = 4, **options) -> KeptCase:
    options.setdefault("tiles_per_block", 1 if formats != "4 bits, 4 and 2" else 2)  # a page must fit in a strip
    return build_kept_case(policy_of(formats, tile_tokens, sinks), list(asks), **options)


@functools.cache
def answers(*arguments, **options) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    case = case_of(*arguments, **options)
    return {layer: case.expected(layer) for layer in LAYERS}


def check(kernels, *arguments, **options) -> None:
    case, expected = case_of(*arguments, **options), answers(*arguments, **options)
    for layer in LAYERS:
        output, lse = case.run(kernels(case.layout, case.spec), layer)
        assert (output - expected[layer][0]).abs().max() <= TOLERANCE
        assert (lse - expected[layer][1]).abs().max() <= TOLERANCE


def native(isa: str):
    return lambda layout, spec: NativeAttention(layout, spec, isa)


@pytest.mark.parametrize("asks", [DECODE, EXTEND, MIXED], ids=["decode", "extend", "mixed"])
@pytest.mark.parametrize("formats", LOW)
def test_the_reference_equals_a_softmax_over_both_runs(formats: str, asks: tuple[Ask, ...]) -> None:
    check(ReferenceAttention, formats, asks)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("asks", [DECODE, EXTEND, MIXED], ids=["decode", "extend", "mixed"])
@pytest.mark.parametrize("formats", LOW)
def test_native_kernels_equal_a_softmax_over_both_runs(formats: str, asks: tuple[Ask, ...], isa: str) -> None:
    check(native(isa), formats, asks)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("formats", ["int8, 2 bits", "int8, decoded"])
def test_runs_of_several_chunks_merge(formats: str, isa: str) -> None:
    check(native(isa), formats, LONG, group=1, num_kv_heads=1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("new", [1, 20])
@pytest.mark.parametrize(("tile_tokens", "tiles_per_block", "sinks"), [(64, 2, 0), (128, 1, 16), (128, 3, 4)])
def test_every_geometry_equals_the_softmax(tile_tokens: int, tiles_per_block: int, sinks: int, new: int, isa: str):
    asks = (Ask(2 * tile_tokens, 2 * tile_tokens + 9, new, (tile_tokens, tile_tokens + 1, 1)),)
    options = dict(tiles_per_block=tiles_per_block, head_dim=128, group=9)  # more heads than are read at a time
    check(native(isa), "int8, decoded", asks, tile_tokens, sinks, **options)


@pytest.mark.parametrize("formats", LOW)
def test_written_pages_equal_the_references(formats: str) -> None:
    case = case_of(formats, DECODE)
    arenas = [torch.full_like(case.arena, POISON) for _ in range(2)]
    for arena, kernels in zip(arenas, (ReferenceAttention, NativeAttention), strict=True):
        for layer, r in case.chosen:
            write_kept(case, kernels(case.layout, case.spec), layer, r, arena)
    assert (arenas[0] != arenas[1]).float().mean() <= (1e-3 if rotated(case.layout.policy) else 0)


@pytest.mark.parametrize("kernels", [ReferenceAttention, NativeAttention])
@pytest.mark.parametrize("formats", LOW)
def test_each_run_is_read_back_as_its_own_codec_left_it(formats: str, kernels) -> None:
    case = case_of(formats, DECODE)
    attention = kernels(case.layout, case.spec)
    reference = ReferenceAttention(case.layout, case.spec)
    for (layer, r), written in case.kept_rows.items():
        found = attention.read_kept(case.arena[:, :, layer], int(case.batch.block_table[r, 0]), case.kept_of(r))
        assert found.runs == written.runs
        for h, runs in enumerate(written.runs):
            rows = torch.stack([written.keys[h], reference._rotate(written.values[h])], 1)
            expected = coded(rows, case.layout, runs)
            torch.testing.assert_close(found.keys[h], expected[:, 0], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(found.values[h], reference._rotate(expected[:, 1]), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("formats", LOW)
def test_what_is_paid_to_both_runs_matches_the_reference(formats: str, isa: str) -> None:
    case = case_of(formats, DECODE)
    kernels = native(isa)(case.layout, case.spec), ReferenceAttention(case.layout, case.spec)
    for layer in LAYERS:
        for r, ask in enumerate(case.asks[:2]):
            place = Stored(case.arena[:, :, layer], case.batch.block_table[r], ask.computed, case.kept_of(r))
            query = torch.randn(1, case.spec.num_heads, 64, generator=torch.Generator().manual_seed(3))
            found, expected = (attention.attention_sums(query, place) for attention in kernels)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_sums_count_a_heads_tokens_run_by_run() -> None:
    """Against probabilities over the decoded keys: sinks, the first run, the second, later tokens."""
    case = case_of("int8, 2 bits", DECODE)
    reference, sinks, ask = ReferenceAttention(case.layout, case.spec), 4, DECODE[0]
    query = torch.randn(1, case.spec.num_heads, 64, generator=torch.Generator().manual_seed(3))
    place = Stored(case.arena[:, :, 0], case.batch.block_table[0], ask.computed, case.kept_of(0))
    sums = reference.attention_sums(query, place)
    kept = reference.read_kept(case.arena[:, :, 0], int(case.batch.block_table[0, 0]), case.kept_of(0))
    assert kept.runs[0] == run_counts(case.layout, 70) == (23, 47)
    parts = [reference.read(place, *span)[0][0] for span in ((0, sinks), (ask.end, ask.computed))]
    keys = torch.cat([parts[0], kept.keys[0], parts[1]])
    expected = (query[0, :3] @ keys.T * case.spec.scale).softmax(-1)
    torch.testing.assert_close(sums[:3, : len(keys)], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("power", [1, 2])
def test_decode_rows_add_what_both_runs_receive(power: int, isa: str) -> None:
    asks = (Ask(128, 201, 1, (70, 3, 0, 124)), Ask(64, 71, 1, (60, 17, 1, 40)), Ask(6400, 6410, 1, (6396, 6000)))
    case = case_of("int8, 2 bits", asks)
    for layer in LAYERS:
        found = case.received(native(isa)(case.layout, case.spec), layer, power, [0, 1, 2])
        expected = case.received(ReferenceAttention(case.layout, case.spec), layer, power, [0, 1, 2])
        for r in found:
            torch.testing.assert_close(found[r], expected[r], rtol=1e-3, atol=2e-5)


def test_tiles_lie_back_to_back_where_the_numbering_says() -> None:
    """Pages of one 8-bit tile or three of 2 bits; a strip of three layers' cells has three."""
    policy = demoting(make_policy("int8"), Affine(bits=2, group_size=32), Affine(bits=2, group_size=64))
    layout = PageLayout.build(policy, 64, 64, torch.float32, state_blocks=1, num_layers=NUM_LAYERS)
    high, low = (tile_format.tile_bytes for tile_format in layout.formats)
    assert (layout.tiles_per_page(0), layout.tiles_per_page(1)) == (1, 3) and layout.kept_page_bytes == high
    attention = ReferenceAttention(layout, LayerSpec(2, 2, 1.0))
    arena = torch.full((9, 2, NUM_LAYERS, layout.cell_bytes), POISON, dtype=torch.uint8)
    rows = [torch.randn(70 + 260, 64), torch.randn(5, 64)]
    kept, runs = Kept(128, (5, 6)), [(70, 260), (0, 5)]
    attention.write_kept(arena[:, :, 1], 8, kept, [3, 8], KeptRows(rows, rows, runs=runs))
    header = read_header(arena_of(arena[:, :, 1], layout), 8, 0)
    assert header == Header(128, (Run(0, 3, 70), Run(1, 5, 260)))
    strips = arena.flatten(2)
    # Pages 3 and 4 are the first two of the second head's strip, then two pages of five tiles of 2 bits.
    places = [(5, 1, 0, 0), (5, 1, high, 0), *((5, 1, 2 * high + i * low, 1) for i in range(3)),
              *((6, 0, i * low, 1) for i in range(2))]  # fmt: skip
    tiles = [*rows[0][:70].split(64), *rows[0][70:].split(64)]
    for (block, head, offset, number), tile in zip(places, tiles, strict=True):
        data = strips[block, head, offset : offset + layout.formats[number].tile_bytes]
        found = layout.formats[number].decode_tile(data)[0][: len(tile)]
        expected = coded(tile[:, None].expand(-1, 2, -1), layout, (len(tile), 0) if number == 0 else (0, len(tile)))
        assert torch.equal(found, expected[:, 0])
    assert (strips[6, 0, 2 * low : 2 * high] == POISON).all() and (arena[8, :, 1, 56:] == POISON).all()


# -- the size of a page ---------------------------------------------------------------------------------------------


def test_a_page_of_one_format_is_its_tile() -> None:
    assert page_size((4352,)) == (4352, (1,), (0.0,))


@pytest.mark.parametrize(("tile_bytes", "tiles"), [((17152, 6144), (1, 3)), ((4608, 3584), (3, 4))])
def test_the_page_is_the_least_wasteful_of_those_with_the_fewest_tiles(tile_bytes, tiles) -> None:
    found = page_size(tile_bytes)
    assert found.tiles == tiles and found.page_bytes % 64 == 0
    for page in range(max(tile_bytes), found.page_bytes + max(tile_bytes), 64):
        waste = max(page % size / page for size in tile_bytes)
        if page // max(tile_bytes) < tiles[0]:
            assert waste > MAX_WASTE, "with fewer tiles it would not do"
        elif page // max(tile_bytes) == tiles[0]:
            assert waste >= max(found.waste) - 1e-9


def test_a_page_that_no_strip_holds_is_refused() -> None:
    policy = policy_of("4 bits, 4 and 2")
    with pytest.raises(ValueError, match=r"kept pages of 14336 bytes do not fit in the 13824 bytes .* --block-size"):
        PageLayout.build(policy, 64, 64, torch.float32, num_layers=3)
    assert PageLayout.build(policy, 64, 128, torch.float32, num_layers=3).pages_per_strip(3) == 1


def test_formats_that_fit_no_page_are_refused_with_the_waste() -> None:
    with pytest.raises(ValueError, match=r"tiles of 4352, 3904 bytes share no page of which less than 10.3% is"):
        page_size((4352, 3904))
