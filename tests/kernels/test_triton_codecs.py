"""Every codec in the Triton kernels against the reference: interpreted on small cases, on a GPU as well."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.cases.attention_cases import Case, build_case, copy_cells, make_policy

pytest.importorskip("triton")
from kvserve.attention.base import Answers, LayerSpec, NewRows, Received, Stored
from kvserve.attention.reference import ReferenceAttention
from kvserve.attention.triton import TritonAttention
from kvserve.codecs.affine import Affine
from kvserve.codecs.registry import CODECS
from kvserve.pages.kept import KeptRows
from kvserve.pages.layout import PageLayout
from kvserve.policies.base import Policy
from tests.cases.codec_cases import CHAINS, KEYS, VALUES
from tests.cases.kept_cases import Ask, build_kept_case, write_kept
from tests.cases.triton_cases import DEVICE, attention_of, batch_on, cells_on, run, run_case

slow = pytest.mark.slow
SMALL = {"num_kv_heads": 2, "group": 2}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
# Keys and values of one page: each kind of codec, and each way to nest them.
FAST = [
    *(("outlier-table-before-rope", "outliers-symmetric"), ("vector-before-rope", "table-3")),
    *(("rank-of-outliers", "affine-channel"), ("affine-boosted", "low-rank"), ("before-rope-part", "vector")),
    ("affine-clipped", "affine-clipped"),
]
REST = [(key, "affine") for key in (*KEYS, *CHAINS)] + [("affine", value) for value in VALUES]
PAIRS = [*FAST, *(pytest.param(*pair, marks=slow) for pair in REST)]


def kinds(policy: Policy) -> set[str]:
    return {stage.name for codec in (policy.key, policy.value) for stage in codec.chain()}


def stored_rows(case: Case, cells: torch.Tensor, request: int) -> list[torch.Tensor]:
    """What is stored of a request after the step."""
    seq_len = int(case.batch.seq_lens[request])
    return list(case.reference.read(Stored(cells, case.batch.block_table[request], seq_len), 0, seq_len))


def check(case: Case) -> None:
    """Output, lse and the arena are the reference's.

    Some codecs sum in another order than it does, and a GPU fuses products and sums: then rare bytes differ, and stand
    for nearly the same rows.
    """
    inexact = kinds(case.layout.policy) & {"low-rank", "symmetric", "vector"}
    tolerance = max(TOLERANCE[case.query.dtype], 1e-4 if inexact else 0)
    allowed = 1e-2 if DEVICE.type == "cuda" else 3e-3 if inexact else 0
    if DEVICE.type == "cpu" and case.layout.dense_dtype == torch.bfloat16 and case.layout.rotates:
        allowed = 2e-2  # the interpreter truncates to bfloat16 where a GPU rounds
    reference = copy_cells(case.cells)
    expected, expected_lse = case.run(case.reference, reference)
    output, lse, cells = run_case(case)
    torch.testing.assert_close(output.float(), expected.float(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=tolerance, atol=tolerance)
    assert (cells != reference).float().mean() <= allowed
    for request in range(case.batch.num_reqs):
        both = (stored_rows(case, arena, request) for arena in (cells, reference))
        for found, rows in zip(*both, strict=True):
            assert (found - rows).norm() <= 5e-3 * rows.norm()


@pytest.mark.parametrize(("key", "value"), PAIRS)
def test_a_step_matches_the_reference(key: str, value: str):
    """Two tiles are sealed and attended to by several rows, and one request decodes."""
    check(build_case(make_policy(f"{key}+{value}"), computed=[63, 140], new_tokens=[66, 1], **SMALL))


def test_the_pairs_cover_every_codec():
    """Codecs that the registry gains need a pair here."""
    assert set().union(*(kinds(make_policy("+".join(pair))) for pair in FAST)) == set(CODECS)
    assert {key for key, _ in REST} >= set(KEYS) and {value for _, value in REST} >= set(VALUES)


@pytest.mark.parametrize(
    ("key", "value", "head_dim", "tile_tokens", "tiles_per_block"),
    [
        ("outlier-table-before-rope", "low-rank", 96, 64, 1),
        *(
            pytest.param(key, value, *geometry, marks=slow)
            for key, value in (*FAST, ("affine-token", "table-2-channel"), ("table-4-token", "outliers"))
            for geometry in ((128, 64, 2), (64, 128, 1), (256, 128, 1))
        ),
    ],
)
def test_other_geometries_match_the_reference(
    key: str, value: str, head_dim: int, tile_tokens: int, tiles_per_block: int
):
    computed, new_tokens = [2 * tile_tokens - 1, 0], [1, tile_tokens + 3]
    policy = make_policy(f"{key}+{value}", tile_tokens, 0 if tiles_per_block > 1 else 4)
    check(build_case(policy, computed=computed, new_tokens=new_tokens, head_dim=head_dim,
                     tiles_per_block=tiles_per_block, **SMALL))  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "dtype"),
    [
        ("rank-of-outliers", "table-3", torch.float16),
        *(
            pytest.param(*pair, dtype, marks=slow)
            for pair in FAST
            for dtype in (torch.float16, torch.bfloat16)
        ),
    ],
)  # fmt: skip
def test_16_bit_models_match_the_reference(key: str, value: str, dtype: torch.dtype):
    check(build_case(make_policy(f"{key}+{value}"), computed=[70, 127], new_tokens=[20, 1], model_dtype=dtype, **SMALL))


@pytest.mark.parametrize(("key", "value"), [FAST[0], FAST[3], *(pytest.param(*pair, marks=slow) for pair in FAST[1:])])
def test_tokens_are_read_as_the_reference_reads_them(key: str, value: str):
    case = build_case(make_policy(f"{key}+{value}"), computed=[150, 40], new_tokens=[1, 1], **SMALL)
    cells, table = cells_on(DEVICE, case.cells), case.batch.block_table.to(DEVICE)
    for first, last in ((0, 150), (62, 66), (5, 5)):
        expected = case.reference.read(Stored(case.cells, case.batch.block_table[0], 150), first, last)
        rows = attention_of(case).read(Stored(cells, table[0], 150), first, last)
        torch.testing.assert_close([row.cpu() for row in rows], list(expected), rtol=1e-5, atol=1e-5)
        alone, nothing = attention_of(case).read(Stored(cells, table[0], 150), first, last, with_values=False)
        assert torch.equal(alone, rows[0]) and nothing is None


@pytest.mark.parametrize("key", ["vector-before-rope", *(pytest.param(key, marks=slow) for key in CHAINS)])
def test_attention_that_tokens_get_is_the_references(key: str):
    """Of several rows over stored keys, and of one in its own step."""
    case = build_case(make_policy(f"{key}+affine"), computed=[150], new_tokens=[1], **SMALL)
    row, query = case.batch.block_table[0], torch.randn(9, 4, 64, generator=torch.Generator().manual_seed(3))
    expected = case.reference.attention_sums(query, Stored(case.cells, row, 150))
    sums = attention_of(case).attention_sums(
        query.to(DEVICE), Stored(cells_on(DEVICE, case.cells), row.to(DEVICE), 150)
    )
    torch.testing.assert_close(sums.cpu(), expected, rtol=2e-5, atol=2e-6)
    received = {}
    for where, attention in (("cpu", case.reference), (DEVICE, attention_of(case))):
        paid = torch.zeros(2, 151, device=where)
        rows = (tensor.to(where) for tensor in (case.query, case.key, case.value))
        cells, batch = cells_on(torch.device(where), case.cells), batch_on(torch.device(where), case.batch)
        attention.forward(NewRows(*rows), cells, batch, Answers(case.query.to(where).clone()), Received(2, {0: paid}))
        received[where] = paid.cpu()
    torch.testing.assert_close(received[DEVICE], received["cpu"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "value"), [("outliers-of-rank", "low-rank"), pytest.param("low-rank", "outliers", marks=slow)]
)
def test_kept_pages_of_an_evicted_request_match_the_reference(key: str, value: str):
    """Codecs without tables: how the pages are placed does not depend on them."""
    case = build_kept_case(make_policy(f"{key}+{value}"), [Ask(128, 200, 1, (70, 3, 0, 124)), Ask(0, 70, 1)], group=2)
    reference, attention = ReferenceAttention(case.layout, case.spec), TritonAttention(case.layout, case.spec)
    query, layer, kept = torch.cat(case.query[2]), 2, case.kept_of(0)
    new = [case.new_rows(rows) for rows in (case.key[layer], case.value[layer])]
    found = run(attention, query, *new, case.arena[:, :, layer], case.batch)[:2]
    torch.testing.assert_close(found, case.run(reference, layer), rtol=1e-5, atol=1e-5)
    place = int(case.batch.block_table[0, 0]), kept
    written, cells = torch.zeros_like(case.arena), cells_on(DEVICE, torch.zeros_like(case.arena)[:, :, layer])
    write_kept(case, reference, layer, 0, written)
    sides = [[rows.to(DEVICE) for rows in side] for side in case.kept_rows[layer, 0][:2]]
    attention.write_kept(cells, *place, case.first_pages[layer, 0], KeptRows(*sides))
    read, expected = attention.read_kept(cells, *place), reference.read_kept(written[:, :, layer], *place)
    for found_rows, rows in zip([*read.keys, *read.values], [*expected.keys, *expected.values], strict=True):
        assert (found_rows.cpu() - rows).norm() <= 5e-3 * rows.norm()


def test_what_lies_between_the_sections_of_a_page_is_zero():
    case = build_case(make_policy("rank-of-outliers+outliers"), computed=[0], new_tokens=[64], **SMALL)
    tile_format, cells = case.layout.tile_format, run_case(case)[2]
    unused = torch.ones(tile_format.tile_bytes, dtype=torch.bool)
    for section, offset in (*tile_format.keys, *tile_format.values):
        unused[offset : offset + section.size_bytes] = False
    page = cells[case.batch.block_table[0, case.layout.tile_row(0)], 0]
    assert unused.any() and not page[unused].any() and page[~unused].any()


def test_far_outliers_are_replaced_by_the_mean_of_the_others():
    """With 8 bits, whatever else they are replaced by has another code."""
    policy = make_policy("outliers+affine")
    policy = policy.model_copy(update={"key": replace(policy.key, inner=Affine(bits=8, group_size=64))})
    case = build_case(policy, computed=[0], new_tokens=[64], **SMALL)
    case.key[5, :, 3], case.key[40:42, :, 11] = 300.0, -250.0
    check(case)


def test_outliers_among_equals_are_the_first_elements():
    case = build_case(make_policy("outliers+affine", sink_tokens=0), computed=[0], new_tokens=[64], **SMALL)
    case.key[:] = 1.0
    cells, layout = run_case(case)[2], case.layout
    place = next(place for place in layout.tile_format.keys if place.section.name == "index")
    for head in range(2):
        page = cells[case.batch.block_table[0, layout.tile_row(0)], head]
        index = page[place.offset :][: place.section.size_bytes].view(torch.int16)
        assert index.tolist() == list(range(len(index)))


@pytest.mark.parametrize("key", ["rank-of-outliers", "outlier-table-before-rope", pytest.param("vector", marks=slow)])
def test_keys_that_are_no_numbers_stay_in_their_page(key: str):
    case = build_case(make_policy(f"{key}+affine", sink_tokens=0), computed=[0], new_tokens=[64], **SMALL)
    case.key[:, :, ::3] = torch.nan
    _, _, cells = run_case(case)
    others = torch.arange(len(cells)) != case.batch.block_table[0, case.layout.tile_row(0)]
    assert torch.equal(cells[others], case.cells[others])


def test_tables_that_are_missing_or_of_another_shape_are_refused_by_name():
    case = build_case(make_policy("table-3+vector"), computed=[0], new_tokens=[1], **SMALL)
    without = {name: table for name, table in case.tables.items() if name != "key.table.levels"}
    with pytest.raises(ValueError, match=r"need a table key\.table\.levels"):
        TritonAttention(case.layout, case.spec, without)
    with pytest.raises(ValueError, match=r"value\.vector\.codebook is torch\.float32 \(1, 8, 256, 8\)"):
        book = case.tables["value.vector.codebook"]
        TritonAttention(case.layout, case.spec, case.tables | {"value.vector.codebook": book[:1]})


def test_tables_on_another_device_are_refused_by_name():
    case = build_case(make_policy("table-3+affine"), computed=[0], new_tokens=[1], **SMALL)
    attention = attention_of(case)
    attention.tables["key.table.levels"] = attention.tables["key.table.levels"].to("meta")
    with pytest.raises(ValueError, match=r"key\.table\.levels is on meta, but cells on"):
        attention.store_sealed(
            cells_on(DEVICE, case.cells), batch_on(DEVICE, case.batch), torch.zeros(0, device=DEVICE)
        )


def test_keys_before_the_rotary_embedding_are_refused_where_requests_can_be_evicted():
    layout = PageLayout.build(make_policy("before-rope+affine"), 64, 64, torch.float32, state_blocks=1)
    with pytest.raises(ValueError, match=r"before-rope.* leave out eviction"):
        TritonAttention(layout, LayerSpec(4, 2, 0.1), build_case(layout.policy, computed=[0], new_tokens=[1]).tables)
