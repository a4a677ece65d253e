"""Log-masses of kept tokens on the Triton kernels: in every softmax, in pages that are written, read and sealed."""

from __future__ import annotations

import random

import pytest
import torch

from kvserve.attention.base import Stored
from tests.cases.attention_cases import POISON, build_case, copy_cells, make_policy
from tests.cases.kept_cases import LAYERS, Ask, KeptCase, build_kept_case, with_masses, write_kept

pytest.importorskip("triton")
from kvserve.attention.reference import ReferenceAttention
from kvserve.attention.triton import TritonAttention
from kvserve.pages.kept import KeptRows
from tests.cases.triton_cases import DEVICE, batch_on, cells_on, run, run_case

slow = pytest.mark.slow
MASS = 4.0  # the largest log-mass
# Integers in both dots, a half that is decoded to rows, rotated values.
FAMILIES = ["kivi-2", "affine-token+outliers", *(pytest.param(name, marks=slow) for name in ("int8", "boosted"))]
# Evicted with a sealed tile and a tail behind it; evicted at the last token before the step; never evicted.
MIXED = (Ask(128, 200, 1, (70, 3, 0, 124)), Ask(64, 64, 20, (60, 17, 1, 40)), Ask(0, 70, 1))


def kept_case(family: str, asks: tuple[Ask, ...] = MIXED, **options) -> KeptCase:
    tiling = options.pop("tiling", (64, 4))
    return build_kept_case(make_policy(family, *tiling), list(asks), **{"group": 2, "mass": MASS, **options})


def answer(case: KeptCase, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    attention = TritonAttention(case.layout, case.spec)
    key, value = (case.new_rows(rows) for rows in (case.key[layer], case.value[layer]))
    return run(attention, torch.cat(case.query[layer]), key, value, case.arena[:, :, layer], case.batch)[:2]


def moved(rows: KeptRows) -> KeptRows:
    return KeptRows(*([head.to(DEVICE) for head in part] for part in rows[:3]))


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_equals_a_plain_softmax_with_log_masses(family: str):
    case = kept_case(family)
    output, lse = answer(case, 2)
    expected, expected_lse = case.expected(2)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=2e-5)
    bare = kept_case(family, mass=None).expected(2)[0]
    assert (output - bare).abs().amax((1, 2))[:21].min() > 1e-2  # of the two evicted requests


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=slow) for seed in range(1, 6))])
def test_requests_of_random_shapes_answer_as_the_reference(seed: int):
    draw = random.Random(seed)
    size = draw.choice([64, 64, 128])
    asks = []
    for new in (1, draw.randrange(2, 40)):
        end = size * draw.randrange(1, 3)
        counts = tuple(draw.randrange(end - 8) for _ in range(draw.randrange(1, 5)))
        asks.append(Ask(end, end + draw.randrange(2 * size), new, counts))
    case = kept_case(
        draw.choice(["kivi-2", "int8"]), tuple(asks), tiling=(size, draw.choice([0, 1, 4])),
        tiles_per_block=draw.choice([1, 2]), head_dim=draw.choice([64, 96]), group=draw.choice([1, 3]),
    )  # fmt: skip
    for layer in LAYERS:
        found, expected = answer(case, layer), case.run(ReferenceAttention(case.layout, case.spec), layer)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("with_mass", [True, False])
@pytest.mark.parametrize("family", ["kivi-2", "affine-token+outliers"])
def test_written_pages_are_the_references_and_are_read_back(family: str, with_mass: bool):
    case = kept_case(family)
    attention = TritonAttention(case.layout, case.spec)
    for layer, r in case.chosen:
        if not with_mass:
            case.kept_rows[layer, r] = case.kept_rows[layer, r]._replace(log_mass=None)
        expected, rows = torch.full_like(case.arena, POISON), case.kept_rows[layer, r]
        cells = cells_on(DEVICE, expected[:, :, layer])
        write_kept(case, ReferenceAttention(case.layout, case.spec), layer, r, expected)
        rows = moved(rows) if with_mass else KeptRows(*moved(KeptRows(rows.keys, rows.values, []))[:2])
        place = int(case.batch.block_table[r, 0]), case.kept_of(r)
        attention.write_kept(cells, *place, case.first_pages[layer, r], rows)
        whole = torch.empty(0, dtype=torch.uint8).set_(cells_on(torch.device("cpu"), cells).untyped_storage())
        differing = (whole.view_as(expected) != expected).float().mean()
        assert differing <= (1e-2 if DEVICE.type == "cuda" else 0)
        found = attention.read_kept(cells, *place).log_mass
        assert found is not None
        for head, masses in enumerate(found):
            assert torch.equal(masses, rows.log_mass[head] if with_mass else torch.zeros_like(masses))


def test_tiles_are_sealed_with_log_masses_of_zero():
    case = build_case(
        with_masses(make_policy("kivi-2")), computed=[63, 10], new_tokens=[66, 1], num_kv_heads=2, group=2
    )
    reference = copy_cells(case.cells)
    expected = case.run(case.reference, reference)
    output, lse, cells = run_case(case)
    torch.testing.assert_close((output, lse), expected, rtol=0, atol=2e-5)
    page = slice(case.layout.tile_format.mass, case.layout.tile_format.mass + 4 * 64)
    for tile in (0, 1):
        block = case.batch.block_table[0, case.layout.tile_row(tile)]
        assert (case.cells[block, :, page] == POISON).all() and not cells[block, :, page].any()
    if DEVICE.type == "cpu":
        assert torch.equal(cells, reference)


@pytest.mark.parametrize(("power", "reduce"), [(1, "sum"), (2, "max")])
@pytest.mark.parametrize("family", ["kivi-2", pytest.param("affine-token+outliers", marks=slow)])
def test_attention_sums_count_log_masses_as_the_reference_does(family: str, power: int, reduce: str):
    case = kept_case(family)
    reference, attention = ReferenceAttention(case.layout, case.spec), TritonAttention(case.layout, case.spec)
    query = torch.randn(9, case.spec.num_heads, case.layout.head_dim, generator=torch.Generator().manual_seed(3))
    for r, tokens in ((0, 200), (2, 70)):
        cells, row, held = case.arena[:, :, 2], case.batch.block_table[r], (tokens, case.kept_of(r))
        expected = reference.attention_sums(query, Stored(cells, row, *held), power, reduce)
        there = Stored(cells_on(DEVICE, cells), row.to(DEVICE), *held)
        sums = attention.attention_sums(query.to(DEVICE), there, power, reduce)
        torch.testing.assert_close(sums.cpu(), expected, rtol=2e-5, atol=2e-6)


def test_what_tokens_receive_counts_their_log_masses():
    """Keys that the codec represents exactly: they are the same before and after their tile is full."""
    asks = (Ask(128, 200, 1, (70, 3, 0, 124)), Ask(0, 70, 1), Ask(64, 127, 1, (0, 9, 60, 33)))
    case = kept_case("kivi-2", asks, exact=True)
    for power in (1, 2):
        attention = TritonAttention(case.layout, case.spec)
        found = case.received(attention, 2, power, [0, 1, 2], batch_on(DEVICE, case.batch))
        expected = case.received(ReferenceAttention(case.layout, case.spec), 2, power, [0, 1, 2])
        for r in (0, 1, 2):
            torch.testing.assert_close(found[r], expected[r], rtol=1e-3, atol=2e-5)
