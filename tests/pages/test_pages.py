"""The page format: packing, the reference codecs, and their error bounds by independent formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.codecs.affine import Affine
from kvserve.codecs.min_max import quantise_min_max
from kvserve.codecs.packing import pack_codes, unpack_codes
from kvserve.codecs.symmetric import Symmetric
from kvserve.codecs.tile import Half, TileShape
from kvserve.pages.head_dims import COMPRESSED_HEAD_DIMS
from kvserve.pages.layout import PageLayout
from kvserve.pages.reference import decode_page, encode_page, hadamard
from kvserve.policies.base import Policy
from tests.cases.affine_numbers import AffineFamily, affine_family
from tests.cases.attention_cases import make_policy

FAMILIES = ["int8", "kivi-4", "kivi-2", "boosted"]


def build(family: str, head_dim: int = 64, tile_tokens: int = 64, dtype: torch.dtype = torch.float32) -> PageLayout:
    return PageLayout.build(make_policy(family, tile_tokens), head_dim, tile_tokens, dtype)


def numbers_of(layout: PageLayout) -> AffineFamily:
    return affine_family(layout.tile_format)


def random_tile(layout: PageLayout, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (layout.tile_tokens, layout.head_dim)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@settings(max_examples=30, deadline=None)
@given(
    bits=st.sampled_from([2, 4, 8]),
    quads=st.integers(1, 10).map(lambda pairs: 2 * pairs),
    blocks=st.sampled_from([0.5, 1, 1.5, 2, 3]),
    seed=st.integers(0, 1000),
)
def test_unpacking_undoes_packing(bits: int, quads: int, blocks: int, seed: int):
    rows, columns = 4 * quads, max(16, int(blocks * 128 / bits) // 16 * 16)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).int()
    packed = pack_codes(codes, bits)
    assert packed.numel() == rows * columns * bits // 8
    assert torch.equal(unpack_codes(packed, bits, rows, columns), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_code_sits_where_the_format_says(bits: int):
    rows, columns, width = 8, 256 // bits, 128 // bits
    for row, column in [(0, 0), (3, 9), (5, columns - 1), (2, width), (4, width - 1)]:
        codes = torch.zeros(rows, columns, dtype=torch.int32)
        codes[row, column] = 1
        packed = pack_codes(codes, bits)
        block, within = divmod(column, width)
        plane, lane = divmod(within, 16)
        byte = ((block * rows // 4 + row // 4) * 16 + lane) * 4 + row % 4
        assert packed[byte] == 1 << (plane * bits)
        assert packed.count_nonzero() == 1


def test_a_folded_half_block_has_the_lower_rows_in_its_right_half():
    rows, columns = 16, 96  # 64 columns fill a block, 32 are left
    for row, column in [(0, 64), (7, 79), (2, 95), (8, 64), (13, 80), (15, 95)]:
        codes = torch.zeros(rows, columns, dtype=torch.int32)
        codes[row, column] = 3
        packed = pack_codes(codes, 2)
        plane, lane = divmod(column - 64, 16)
        folded_row = row % 8
        byte = rows * 16 + (folded_row // 4 * 16 + lane) * 4 + folded_row % 4
        assert packed[byte] == 3 << 2 * (plane + (2 if row >= 8 else 0))
        assert packed.count_nonzero() == 1


@pytest.mark.parametrize("head_dim", [64, 96, 128, 160, 256])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoded_key_is_within_half_a_step_of_its_group(family: str, head_dim: int):
    layout = build(family, head_dim)
    key, value = random_tile(layout)
    decoded, _ = decode_page(encode_page(key, value, layout), layout)
    groups = key.view(-1, numbers_of(layout).key_group, head_dim)
    spread = (groups.amax(1) - groups.amin(1))[:, None]
    levels = torch.full((head_dim,), 2.0**layout.policy.key.bits - 1)
    widest = (key.amax(0) - key.amin(0)).argsort(descending=True)[: numbers_of(layout).boost_channels]
    levels[widest] = 15.0
    # Half a step, and the rounding of scale and low to float16 (relative 2^-11 of the largest magnitudes).
    bound = spread / levels / 2 + 2**-10 * (spread + groups.abs().amax(1, keepdim=True))
    assert ((decoded - key).view_as(groups).abs() <= bound).all()


@pytest.mark.parametrize("offset", [0.0, 50.0, -1000.0, 60000.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_offset_of_a_channel_costs_nothing_once_its_rows_are_16_bit(family: str, dtype: torch.dtype, offset: float):
    """A group's minimum is one of its rows, so float16 has it exactly: codes start from it, however far it lies."""
    layout = build(family, dtype=dtype)
    key, value = random_tile(layout)
    key = (key * max(1.0, abs(offset) / 100) + offset).to(dtype).float()
    decoded, _ = decode_page(encode_page(key, value, layout), layout)
    groups, top = (
        key.view(-1, numbers_of(layout).key_group, layout.head_dim),
        2**layout.policy.key.bits - 1,
    )
    step = (groups.amax(1) - groups.amin(1))[:, None] / top
    widest = (key.amax(0) - key.amin(0)).argsort(descending=True, stable=True)[: numbers_of(layout).boost_channels]
    step[..., widest] /= 5  # 15 steps instead of 3
    # Half a step; 2^-11 of what the scale's rounding adds up to over the codes; and the sums of float32.
    bound = step * (0.5 + top * 2**-11) + 2**-22 * groups.abs()
    assert ((decoded - key).view_as(groups).abs() <= bound).all()


@pytest.mark.parametrize("head_dim", [96, 128])
@pytest.mark.parametrize("family", ["int8", "kivi-4", "kivi-2"])
def test_a_decoded_value_is_within_half_a_step_of_its_group(family: str, head_dim: int):
    layout = build(family, head_dim)
    key, value = random_tile(layout)
    _, decoded = decode_page(encode_page(key, value, layout), layout)
    groups = value.view(layout.tile_tokens, -1, numbers_of(layout).value_group)
    spread = (groups.amax(-1) - groups.amin(-1))[..., None]
    bound = spread / (2**layout.policy.value.bits - 1) / 2 + 2**-10 * (spread + groups.abs().amax(-1, keepdim=True))
    assert ((decoded - value).view_as(groups).abs() <= bound).all()


@pytest.mark.parametrize(("bits", "distortion"), [(2, 0.1188), (4, 0.01154), (8, 0.0001)])
def test_a_rotated_value_has_the_distortion_of_the_optimal_uniform_quantiser(bits: int, distortion: float):
    policy = Policy(name="p", summary="", key=Affine(bits=2, group_size=64), value=Symmetric(bits=bits))
    layout = PageLayout.build(policy, 256, 64, torch.float32)
    key, value = random_tile(layout)
    _, decoded = decode_page(encode_page(key, value, layout), layout)
    assert (decoded - value).square().mean() / value.square().mean() < 1.05 * distortion


def test_the_rotation_is_orthonormal_and_its_own_inverse():
    for head_dim in COMPRESSED_HEAD_DIMS:
        matrix = hadamard(head_dim)
        assert torch.allclose(matrix @ matrix, torch.eye(head_dim), atol=1e-5)


@pytest.mark.parametrize("constant", [0.0, 1.5, -300.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_constant_tile_survives(family: str, constant: float):
    layout = build(family)
    tile = torch.full((layout.tile_tokens, layout.head_dim), constant)
    key, value = decode_page(encode_page(tile, tile, layout), layout)
    assert torch.allclose(key, tile, rtol=1e-3, atol=1e-4)
    expected = {2: 0.001, 4: 0.001, 8: 0.001}[layout.policy.value.bits] * abs(constant) + 1e-4
    assert (value - tile).abs().max() <= expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_huge_values_stay_finite(family: str, dtype: torch.dtype):
    layout = build(family, dtype=dtype)
    key, value = random_tile(layout)
    huge = 65504.0 if layout.dense_dtype == torch.float16 else 1e6
    key[3, 5], value[7, 11] = huge, -huge
    decoded_key, decoded_value = decode_page(encode_page(key, value, layout), layout)
    assert decoded_key.isfinite().all() and decoded_value.isfinite().all()
    other = torch.arange(layout.head_dim) != 5
    assert (decoded_key - key)[:, other].abs().max() < 2


def test_sink_tokens_do_not_widen_the_range_of_a_tile():
    layout = build("kivi-2")
    key, value = random_tile(layout)
    outlier = key.clone()
    outlier[:4] = 100.0
    plain, _ = decode_page(encode_page(key, value, layout, first_counted=4), layout)
    masked, _ = decode_page(encode_page(outlier, value, layout, first_counted=4), layout)
    assert torch.equal(plain[4:], masked[4:])


def test_a_group_of_nothing_but_sinks_gets_the_smallest_scale():
    coded = quantise_min_max(torch.randn(1, 32, 4), 2, torch.zeros(1, 32, 1, dtype=torch.bool))
    assert (coded.low == 0).all() and (coded.scale == 2.0**-20).all()


@pytest.mark.parametrize("head_dim", [48, 64, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_dense_page_is_its_rows_in_the_models_dtype(dtype: torch.dtype, head_dim: int):
    layout = build("dense-pages", head_dim, dtype=dtype)
    key, value = (rows.to(dtype) for rows in random_tile(layout))
    page = encode_page(key.float(), value.float(), layout)
    assert torch.equal(page.view(dtype).view(64, 2, head_dim), torch.stack([key, value], 1))
    decoded_key, decoded_value = decode_page(page, layout)
    assert torch.equal(decoded_key, key.float()) and torch.equal(decoded_value, value.float())
    assert layout.bits_per_element() == 8 * dtype.itemsize
    assert layout.cell_bytes == 64 * layout.slot_bytes and (layout.tail_blocks, layout.sink_blocks) == (1, 1)


def test_pages_cost_what_the_policy_promises():
    assert build("kivi-2", 64).bits_per_element() == pytest.approx(2.75, abs=0.3)
    assert build("int8", 128).bits_per_element() < 8.5
    assert build("kivi-2", 96).bits_per_element() == build("kivi-2", 64).bits_per_element() + 0.25  # smaller groups
    assert build("boosted", 96).bits_per_element() <= build("boosted", 64).bits_per_element()


def test_value_groups_are_the_policys_or_the_largest_that_divide_a_head():
    kivi, whole = make_policy("kivi-2"), make_policy("int8")
    assert [kivi.value.grouping(TileShape(Half.VALUE, 64, d)).size for d in (64, 96, 128, 160, 192)] == [
        64,
        32,
        64,
        32,
        64,
    ]
    assert whole.value.grouping(TileShape(Half.VALUE, 64, 96)).size == 96
