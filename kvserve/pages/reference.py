"""PyTorch reference of the sealed page: the definition that every kernel is tested against.

Codes are packed so that a kernel reads them with plain shifts. A matrix of b-bit codes has `rows` (the dimension a
dot product sums over, taken in fours) and `columns` (the dimension that stays in SIMD lanes). It is stored as bytes

    byte[column block][row quad][lane 0..15][row of the quad 0..3]

and column `block * (128 / b) + plane * 16 + lane` sits in bits [plane * b, plane * b + b) of its byte: the 32 bits of
a lane hold one column of four rows. For K the rows are channels and the columns tokens; for V the rows are tokens and
the columns channels.

Columns that fill half a block are folded: the block has half of the rows, the upper ones in its left half of the planes
and the lower ones in its right half. Only 2-bit values of an odd multiple of 32 channels have such a block.

A dense page is its tokens' dense slots one after the other, [tile_tokens][K row, V row][head_dim] of the model's dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvserve.pages.head_dims import rotation_dim
from kvserve.pages.layout import LANES, PageLayout

# Step of the optimal uniform mid-rise quantiser of a unit Gaussian (Max 1960, table II).
GAUSSIAN_STEP = {2: 0.9957, 4: 0.3352, 8: 0.0308}
MIN_SCALE = 2.0**-20
FLOAT16_MAX = 65504.0  # scales, lows and float16 slots saturate


def beyond_range(rows: torch.Tensor) -> torch.Tensor:
    """How many rows [..., head_dim] float16 has no room for: any number beyond +-FLOAT16_MAX, but not NaN. int64 [].

    Such a row is stored as the nearest that there is room for. What it then answers is finite and wrong, so kernels
    count rows as they are staged, the values rotated, wherever pages have scales or slots are float16.
    """
    return (rows.abs() > FLOAT16_MAX).any(-1).sum()


def hadamard(head_dim: int) -> torch.Tensor:
    """Orthonormal rotation of a head, float32 [head_dim, head_dim]; symmetric, its own inverse.

    Sylvester's matrix; where head_dim is no power of two, of the largest one that divides it, in equal blocks along the
    diagonal.
    """
    size = rotation_dim(head_dim)
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.block_diag(*[matrix / size**0.5] * (head_dim // size))


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack integer codes [rows, columns] into bytes, uint8 [rows * columns * bits / 8]."""
    rows, columns = codes.shape
    planes = 8 // bits
    if columns % (planes * LANES):
        half = planes * LANES // 2
        folded = torch.cat([codes[: rows // 2, -half:], codes[rows // 2 :, -half:]], 1)
        return torch.cat([pack_codes(codes[:, :-half], bits), pack_codes(folded, bits)])
    split = codes.to(torch.int32).reshape(rows // 4, 4, columns // (planes * LANES), planes, LANES)
    shifts = (torch.arange(planes, dtype=torch.int32) * bits).reshape(1, 1, 1, planes, 1)
    packed = (split << shifts).sum(3, dtype=torch.int32)  # [quad, row of the quad, block, lane]
    return packed.permute(2, 0, 3, 1).contiguous().to(torch.uint8).flatten()


def unpack_codes(data: torch.Tensor, bits: int, rows: int, columns: int) -> torch.Tensor:
    """Inverse of `pack_codes`: uint8 bytes to int32 codes [rows, columns]."""
    planes = 8 // bits
    if columns % (planes * LANES):
        half = planes * LANES // 2
        whole = unpack_codes(data[: rows * (columns - half) * bits // 8], bits, rows, columns - half)
        folded = unpack_codes(data[whole.numel() * bits // 8 :], bits, rows // 2, 2 * half)
        return torch.cat([whole, torch.cat([folded[:, :half], folded[:, half:]])], 1)
    packed = data.to(torch.int32).reshape(columns // (planes * LANES), rows // 4, LANES, 4)
    shifts = torch.arange(planes, dtype=torch.int32) * bits
    codes = (packed[..., None] >> shifts) & ((1 << bits) - 1)  # [block, quad, lane, row of the quad, plane]
    return codes.permute(1, 3, 0, 4, 2).reshape(rows, columns)


class Affine(NamedTuple):
    """Codes and the affine map back: value = code * scale + low. Codes have x's shape, scale and low are float16."""

    codes: torch.Tensor
    scale: torch.Tensor
    low: torch.Tensor

    def decode(self) -> torch.Tensor:
        return self.codes * self.scale.float() + self.low.float()


def quantise_min_max(x: torch.Tensor, bits: int, counted: torch.Tensor | None = None) -> Affine:
    """Asymmetric min/max quantisation over dim -2 (KIVI, section 3), float32 [..., group, lanes].

    `counted` (bool, [..., group, 1]) marks the rows whose values define the range; a group with none gets the
    smallest scale and low 0. Codes are computed with the scale and low as stored (float16), rounding half to even.
    """
    top = (1 << bits) - 1
    counted = torch.ones_like(x[..., :1], dtype=torch.bool) if counted is None else counted
    low = torch.where(counted, x, torch.inf).amin(-2, keepdim=True)
    high = torch.where(counted, x, -torch.inf).amax(-2, keepdim=True)
    empty = ~counted.any(-2, keepdim=True)
    low, high = low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)
    scale = ((high - low) / top).clamp(MIN_SCALE, FLOAT16_MAX).half()
    low = low.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
    codes = ((x - low.float()) * (1.0 / scale.float())).round().clamp(0, top)
    return Affine(codes.to(torch.int32), scale, low)


def quantise_symmetric(x: torch.Tensor, bits: int) -> Affine:
    """Symmetric mid-rise quantisation over the last dim, float32 [..., head_dim].

    The step starts at the Gaussian optimum for the row's RMS and is refitted by least squares twice, with the codes
    recomputed in between.
    """
    half_top = ((1 << bits) - 1) / 2
    scale = (x.square().mean(-1, keepdim=True).sqrt() * GAUSSIAN_STEP[bits]).clamp_min(MIN_SCALE)
    for _ in range(2):
        codes = (x * (1.0 / scale) + half_top).round().clamp(0, 2 * half_top)
        centred = codes - half_top
        scale = ((x * centred).sum(-1, keepdim=True) / centred.square().sum(-1, keepdim=True)).clamp_min(MIN_SCALE)
    stored = scale.clamp_max(FLOAT16_MAX).half()
    return Affine(codes.to(torch.int32), stored, -half_top * stored.float())


def boosted_channels(key: torch.Tensor, counted: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` channels of a key tile with the widest range (ties: the lower channel), ascending int64 [count]."""
    spread = torch.where(counted, key, -torch.inf).amax(0) - torch.where(counted, key, torch.inf).amin(0)
    return spread.sort(descending=True, stable=True).indices[:count].sort().values


def encode_page(key: torch.Tensor, value: torch.Tensor, layout: PageLayout, first_counted: int = 0) -> torch.Tensor:
    """Seal one tile of one KV head.

    Args:
        key, value: float32 [tile_tokens, head_dim]; `value` is already rotated where the policy rotates.
        first_counted: tokens before it (dense sinks) do not define key ranges.

    Returns:
        uint8 [layout.sections.size_bytes]; padding is zero.
    """
    policy, sections = layout.policy, layout.sections
    if policy.dense_pages:
        return torch.stack([key, value], 1).to(layout.dense_dtype).view(torch.uint8).flatten()
    assert sections is not None and policy.key is not None and policy.value is not None
    page = torch.zeros(sections.size_bytes, dtype=torch.uint8)

    def put(offset: int, data: torch.Tensor) -> None:
        raw = data.contiguous().view(torch.uint8).flatten()
        page[offset : offset + raw.numel()] = raw

    tokens, head_dim = key.shape
    counted = (torch.arange(tokens) >= first_counted)[:, None]
    groups = (-1, layout.key_group, head_dim)
    coded = quantise_min_max(key.reshape(groups), policy.key.bits, counted.reshape(groups[0], groups[1], 1))
    codes, scale, low = coded.codes.reshape(tokens, head_dim), coded.scale[:, 0], coded.low[:, 0]
    if layout.boost_channels:
        index = boosted_channels(key, counted, layout.boost_channels)
        fine = quantise_min_max(key.reshape(groups), 4, counted.reshape(groups[0], groups[1], 1))
        fine_codes = fine.codes.reshape(tokens, head_dim)[:, index]
        codes[:, index] = fine_codes & 3
        scale[:, index], low[:, index] = fine.scale[:, 0, index], fine.low[:, 0, index]
        put(sections.key_boost_codes, pack_codes((fine_codes >> 2).T, 2))
        put(sections.key_boost_index, index.to(torch.uint8))
    put(sections.key_codes, pack_codes(codes.T, policy.key.bits))
    put(sections.key_scales, torch.stack([scale, low], 1))
    if policy.value.rotate:
        coded = quantise_symmetric(value, policy.value.bits)
        put(sections.value_scales, coded.scale[:, 0])
        codes = coded.codes
    else:
        grouped = value.reshape(tokens, -1, layout.value_group, 1)
        coded = quantise_min_max(grouped, policy.value.bits)
        put(sections.value_scales, torch.stack([coded.scale[..., 0, 0].T, coded.low[..., 0, 0].T], 1))
        codes = coded.codes.reshape(tokens, head_dim)
    put(sections.value_codes, pack_codes(codes, policy.value.bits))
    return page


def decode_page(page: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Read one sealed page back: (key, value), float32 [tile_tokens, head_dim]; value stays rotated."""
    policy, sections = layout.policy, layout.sections
    tokens, head_dim = layout.tile_tokens, layout.head_dim
    if policy.dense_pages:
        rows = page.view(layout.dense_dtype).view(tokens, 2, head_dim).float()
        return rows[:, 0], rows[:, 1]
    assert sections is not None and policy.key is not None and policy.value is not None

    def codes_at(offset: int, bits: int, rows: int, columns: int) -> torch.Tensor:
        return unpack_codes(page[offset : offset + rows * columns * bits // 8], bits, rows, columns)

    def halves_at(offset: int, *shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return page[offset : offset + 2 * count].contiguous().view(torch.float16).float().reshape(shape)

    codes = codes_at(sections.key_codes, policy.key.bits, head_dim, tokens).T
    if boosted := layout.boost_channels:
        index = page[sections.key_boost_index : sections.key_boost_index + boosted].long()
        codes[:, index] += 4 * codes_at(sections.key_boost_codes, 2, boosted, tokens).T
    scales = halves_at(sections.key_scales, tokens // layout.key_group, 2, 1, head_dim)
    key = codes.reshape(-1, layout.key_group, head_dim) * scales[:, 0] + scales[:, 1]
    codes = codes_at(sections.value_codes, policy.value.bits, tokens, head_dim)
    if policy.value.rotate:
        half_top = ((1 << policy.value.bits) - 1) / 2
        value = (codes - half_top) * halves_at(sections.value_scales, tokens, 1)
    else:
        scales = halves_at(sections.value_scales, head_dim // layout.value_group, 2, tokens)
        grouped = codes.reshape(tokens, -1, layout.value_group)
        value = grouped * scales[:, 0].T[..., None] + scales[:, 1].T[..., None]
    return key.reshape(tokens, head_dim), value.reshape(tokens, head_dim)
