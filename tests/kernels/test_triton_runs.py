"""Kept tokens in two formats on the Triton kernels: attention over both, reading and writing them."""

from __future__ import annotations

import pytest
import torch

from kvserve.attention.base import Stored

pytest.importorskip("triton")
from kvserve.attention.reference import ReferenceAttention
from kvserve.attention.triton import TritonAttention
from kvserve.pages.kept import KeptRows
from tests.cases.attention_cases import POISON
from tests.cases.kept_cases import SPARE, Ask, KeptCase, build_kept_case, write_kept
from tests.cases.triton_cases import DEVICE, batch_on, cells_on, run
from tests.pages.test_kept_runs import policy_of

# Evicted with a sealed tile and a tail behind it; evicted before the step; never evicted. One row and several.
ASKS = (Ask(320, 392, 1, (300, 3, 0, 316)), Ask(128, 128, 20, (124, 17, 1, 40)), Ask(0, 70, 1))
FORMATS = ["int8, 2 bits", *(pytest.param(name, marks=pytest.mark.slow) for name in ("int8, decoded", "rotated"))]
FORMATS.append(pytest.param("4 bits, 4 and 2", marks=pytest.mark.slow))
LAYER = 2


def case_of(formats: str, asks: tuple[Ask, ...] = ASKS, **options) -> KeptCase:
    tiles = 2 if formats == "4 bits, 4 and 2" else 1
    return build_kept_case(policy_of(formats), list(asks), group=2, tiles_per_block=tiles, **options)


def kernels(case: KeptCase) -> tuple[TritonAttention, ReferenceAttention]:
    return TritonAttention(case.layout, case.spec), ReferenceAttention(case.layout, case.spec)


@pytest.mark.parametrize("formats", FORMATS)
def test_attention_equals_a_softmax_over_both_runs(formats: str) -> None:
    case = case_of(formats)
    rows = [case.new_rows(rows) for rows in (case.key[LAYER], case.value[LAYER])]
    found = run(kernels(case)[0], torch.cat(case.query[LAYER]), *rows, case.arena[:, :, LAYER], case.batch)
    for answer, expected in zip(found, case.expected(LAYER), strict=False):
        assert (answer - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("formats", FORMATS)
def test_written_pages_and_headers_equal_the_reference(formats: str) -> None:
    case = case_of(formats)
    attention, reference = kernels(case)
    for r in (0, 1):
        expected = torch.full_like(case.arena, POISON)
        cells = cells_on(DEVICE, expected[:, :, LAYER])
        write_kept(case, reference, LAYER, r, expected)
        rows = case.kept_rows[LAYER, r]
        moved = KeptRows(*([head.to(DEVICE) for head in side] for side in rows[:2]), runs=rows.runs)
        attention.write_kept(
            cells, int(case.batch.block_table[r, 0]), case.kept_of(r), case.first_pages[LAYER, r], moved
        )
        whole = torch.empty(0, dtype=torch.uint8, device=cells.device).set_(cells.untyped_storage())
        share = (whole.cpu().view_as(expected) != expected).float().mean()
        assert share <= (1e-3 if formats == "rotated" else 0)


@pytest.mark.parametrize("formats", FORMATS)
def test_both_runs_are_read_as_the_reference_reads_them(formats: str) -> None:
    case = case_of(formats)
    attention, reference = kernels(case)
    for r in (0, 1):
        place, cells = (int(case.batch.block_table[r, 0]), case.kept_of(r)), case.arena[:, :, LAYER]
        found, expected = attention.read_kept(cells_on(DEVICE, cells), *place), reference.read_kept(cells, *place)
        assert found.runs == expected.runs == case.kept_rows[LAYER, r].runs
        for side, wanted in zip(found[:2], expected[:2], strict=True):
            for rows, other in zip(side, wanted, strict=True):
                torch.testing.assert_close(rows.cpu(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("formats", FORMATS)
def test_attention_sums_over_both_runs_equal_the_reference(formats: str) -> None:
    case = case_of(formats)
    attention, reference = kernels(case)
    query = torch.randn(9, case.spec.num_heads, 64, generator=torch.Generator().manual_seed(3))
    cells, row, held = case.arena[:, :, LAYER], case.batch.block_table[0], (392, case.kept_of(0))
    found = attention.attention_sums(query.to(DEVICE), Stored(cells_on(DEVICE, cells), row.to(DEVICE), *held), 2)
    expected = reference.attention_sums(query, Stored(cells, row, *held), 2)
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("formats", FORMATS)
def test_what_both_runs_receive_in_a_decode_step_equals_the_reference(formats: str) -> None:
    asks = (Ask(320, 393, 1, (300, 3, 0, 316)), Ask(128, 135, 1, (0, 9, 60, 33)), Ask(0, 70, 1))
    case = case_of(formats, asks)
    attention, reference = kernels(case)
    found = case.received(attention, LAYER, 1, [0, 1, 2], batch_on(DEVICE, case.batch))
    expected = case.received(reference, LAYER, 1, [0, 1, 2])
    for r in found:
        torch.testing.assert_close(found[r], expected[r], rtol=1e-3, atol=2e-5)
        assert (found[r][:, -SPARE:] == 1).all()
