"""Decode attention of every built instruction set, against the reference and against a plain softmax."""

from __future__ import annotations

import functools

import pytest
import torch

from kvserve.attention.native import NativeAttention, available_isas
from kvserve.attention.reference import ReferenceAttention
from kvserve.pages.reference import decode_page, hadamard
from tests.cases.attention_cases import Case, build_case, copy_cells, make_batch, make_policy, poisoned_cells
from tests.cases.kept_cases import rotated

ISAS = available_isas()
FAMILIES = ["int8", "kivi-4", "kivi-2", "boosted", "dense-pages"]
LENGTHS = (1, 63, 64, 65, 128, 200)
TOLERANCE = 2e-4


def decode_case(family: str, lengths: tuple[int, ...], tile_tokens: int = 64, sinks: int = 4, **options) -> Case:
    """Requests of `lengths` tokens, the last of which is the query's own."""
    policy = make_policy(family, tile_tokens, sinks)
    return build_case(policy, computed=[n - 1 for n in lengths], new_tokens=[1] * len(lengths), **options)


@functools.cache
def answered_case(*arguments, **options) -> tuple[Case, torch.Tensor, torch.Tensor]:
    """A decode case with the reference's output and lse, shared by the instruction sets."""
    case = decode_case(*arguments, **options)
    return case, *case.run(ReferenceAttention(case.layout, case.spec))


def check(isa: str, *arguments, tolerance: float = TOLERANCE, **options) -> None:
    case, expected, expected_lse = answered_case(*arguments, **options)
    output, lse = case.run(NativeAttention(case.layout, case.spec, isa))
    assert (output.float() - expected.float()).abs().max() <= tolerance
    assert (lse - expected_lse).abs().max() <= TOLERANCE


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 160, 256])
@pytest.mark.parametrize("family", FAMILIES)
def test_decode_matches_the_reference_for_every_codec_and_head_dim(family: str, head_dim: int, isa: str):
    check(isa, family, LENGTHS, head_dim=head_dim)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8, 32])
@pytest.mark.parametrize("family", ["kivi-2", "boosted", "dense-pages", "dense"])
def test_decode_matches_the_reference_for_every_group_size(family: str, group: int, isa: str):
    check(isa, family, (65, 150), group=group, num_kv_heads=1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sinks", [0, 16])
@pytest.mark.parametrize("tiles_per_block", [1, 2])
@pytest.mark.parametrize("tile_tokens", [64, 128])
@pytest.mark.parametrize("family", ["kivi-4", "dense-pages"])
def test_decode_matches_the_reference_in_every_geometry(family, tile_tokens, tiles_per_block, sinks, isa):
    lengths = (1, tile_tokens - 1, tile_tokens, tile_tokens + 1, 3 * tile_tokens + 5)
    check(isa, family, lengths, tile_tokens, sinks, tiles_per_block=tiles_per_block, num_kv_heads=1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", [1, 7, 64, 130])
@pytest.mark.parametrize("family", ["boosted", "int8", "dense-pages", "dense"])
def test_a_sliding_window_hides_older_tokens(family: str, window: int, isa: str):
    check(isa, family, LENGTHS, sliding_window=window)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("head_dim", [64, 80, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["dense", "dense-pages"])
def test_dense_tokens_match_the_reference_in_every_dtype(family: str, dtype: torch.dtype, head_dim: int, isa: str):
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    check(isa, family, (1, 15, 16, 17, 100), head_dim=head_dim, model_dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_models_round_only_the_output(family: str, isa: str):
    check(isa, family, LENGTHS, model_dtype=torch.bfloat16, tolerance=1.6e-2)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", ["kivi-2", "boosted", "dense-pages", "dense"])
def test_contexts_of_several_chunks_merge(family: str, isa: str):
    check(isa, family, (2049, 4200, 70), num_kv_heads=1, group=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_equals_a_plain_softmax_over_the_decoded_tokens(family: str):
    case = decode_case(family, (150,), num_kv_heads=1)
    layout, tiles = case.layout, 2
    sinks, row = layout.policy.sink_tokens, case.batch.block_table[0].tolist()
    staged = ReferenceAttention(case.layout, case.spec).stage(
        torch.cat([case.past_key[0], case.key]), torch.cat([case.past_value[0], case.value])
    )
    key, value = staged[:, 0, 0].clone(), staged[:, 0, 1].clone()
    for tile in range(tiles):
        index = layout.tail_blocks + tile + (layout.sink_blocks if tile else 0)
        page = decode_page(case.cells[row[index], 0][: layout.tile_format.tile_bytes], layout)
        first, last = max(tile * 64, sinks), (tile + 1) * 64
        key[first:last], value[first:last] = (side[first - last :] for side in page)
    scores = case.query[0].double() @ key.double().T * case.spec.scale
    expected = scores.softmax(-1) @ value.double()
    if rotated(layout.policy):
        expected = expected @ hadamard(layout.head_dim).double()
    for isa in ISAS:
        output, lse = case.run(NativeAttention(layout, case.spec, isa))
        assert (output[0] - expected).abs().max() <= TOLERANCE
        assert (lse[0] - scores.logsumexp(-1)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", [*FAMILIES, "dense"])
def test_unused_bytes_never_reach_the_result(family: str, isa: str):
    case = decode_case(family, (1, 65, 130))
    attention = NativeAttention(case.layout, case.spec, isa)
    output, lse = case.run(attention)
    assert output.isfinite().all() and lse.isfinite().all()
    clean = poisoned_cells(case.layout, *case.cells.shape[:2]).zero_()
    past = make_batch(case.layout, [0, 0, 0], [0, 64, 129], case.batch.block_table)
    ReferenceAttention(case.layout, case.spec).store(torch.cat(case.past_key), torch.cat(case.past_value), clean, past)
    assert (clean != case.cells).any()
    assert torch.equal(case.run(attention, clean)[0], output)


@pytest.mark.parametrize("isa", ISAS)
def test_far_apart_scores_do_not_overflow(isa: str):
    case = decode_case("kivi-2", (200,))
    case.query *= 300
    _, expected_lse = case.run(ReferenceAttention(case.layout, case.spec))
    output, lse = case.run(NativeAttention(case.layout, case.spec, isa))
    assert output.isfinite().all()
    assert ((lse - expected_lse).abs() <= 1e-4 * expected_lse.abs()).all()


@functools.cache
def falling_case(family: str, rising: bool) -> tuple[Case, torch.Tensor, torch.Tensor]:
    """Pages whose weights fall (or rise) from 1 to what float32 cannot hold, one for every two nats of it."""
    case = decode_case(family, (22 * 64 + 1,), sinks=0, num_kv_heads=1, group=2)
    depths = torch.tensor([0.0, *range(60, 102, 2)])
    per_element = -(depths.flip(0) if rising else depths) / (64 * case.spec.scale)
    key = 0.01 * case.past_key[0] + per_element.repeat_interleave(64)[:, None, None]
    case.query[:], case.key[:] = 1.0, -100.0
    stored = make_batch(case.layout, [0], [22 * 64], case.batch.block_table)
    ReferenceAttention(case.layout, case.spec).store(key, case.past_value[0], case.cells, stored)
    return case, *case.run(ReferenceAttention(case.layout, case.spec))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rising", [False, True], ids=["falling", "rising"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pages_of_vanishing_weight_add_nothing(family: str, rising: bool, isa: str):
    """A page whose largest weight is 1e-35 must not become NaN where it is scaled up to integers."""
    case, expected, expected_lse = falling_case(family, rising)
    output, lse = case.run(NativeAttention(case.layout, case.spec, isa))
    assert (output - expected).abs().max() <= TOLERANCE
    assert (lse - expected_lse).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", ["boosted", "dense-pages", "dense"])
def test_every_instruction_set_gives_nearly_the_same_result(family: str):
    case = decode_case(family, (300, 77), head_dim=128)
    outputs = [case.run(NativeAttention(case.layout, case.spec, isa))[0] for isa in ISAS]
    for output in outputs[1:]:
        assert (output - outputs[0]).abs().max() <= 2e-5


@pytest.mark.parametrize("isa", ISAS)
def test_decoding_token_by_token_matches_the_reference_through_a_seal(isa: str):
    case = decode_case("kivi-2", (61, 1))
    native, reference = NativeAttention(case.layout, case.spec, isa), ReferenceAttention(case.layout, case.spec)
    cells = {native: copy_cells(case.cells), reference: copy_cells(case.cells)}
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        outputs = [case.run(attention, cells[attention])[0] for attention in (native, reference)]
        assert (outputs[0] - outputs[1]).abs().max() <= TOLERANCE
        case.batch.seq_lens += 1
        case.key = torch.randn(case.key.shape, generator=generator)
        case.value = torch.randn(case.value.shape, generator=generator)
    assert torch.equal(cells[native], cells[reference])
