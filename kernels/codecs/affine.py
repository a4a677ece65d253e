"""Affine and symmetric codes (kvserve/codecs/affine.py, symmetric.py).

Keys with one scale per channel, and values with one per token, enter the dots as integers: the scale goes into the
query, or into the weight. Divisions and rounding of encoding are those of IEEE, so that codes, scales and minima are
the reference's bits; only the refit of symmetric values sums in another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import triton
import triton.language as tl

from kvserve.codecs.base import FLOAT16_MAX, MIN_SCALE, Codec
from kvserve.codecs.symmetric import GAUSSIAN_STEP
from kvserve.codecs.tile import Half, TileShape
from kvserve.kernels.codecs.packing import (
    as_float,
    channel_halves,
    chunk_codes,
    code_at,
    halves,
    load_codes,
    store_codes,
)
from kvserve.kernels.pages import dot

AFFINE: tl.constexpr = tl.constexpr(1)
SYMMETRIC: tl.constexpr = tl.constexpr(2)
_MIN_SCALE: tl.constexpr = tl.constexpr(MIN_SCALE)
_FLOAT16_MAX: tl.constexpr = tl.constexpr(FLOAT16_MAX)
_STEP_2: tl.constexpr = tl.constexpr(GAUSSIAN_STEP[2])
_STEP_4: tl.constexpr = tl.constexpr(GAUSSIAN_STEP[4])
_STEP_8: tl.constexpr = tl.constexpr(GAUSSIAN_STEP[8])


class AffineStage(NamedTuple):
    """What the kernels know of an affine or symmetric codec at compile time; offsets are in bytes from the page."""

    kind: int
    of_keys: bool
    bits: int
    group: int  # tokens, or channels, that share a scale
    boost_channels: int
    block_boost: int  # boost_channels, rounded up to a power of two
    per_token: bool
    clipped: bool
    codes: int
    scales: int
    boost_codes: int = 0
    boost_index: int = 0

    @classmethod
    def of(cls, codec: Codec, shape: TileShape, at: Mapping[str, int]) -> AffineStage:
        """`at`: offsets of the codec's own sections, by name."""
        bits, *others = codec.params(shape)
        group, boosted, per_token, clipped = others or (shape.head_dim, 0, 1, 0)
        block_boost = triton.next_power_of_2(boosted) if boosted else 0
        of_keys, per_token, clipped = shape.half is Half.KEY, bool(per_token), bool(clipped)
        return cls(codec.kind, of_keys, bits, group, boosted, block_boost, per_token, clipped, **at)


@triton.jit
def affine_scores(
    query, query_rows, row_mask, page, column0, CHUNK: tl.constexpr, S: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """`sealed_scores` of keys that have one scale per channel.

    The scale of each channel goes into the query, so that codes enter the dot as integers; query_rows [M] are the
    addresses of the rows, from which boosted channels are gathered again.
    """
    D: tl.constexpr = G.head_dim
    DTYPE: tl.constexpr = query.dtype
    GROUPS: tl.constexpr = (CHUNK + S.group - 1) // S.group
    d = tl.arange(0, G.block_dim)
    codes = load_codes(page + S.codes, 0, column0, G.block_dim, CHUNK, D, G.tile_tokens, S.bits)
    codes = as_float(codes, S.bits, DTYPE)
    wide = query.to(tl.float32)
    scores = tl.zeros([query.shape[0], CHUNK], tl.float32)
    for g in tl.static_range(GROUPS):
        first = (column0 // S.group + g) * 2 * D
        scale = channel_halves(page, S.scales + first * 2, d, G)
        low = channel_halves(page, S.scales + (first + D) * 2, d, G)
        peak = tl.max(scale, 0) if tl.float16 == DTYPE else 1.0  # float16 has no room for query times scale
        part = peak * dot((wide * (scale / peak)[None, :]).to(DTYPE), codes)
        part += tl.sum(wide * low[None, :], 1)[:, None]
        if S.boost_channels:
            part += _boost_scores(query_rows, row_mask, page, column0, first, peak, CHUNK, DTYPE, S, G)
        scores = tl.where((tl.arange(0, CHUNK) // S.group == g)[None, :], part, scores) if GROUPS > 1 else part
    return scores


@triton.jit
def _boost_scores(
    query_rows, row_mask, page, column0, first, peak, CHUNK: tl.constexpr, DTYPE: tl.constexpr, S: tl.constexpr,
    G: tl.constexpr
):  # fmt: skip
    """What the two upper bits of the boosted channels add to the scores."""
    i = tl.arange(0, S.block_boost)
    boosted = row_mask[:, None]
    if S.block_boost == S.boost_channels:
        index = tl.load(page + S.boost_index + i).to(tl.int32)
    else:
        index = tl.load(page + S.boost_index + i, mask=i < S.boost_channels, other=0).to(tl.int32)
        boosted &= (i < S.boost_channels)[None, :]
    query = tl.load(query_rows[:, None] + index[None, :], mask=boosted, other=0.0).to(tl.float32)
    scale = halves(page, S.scales, first + index) / peak
    codes = load_codes(page + S.boost_codes, 0, column0, S.block_boost, CHUNK, S.boost_channels, G.tile_tokens, 2)
    return 4.0 * peak * dot((query * scale[None, :]).to(DTYPE), as_float(codes, 2, DTYPE))


@triton.jit
def affine_values(
    weights, used, page, row0, CHUNK: tl.constexpr, DTYPE: tl.constexpr, S: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """`sealed_values` of values with scales per token; a scale goes into the weight where a token has one scale."""
    D: tl.constexpr = G.block_dim
    T: tl.constexpr = G.tile_tokens
    token = row0 + tl.arange(0, CHUNK)
    codes = load_codes(page + S.codes, row0, 0, CHUNK, D, T, G.head_dim, S.bits)
    if S.group < G.head_dim:
        NUM_GROUPS: tl.constexpr = D // S.group
        group = tl.arange(0, NUM_GROUPS)[None, :]
        at = (page + S.scales).to(tl.pointer_type(tl.float16)) + group * (2 * T) + token[:, None]
        exist = group < G.head_dim // S.group
        scales = tl.where(used[:, None], tl.load(at, mask=exist, other=0.0).to(tl.float32), 0.0)
        lows = tl.where(used[:, None], tl.load(at + T, mask=exist, other=0.0).to(tl.float32), 0.0)
        grouped = tl.reshape(as_float(codes, S.bits, tl.float32), [CHUNK, NUM_GROUPS, S.group])
        value = tl.reshape(grouped * scales[:, :, None] + lows[:, :, None], [CHUNK, D])
        result = dot(weights.to(DTYPE), value.to(DTYPE))
    else:
        scale = tl.where(used, halves(page, S.scales, token), 0.0)
        peak = tl.maximum(tl.max(scale, 0), 1e-30) if tl.float16 == DTYPE else 1.0
        scaled = (weights * (scale / peak)[None, :]).to(DTYPE)
        result = dot(scaled, as_float(codes, S.bits, DTYPE))
        if S.kind == SYMMETRIC:
            result = peak * (result - 0.5 * ((1 << S.bits) - 1) * tl.sum(scaled.to(tl.float32), 1)[:, None])
        else:
            low = tl.where(used, halves(page, S.scales, T + token), 0.0)
            result = peak * result + tl.sum(weights * low[None, :], 1)[:, None]
    return result


@triton.jit
def affine_rows(page, column0, CHUNK: tl.constexpr, S: tl.constexpr, G: tl.constexpr):
    """The tokens [column0, column0 + CHUNK) of a page, float32 [CHUNK, block_dim]; 0 from head_dim on."""
    token, d = (column0 + tl.arange(0, CHUNK))[:, None], tl.arange(0, G.block_dim)[None, :]
    in_head = d < G.head_dim
    code = chunk_codes(page + S.codes, column0, CHUNK, S.bits, S.of_keys, G)
    if S.boost_channels:
        code += 4 * _boost_rows(page, token, d, S, G)
    code = code.to(tl.float32)
    scales = (page + S.scales).to(tl.pointer_type(tl.float16))
    if S.kind == SYMMETRIC:
        scale = tl.load(scales + token).to(tl.float32)
        rows = tl.where(in_head, (code - 0.5 * ((1 << S.bits) - 1)) * scale, 0.0)
    else:
        if S.per_token:
            at = d // S.group * (2 * G.tile_tokens) + token
            low_at = at + G.tile_tokens
        else:
            at = token // S.group * (2 * G.head_dim) + d
            low_at = at + G.head_dim
        scale = tl.load(scales + at, mask=in_head, other=0.0).to(tl.float32)
        rows = code * scale + tl.load(scales + low_at, mask=in_head, other=0.0).to(tl.float32)
    return rows


@triton.jit
def _boost_rows(page, token, d, S: tl.constexpr, G: tl.constexpr):
    """The upper two bits of the codes of boosted channels; 0 in the others. token [CHUNK, 1], d [1, block_dim]."""
    i = tl.arange(0, S.block_boost)
    index = tl.load(page + S.boost_index + i, mask=i < S.boost_channels, other=255).to(tl.int32)
    is_boosted = tl.max(((index[:, None] == d) & (i < S.boost_channels)[:, None]).to(tl.int32), 0)
    place = (tl.cumsum(is_boosted, 0) - is_boosted)[None, :]  # the index is ascending
    boosted = is_boosted[None, :] > 0
    return code_at(page + S.boost_codes, place, token, S.boost_channels, G.tile_tokens, 2, boosted)


@triton.jit
def _code(x, top: tl.constexpr):
    """Nearest integer in [0, top], ties to even, as float32: adding 1.5 * 2^23 rounds off the fraction."""
    x = tl.minimum(tl.maximum(x, -1.0), top + 1.0)
    return tl.minimum(tl.maximum((x + 12582912.0) - 12582912.0, 0.0), top * 1.0)


@triton.jit
def _affine(low, width, top: tl.constexpr):
    """Float16 scale and low of a range, as float32 values."""
    scale = tl.minimum(tl.maximum(tl.div_rn(width, top * 1.0), _MIN_SCALE), _FLOAT16_MAX)
    low = tl.minimum(tl.maximum(low, -_FLOAT16_MAX), _FLOAT16_MAX)
    return scale.to(tl.float16).to(tl.float32), low.to(tl.float16).to(tl.float32)


@triton.jit
def _channel_codes(grouped, low, high, BITS: tl.constexpr):
    """Codes of groups [groups, group, channels], int32, and float16 scale and low as float32 [groups, channels]."""
    top: tl.constexpr = (1 << BITS) - 1
    scale, low = _affine(low, high - low, top)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    return _code((grouped - low[:, None, :]) * inverse[:, None, :], top).to(tl.int32), scale, low


@triton.jit
def _boosted(low, high, S: tl.constexpr, G: tl.constexpr):
    """Place [block_dim] of each channel among the boosted ones, ascending, and whether it is one (the widest are)."""
    d = tl.arange(0, G.block_dim)
    spread = tl.max(high, 0) - tl.min(low, 0)
    spread = tl.where(
        spread == spread, spread, float("inf")
    )  # NaN sorts first, as in torch; as many are chosen as ever
    spread = tl.where(d < G.head_dim, spread, float("-inf"))
    spread_column = tl.reshape(spread, [G.block_dim, 1])
    before = (spread_column > spread[None, :]) | ((spread_column == spread[None, :]) & (d[:, None] < d[None, :]))
    chosen = tl.sum(before.to(tl.int32), 0) < S.boost_channels
    return tl.cumsum(chosen.to(tl.int32), 0) - 1, chosen


@triton.jit
def _store_boost(page, fine, place, chosen, S: tl.constexpr, G: tl.constexpr):
    """The upper two bits of the boosted channels' codes [tokens, block_dim], and the channels themselves."""
    BLOCKS: tl.constexpr = G.tile_tokens // 64
    d, block, lane = tl.arange(0, G.block_dim), tl.arange(0, BLOCKS), tl.arange(0, 16)
    split = tl.reshape(fine >> 2, [BLOCKS, 4, 16, G.block_dim])
    packed = tl.sum(split << (2 * tl.arange(0, 4))[None, :, None, None], 1).to(tl.uint8)
    in_block = (place // 4 * 64 + place % 4)[None, None, :] + (lane * 4)[None, :, None]
    at = page + S.boost_codes + block[:, None, None] * (S.boost_channels * 16) + in_block
    tl.store(at, packed, mask=chosen[None, None, :])
    tl.store(page + S.boost_index + place, d.to(tl.uint8), mask=chosen)


@triton.jit
def encode_affine(page, rows, first_counted, head, tables, S: tl.constexpr, G: tl.constexpr):
    """Write a tile, float32 [tile_tokens, block_dim]; returns it as it will be read.

    `tables` (HalfTables) are those of all KV heads.
    """
    if S.kind == SYMMETRIC:
        decoded = _encode_symmetric(page, rows, S, G)
    elif S.per_token:
        decoded = _encode_by_token(page, rows, head, tables, S, G)
    else:
        decoded = _encode_by_channel(page, rows, first_counted, S, G)
    return decoded


@triton.jit
def _encode_by_channel(page, rows, first_counted, S: tl.constexpr, G: tl.constexpr):
    T: tl.constexpr = G.tile_tokens
    D: tl.constexpr = G.block_dim
    GROUPS: tl.constexpr = T // S.group
    grouped = tl.reshape(rows, [GROUPS, S.group, D])
    t = tl.arange(0, GROUPS)[:, None] * S.group + tl.arange(0, S.group)[None, :]
    counted = (t >= first_counted)[:, :, None]
    low = tl.min(tl.where(counted, grouped, float("inf")), 1)
    high = tl.max(tl.where(counted, grouped, float("-inf")), 1)
    empty = high == float("-inf")
    range_low, range_high = tl.where(empty, 0.0, low), tl.where(empty, 0.0, high)
    codes, scale, stored_low = _channel_codes(grouped, range_low, range_high, S.bits)
    whole = codes
    if S.boost_channels:
        fine, fine_scale, fine_low = _channel_codes(grouped, range_low, range_high, 4)
        place, chosen = _boosted(low, high, S, G)
        whole = tl.where(chosen[None, None, :], fine, codes)
        codes = tl.where(chosen[None, None, :], fine & 3, codes)
        scale = tl.where(chosen[None, :], fine_scale, scale)
        stored_low = tl.where(chosen[None, :], fine_low, stored_low)
        _store_boost(page, tl.reshape(fine, [T, D]), place, chosen, S, G)
    store_codes(page + S.codes, tl.reshape(codes, [T, D]), S.bits, S.of_keys, G)
    group, d = tl.arange(0, GROUPS)[:, None], tl.arange(0, D)[None, :]
    at = (page + S.scales).to(tl.pointer_type(tl.float16)) + group * (2 * G.head_dim) + d
    exist = d < G.head_dim
    tl.store(at, scale.to(tl.float16), mask=exist)
    tl.store(at + G.head_dim, stored_low.to(tl.float16), mask=exist)
    return tl.reshape(whole.to(tl.float32) * scale[:, None, :] + stored_low[:, None, :], [T, D])


@triton.jit
def _encode_by_token(page, rows, head, tables, S: tl.constexpr, G: tl.constexpr):
    T: tl.constexpr = G.tile_tokens
    D: tl.constexpr = G.block_dim
    GROUPS: tl.constexpr = D // S.group if S.group < G.head_dim else 1
    CHANNELS: tl.constexpr = D // GROUPS
    top: tl.constexpr = (1 << S.bits) - 1
    group, token = tl.arange(0, GROUPS)[None, :], tl.arange(0, T)
    grouped = tl.reshape(rows, [T, GROUPS, CHANNELS])
    in_head = group[:, :, None] * CHANNELS + tl.arange(0, CHANNELS)[None, None, :] < G.head_dim
    smallest = tl.min(tl.where(in_head, grouped, float("inf")), 2)
    exist = group * CHANNELS < G.head_dim
    width = tl.max(tl.where(in_head, grouped, float("-inf")), 2) - smallest
    if S.clipped:
        clip = tl.load(tables.clip + head * (G.head_dim // S.group) + group, mask=exist, other=1.0)
        smallest, width = smallest * clip, width * clip
    scale, low = _affine(smallest, width, top)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    codes = _code((grouped - low[:, :, None]) * inverse[:, :, None], top)
    at = (page + S.scales).to(tl.pointer_type(tl.float16)) + group * (2 * T) + token[:, None]
    tl.store(at, scale.to(tl.float16), mask=exist)
    tl.store(at + T, low.to(tl.float16), mask=exist)
    store_codes(page + S.codes, tl.reshape(codes, [T, D]).to(tl.int32), S.bits, S.of_keys, G)
    return tl.reshape(tl.where(in_head, codes * scale[:, :, None] + low[:, :, None], 0.0), [T, D])


@triton.jit
def _encode_symmetric(page, rows, S: tl.constexpr, G: tl.constexpr):
    half_top: tl.constexpr = ((1 << S.bits) - 1) / 2
    codes, scale = _symmetric(rows, (1 << S.bits) - 1, S, G)
    scale = tl.minimum(scale, _FLOAT16_MAX).to(tl.float16)
    scales = (page + S.scales).to(tl.pointer_type(tl.float16))
    tl.store(scales + tl.arange(0, G.tile_tokens), scale)
    store_codes(page + S.codes, codes.to(tl.int32), S.bits, S.of_keys, G)
    in_head = (tl.arange(0, G.block_dim) < G.head_dim)[None, :]
    return tl.where(in_head, (codes - half_top) * scale.to(tl.float32)[:, None], 0.0)


@triton.jit
def _symmetric(rows, top: tl.constexpr, S: tl.constexpr, G: tl.constexpr):
    """Mid-rise codes [tokens, block_dim] and steps [tokens] (`quantise_symmetric`)."""
    half_top: tl.constexpr = top / 2
    step: tl.constexpr = _STEP_2 if S.bits == 2 else (_STEP_4 if S.bits == 4 else _STEP_8)
    scale = tl.maximum(tl.sqrt_rn(tl.div_rn(tl.sum(rows * rows, 1), G.head_dim * 1.0)) * step, _MIN_SCALE)
    codes = rows
    for _ in tl.static_range(2):
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        codes = _code(rows * inverse[:, None] + half_top, top)
        centred = tl.where((tl.arange(0, G.block_dim) < G.head_dim)[None, :], codes - half_top, 0.0)
        scale = tl.maximum(tl.div_rn(tl.sum(rows * centred, 1), tl.sum(centred * centred, 1)), _MIN_SCALE)
    return codes, scale
