"""The compiled prefill attention against the reference, on arenas that the reference stored."""

from __future__ import annotations

import functools

import pytest
import torch

from kvserve.attention.base import Answers
from kvserve.attention.native import NativeAttention, available_isas
from kvserve.attention.reference import ReferenceAttention
from tests.cases.attention_cases import POISON, Case, build_case, copy_cells, make_batch, make_policy

FAMILIES = ("dense", "dense-pages", "int8", "kivi-4", "kivi-2", "boosted")
ISAS = available_isas()
# What rounding the output to its dtype leaves, on values of order 1.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

pytestmark = pytest.mark.skipif(not ISAS, reason="no kernel library is built")


def attend(attention, case: Case, cells: torch.Tensor, staged: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    output = torch.full_like(case.query, torch.nan)
    lse = torch.full(case.query.shape[:2], torch.nan)
    attention.attend(case.query, cells, case.batch, staged, Answers(output, lse))
    return output, lse


def label(isa: str, message: str) -> str:
    return f"{isa}: {message}"


def check(case: Case, tolerance: float | None = None) -> None:
    """Every instruction set agrees with the reference, in output and lse."""
    tolerance = tolerance or TOLERANCE[case.query.dtype]
    reference = ReferenceAttention(case.layout, case.spec)
    cells = copy_cells(case.cells)
    staged = reference.stage(case.key, case.value).contiguous()
    reference.store_sealed(cells, case.batch, staged)
    expected, expected_lse = attend(reference, case, cells, staged)
    before = cells.clone()
    for isa in ISAS:
        output, lse = attend(NativeAttention(case.layout, case.spec, isa), case, cells, staged)
        torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance, msg=functools.partial(label, isa))
        torch.testing.assert_close(lse, expected_lse, rtol=3e-5, atol=1e-5, msg=functools.partial(label, isa))
        assert torch.equal(cells, before), f"{isa}: attention wrote to the arena"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_prompt_in_one_chunk_matches_the_reference(family):
    check(build_case(make_policy(family), computed=[0], new_tokens=[140], num_kv_heads=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_that_start_and_end_around_a_tile_border_match_the_reference(family):
    case = build_case(
        make_policy(family),
        computed=[0, 63, 64, 65, 2],
        new_tokens=[63, 2, 64, 65, 63],
        num_kv_heads=1,
        group=2,
    )
    check(case)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 160, 256])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_dim_matches_the_reference(family, head_dim):
    check(build_case(make_policy(family), computed=[110], new_tokens=[30], head_dim=head_dim, num_kv_heads=1))


@pytest.mark.parametrize("head_dim", [16, 80, 96])
@pytest.mark.parametrize("family", ["dense", "dense-pages"])
def test_a_dense_head_dim_that_is_not_a_multiple_of_64_matches_the_reference(family, head_dim):
    check(build_case(make_policy(family), computed=[30], new_tokens=[50], head_dim=head_dim))


@pytest.mark.parametrize("group", [1, 3, 8, 32])
@pytest.mark.parametrize("family", ["dense", "dense-pages", "boosted"])
def test_every_gqa_group_size_matches_the_reference(family, group):
    check(build_case(make_policy(family), computed=[100], new_tokens=[40], num_kv_heads=1, group=group))


@pytest.mark.parametrize("tiles_per_block", [1, 2])
@pytest.mark.parametrize("tile_tokens", [64, 128])
@pytest.mark.parametrize("family", ["dense-pages", "int8", "kivi-2", "boosted"])
def test_every_tile_and_block_size_matches_the_reference(family, tile_tokens, tiles_per_block):
    case = build_case(
        make_policy(family, tile_tokens),
        computed=[3 * tile_tokens - 10],
        new_tokens=[30],
        num_kv_heads=1,
        tiles_per_block=tiles_per_block,
    )
    check(case)


@pytest.mark.parametrize("sink_tokens", [0, 1, 33, 63])
@pytest.mark.parametrize("family", ["dense-pages", "kivi-2", "boosted"])
def test_every_number_of_sinks_matches_the_reference(family, sink_tokens):
    policy = make_policy(family, sink_tokens=sink_tokens)
    check(build_case(policy, computed=[50, 130], new_tokens=[30, 5], num_kv_heads=1))


@pytest.mark.parametrize("window", [1, 20, 64, 100, 1000])
@pytest.mark.parametrize("family", ["dense", "dense-pages", "kivi-2"])
def test_a_sliding_window_matches_the_reference(family, window):
    options = {"num_kv_heads": 1, "group": 2, "sliding_window": window}
    check(build_case(make_policy(family), computed=[180, 0], new_tokens=[20, 66], **options))


def test_a_sliding_window_over_tiles_of_128_matches_the_reference():
    check(build_case(make_policy("int8", 128), computed=[250], new_tokens=[50], num_kv_heads=1, sliding_window=90))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_16_bit_models_match_the_reference(family, dtype):
    check(build_case(make_policy(family), computed=[110], new_tokens=[30], num_kv_heads=1, model_dtype=dtype))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_decode_and_extend_rows_matches_the_reference(family):
    # The decode kernel rounds queries to integers over sealed pages: its rows are good to 5e-4.
    check(build_case(make_policy(family), computed=[64, 5, 130, 10], new_tokens=[1, 60, 1, 7], num_kv_heads=1), 5e-4)


def test_strided_query_and_output_rows_match_contiguous_ones():
    case = build_case(make_policy("boosted"), computed=[10], new_tokens=[70])
    attention, cells, staged = stored(case, ISAS[0])
    expected, _ = attend(attention, case, cells, staged)
    tokens, heads, head_dim = case.query.shape
    wide = torch.full((2, tokens, heads + 3, head_dim + 16), torch.nan)
    query, output = wide[:, :, 1:-2, :head_dim]
    query.copy_(case.query)
    attention.attend(query, cells, case.batch, staged, Answers(output))
    assert torch.equal(output, expected)
    assert wide[1].isnan().sum() == wide[1].numel() - expected.numel()


@functools.cache
def whole_prompt(family: str, sliding_window: int | None = None) -> Case:
    policy = make_policy(family)
    return build_case(policy, computed=[0], new_tokens=[200], num_kv_heads=1, group=7, sliding_window=sliding_window)


def stored(case: Case, isa: str) -> tuple[NativeAttention, torch.Tensor, torch.Tensor]:
    """The kernel, and the arena and staged rows it attends over."""
    reference, cells = ReferenceAttention(case.layout, case.spec), copy_cells(case.cells)
    staged = reference.stage(case.key, case.value).contiguous()
    reference.store_sealed(cells, case.batch, staged)
    return NativeAttention(case.layout, case.spec, isa), cells, staged


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("family", FAMILIES)
def test_several_chunks_give_the_same_arena_bytes_and_bitwise_the_same_outputs_as_one(family, window):
    case = whole_prompt(family, window)
    reference = ReferenceAttention(case.layout, case.spec)
    kernels = [NativeAttention(case.layout, case.spec, isa) for isa in ISAS]
    _, whole_cells, staged = stored(case, ISAS[0])
    expected = [attend(kernel, case, whole_cells, staged) for kernel in kernels]
    reference.store_tail(whole_cells, case.batch, staged)
    cells = copy_cells(case.cells)
    results = [(torch.empty_like(output), torch.empty_like(lse)) for output, lse in expected]
    for start, end in ((0, 63), (63, 65), (65, 130), (130, 192), (192, 200)):
        rows = slice(start, end)
        batch = make_batch(case.layout, [start], [end - start], case.batch.block_table)
        part = staged[rows].contiguous()
        reference.store_sealed(cells, batch, part)
        for kernel, (output, lse) in zip(kernels, results, strict=True):
            kernel.attend(case.query[rows], cells, batch, part, Answers(output[rows], lse[rows]))
        reference.store_tail(cells, batch, part)
    for isa, whole, chunked in zip(ISAS, expected, results, strict=True):
        assert torch.equal(chunked[0], whole[0]) and torch.equal(chunked[1], whole[1]), isa
    # Chunks also leave dense tokens of finished tiles in the tail: compare what the single chunk wrote.
    written = whole_cells != POISON
    assert torch.equal(cells[written], whole_cells[written])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_request_gives_bitwise_the_same_outputs_alone_and_in_a_batch(family):
    case = build_case(make_policy(family), computed=[0, 60, 129], new_tokens=[100, 30, 70], num_kv_heads=1)
    native, cells, staged = stored(case, ISAS[0])
    expected, _ = attend(native, case, cells, staged)
    starts = case.batch.query_start_loc.tolist()
    for r in range(case.batch.num_reqs):
        rows = slice(starts[r], starts[r + 1])
        computed = int(case.batch.seq_lens[r]) - (rows.stop - rows.start)
        batch = make_batch(case.layout, [computed], [rows.stop - rows.start], case.batch.block_table[r : r + 1])
        output = torch.empty_like(case.query[rows])
        native.attend(case.query[rows], cells, batch, staged[rows].contiguous(), Answers(output))
        assert torch.equal(output, expected[rows])


@pytest.mark.parametrize("new", [1, 70])
def test_dense_pages_answer_as_the_dense_policy(new):
    computed = [200, 63]
    paged, plain = (
        build_case(make_policy(family), computed=computed, new_tokens=[new, new]) for family in ("dense-pages", "dense")
    )
    plain.query, plain.key, plain.value = paged.query, paged.key, paged.value
    past = make_batch(plain.layout, [0, 0], computed, plain.batch.block_table)
    reference = ReferenceAttention(plain.layout, plain.spec)
    reference.store(torch.cat(paged.past_key), torch.cat(paged.past_value), plain.cells, past)
    for isa in ISAS:
        outputs = [case.run(NativeAttention(case.layout, case.spec, isa))[0] for case in (paged, plain)]
        if new > 1:
            assert torch.equal(*outputs), isa
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-6, msg=functools.partial(label, isa))


def test_scores_far_outside_the_range_of_exp_give_finite_and_correct_outputs():
    case = build_case(make_policy("dense"), computed=[0], new_tokens=[90], num_kv_heads=1)
    case.query *= 300
    check(case, tolerance=1e-3)  # a float32 score of some thousands is itself only good to 1e-4


def test_the_number_of_threads_does_not_change_a_bit_of_the_output():
    case = whole_prompt("kivi-2")
    native, cells, staged = stored(case, ISAS[0])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected, _ = attend(native, case, cells, staged)
        torch.set_num_threads(5)
        output, _ = attend(native, case, cells, staged)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(output, expected)
