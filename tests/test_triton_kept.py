"""Evicted requests on the Triton kernels: attention over kept pages, writing them, and compaction."""

from __future__ import annotations

import pytest
import torch
from attention_cases import POISON, make_batch, make_policy
from kept_cases import LAYERS, Ask, KeptCase, build_kept_case, write_kept

pytest.importorskip("triton")
from triton_cases import DEVICE, cells_on, run

from kvserve.attention.base import LayerSpec
from kvserve.attention.reference import ReferenceAttention
from kvserve.attention.triton import TritonAttention
from kvserve.pages.kept import Kept, arena_of, kept_page
from kvserve.pages.layout import PageLayout

slow = pytest.mark.slow
FAMILIES = ["kivi-2", *(pytest.param(family, marks=slow) for family in ("int8", "kivi-4", "boosted"))]
TOLERANCE = 5e-6
# Evicted with a sealed tile and a tail behind it; evicted at the last token before the step; never evicted.
MIXED = (Ask(128, 200, 1, (70, 3, 0, 124)), Ask(64, 64, 20, (60, 17, 1, 40)), Ask(0, 70, 1))


def kept_case(family: str, **options) -> KeptCase:
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
    check(kept_case(family), LAYERS[1:])


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
        keys, values = ([rows.to(DEVICE) for rows in side] for side in case.kept_rows[layer, r])
        row = case.batch.block_table[r].to(DEVICE)
        attention.write_kept(cells, row, case.kept_of(r), case.first_pages[layer, r], keys, values)
        assert same_bytes(cells, layer, expected, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_compaction_equals_reading_and_writing_with_the_reference(family: str):
    layout, spec, arena, row = whole_request(family)
    reference, attention = ReferenceAttention(layout, spec), TritonAttention(layout, spec)
    place, first_pages, layer = Kept(128, layout.blocks_for(150), 2), [3, 1], 1
    positions = [torch.arange(4, 128, 2), torch.tensor([5, 66, 127])]
    key, value = reference.read(arena[:, :, layer], row, 0, 128, 150)
    cells = cells_on(DEVICE, arena[:, :, layer])
    kept_rows = [[rows[index] for rows, index in zip(side, positions, strict=True)] for side in (key, value)]
    reference.write_kept(arena[:, :, layer], row, place, first_pages, *kept_rows)
    attention.compact(cells, row.to(DEVICE), place, first_pages, [index.to(DEVICE) for index in positions])
    assert same_bytes(cells, layer, arena, family)


def whole_request(family: str) -> tuple[PageLayout, LayerSpec, torch.Tensor, torch.Tensor]:
    """A request of 150 tokens in one layer of three, and a row of blocks with room for what it will keep."""
    layout = PageLayout.build(make_policy(family), 64, 64, torch.float32, state_blocks=1)
    spec, generator = LayerSpec(4, 2, 0.125), torch.Generator().manual_seed(4)
    row = torch.randperm(layout.blocks_for(150) + 2, generator=generator).int()
    arena = torch.full((len(row), 2, 3, layout.cell_bytes), POISON, dtype=torch.uint8)
    key, value = (torch.randn(150, 2, 64, generator=generator) for _ in range(2))
    ReferenceAttention(layout, spec).store(key, value, arena[:, :, 1], make_batch(layout, [0], [150], row[None]))
    return layout, spec, arena, row


@pytest.mark.parametrize("poison", [0xFF, pytest.param(0x7B, marks=slow)])
def test_the_unused_columns_of_a_page_are_never_visible(poison: int):
    case = kept_case("boosted")
    sections, size = case.layout.sections, case.layout.tile_tokens
    changed = case.arena.clone()
    for (layer, r), chosen in case.chosen.items():
        arena, row = arena_of(changed[:, :, layer], case.layout), case.batch.block_table[r].tolist()
        for first, tokens in zip(case.first_pages[layer, r], chosen, strict=True):
            if used := len(tokens) % size:
                page = kept_page(arena, case.layout, row, case.kept_of(r), first + len(tokens) // size)
                scales = page[sections.value_scales : sections.value_scales + 2 * size]
                scales[2 * used :] = poison  # NaN, or a huge number
    assert (changed != case.arena).any()
    assert torch.equal(answer(case, 2, changed)[0], answer(case, 2)[0])
