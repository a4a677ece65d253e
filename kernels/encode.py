"""Writing one sealed page: the device functions of `encode_page` (kvserve/pages/reference.py), step by step the same.

Divisions and rounding are those of IEEE, so that codes, scales and minima are the reference's bits; only the refit of
rotated values sums in another order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvserve.pages.reference import FLOAT16_MAX, GAUSSIAN_STEP, MIN_SCALE

_MIN_SCALE: tl.constexpr = tl.constexpr(MIN_SCALE)
_FLOAT16_MAX: tl.constexpr = tl.constexpr(FLOAT16_MAX)
_STEP_2: tl.constexpr = tl.constexpr(GAUSSIAN_STEP[2])
_STEP_4: tl.constexpr = tl.constexpr(GAUSSIAN_STEP[4])
_STEP_8: tl.constexpr = tl.constexpr(GAUSSIAN_STEP[8])


@triton.jit
def _code(x, top: tl.constexpr):
    """Nearest integer in [0, top], ties to even, as float32: adding 1.5 * 2^23 rounds off the fraction."""
    x = tl.minimum(tl.maximum(x, -1.0), top + 1.0)
    return tl.minimum(tl.maximum((x + 12582912.0) - 12582912.0, 0.0), top * 1.0)


@triton.jit
def _affine(low, high, top: tl.constexpr):
    """Float16 scale and low of a range, as float32 values."""
    scale = tl.minimum(tl.maximum(tl.div_rn(high - low, top * 1.0), _MIN_SCALE), _FLOAT16_MAX)
    low = tl.minimum(tl.maximum(low, -_FLOAT16_MAX), _FLOAT16_MAX)
    return scale.to(tl.float16).to(tl.float32), low.to(tl.float16).to(tl.float32)


@triton.jit
def _store_key_codes(section, codes, G: tl.constexpr):
    """Pack int32 codes [tile_tokens, block_dim], channels as rows, as `pack_codes` does."""
    PLANES: tl.constexpr = 8 // G.key_bits
    BLOCKS: tl.constexpr = G.tile_tokens // (16 * PLANES)
    row_shift, plane_shift = 8 * tl.arange(0, 4), G.key_bits * tl.arange(0, PLANES)
    block, lane = tl.arange(0, BLOCKS)[:, None, None], tl.arange(0, 16)[None, :, None]
    quad = tl.arange(0, G.block_dim // 4)[None, None, :]
    split = tl.reshape(codes, [BLOCKS, PLANES, 16, G.block_dim // 4, 4])
    words = tl.sum(tl.sum(split << row_shift[None, None, None, None, :], 4) << plane_shift[None, :, None, None], 1)
    at = block * (G.head_dim * 4) + quad * 16 + lane
    exist = quad < G.head_dim // 4
    tl.store(section.to(tl.pointer_type(tl.int32)) + at, words, mask=exist)


@triton.jit
def _store_value_codes(section, codes, G: tl.constexpr):
    """Pack int32 codes [tile_tokens, block_dim] as `pack_codes` does; they are 0 from head_dim on."""
    PLANES: tl.constexpr = 8 // G.value_bits
    WIDTH: tl.constexpr = 16 * PLANES
    BLOCKS: tl.constexpr = G.block_dim // WIDTH
    QUADS: tl.constexpr = G.tile_tokens // 4
    row_shift, plane_shift = 8 * tl.arange(0, 4), G.value_bits * tl.arange(0, PLANES)
    split = tl.reshape(codes, [QUADS, 4, BLOCKS, PLANES, 16])
    words = tl.sum(tl.sum(split << plane_shift[None, None, None, :, None], 3) << row_shift[None, :, None, None], 1)
    quad, lane = tl.arange(0, QUADS)[:, None, None], tl.arange(0, 16)[None, None, :]
    block = tl.arange(0, BLOCKS)[None, :, None]
    to = section.to(tl.pointer_type(tl.int32))
    exist = block < G.head_dim // WIDTH
    tl.store(to + block * (QUADS * 16) + quad * 16 + lane, words, mask=exist)
    if G.head_dim % WIDTH:
        last: tl.constexpr = G.head_dim // WIDTH
        halves = tl.reshape(tl.sum(tl.where(block == last, words, 0), 1), [2, QUADS // 2, 16])
        folded = tl.sum(halves << (4 * tl.arange(0, 2))[:, None, None], 0)
        quad = tl.arange(0, QUADS // 2)[:, None]
        tl.store(to + last * (QUADS * 16) + quad * 16 + tl.arange(0, 16)[None, :], folded)


@triton.jit
def _key_codes(grouped, low, high, BITS: tl.constexpr):
    """Codes [groups, tokens, channels] and their scale and low [groups, channels]."""
    top: tl.constexpr = (1 << BITS) - 1
    scale, low = _affine(low, high, top)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    return _code((grouped - low[:, None, :]) * inverse[:, None, :], top).to(tl.int32), scale, low


@triton.jit
def _boosted(low, high, G: tl.constexpr):
    """Place [block_dim] of each channel among the boosted ones, ascending, and whether it is one (the widest are)."""
    d = tl.arange(0, G.block_dim)
    spread = tl.max(high, 0) - tl.min(low, 0)
    spread = tl.where(
        spread == spread, spread, float("inf")
    )  # NaN sorts first, as in torch; as many are chosen as ever
    spread = tl.where(d < G.head_dim, spread, float("-inf"))
    spread_column = tl.reshape(spread, [G.block_dim, 1])
    before = (spread_column > spread[None, :]) | ((spread_column == spread[None, :]) & (d[:, None] < d[None, :]))
    chosen = tl.sum(before.to(tl.int32), 0) < G.boost_channels
    return tl.cumsum(chosen.to(tl.int32), 0) - 1, chosen


@triton.jit
def _store_boost(page, fine, place, chosen, G: tl.constexpr):
    """The upper two bits of the boosted channels' codes [tokens, block_dim], and the channels themselves."""
    BLOCKS: tl.constexpr = G.tile_tokens // 64
    d, block, lane = tl.arange(0, G.block_dim), tl.arange(0, BLOCKS), tl.arange(0, 16)
    split = tl.reshape(fine >> 2, [BLOCKS, 4, 16, G.block_dim])
    packed = tl.sum(split << (2 * tl.arange(0, 4))[None, :, None, None], 1).to(tl.uint8)
    in_block = (place // 4 * 64 + place % 4)[None, None, :] + (lane * 4)[None, :, None]
    at = page + G.key_boost_codes + block[:, None, None] * (G.boost_channels * 16) + in_block
    tl.store(at, packed, mask=chosen[None, None, :])
    tl.store(page + G.key_boost_index + place, d.to(tl.uint8), mask=chosen)


@triton.jit
def _encode_key(page, key, first_counted, G: tl.constexpr):
    T: tl.constexpr = G.tile_tokens
    D: tl.constexpr = G.block_dim
    GROUPS: tl.constexpr = T // G.key_group
    grouped = tl.reshape(key, [GROUPS, G.key_group, D])
    t = tl.arange(0, GROUPS)[:, None] * G.key_group + tl.arange(0, G.key_group)[None, :]
    counted = (t >= first_counted)[:, :, None]
    low = tl.min(tl.where(counted, grouped, float("inf")), 1)
    high = tl.max(tl.where(counted, grouped, float("-inf")), 1)
    empty = high == float("-inf")
    range_low, range_high = tl.where(empty, 0.0, low), tl.where(empty, 0.0, high)
    codes, scale, stored_low = _key_codes(grouped, range_low, range_high, G.key_bits)
    if G.boost_channels:
        fine, fine_scale, fine_low = _key_codes(grouped, range_low, range_high, 4)
        place, chosen = _boosted(low, high, G)
        codes = tl.where(chosen[None, None, :], fine & 3, codes)
        scale = tl.where(chosen[None, :], fine_scale, scale)
        stored_low = tl.where(chosen[None, :], fine_low, stored_low)
        _store_boost(page, tl.reshape(fine, [T, D]), place, chosen, G)
    _store_key_codes(page + G.key_codes, tl.reshape(codes, [T, D]), G)
    group, d = tl.arange(0, GROUPS)[:, None], tl.arange(0, D)[None, :]
    at = (page + G.key_scales).to(tl.pointer_type(tl.float16)) + group * (2 * G.head_dim) + d
    exist = d < G.head_dim
    tl.store(at, scale.to(tl.float16), mask=exist)
    tl.store(at + G.head_dim, stored_low.to(tl.float16), mask=exist)


@triton.jit
def _encode_value(page, value, G: tl.constexpr):
    T: tl.constexpr = G.tile_tokens
    D: tl.constexpr = G.block_dim
    top: tl.constexpr = (1 << G.value_bits) - 1
    token = tl.arange(0, T)
    scales = (page + G.value_scales).to(tl.pointer_type(tl.float16))
    if G.rotated:
        codes, scale = _symmetric(value, top, G)
        tl.store(scales + token, tl.minimum(scale, _FLOAT16_MAX).to(tl.float16))
    else:
        GROUPS: tl.constexpr = D // G.value_group if G.value_group < G.head_dim else 1
        CHANNELS: tl.constexpr = D // GROUPS
        group = tl.arange(0, GROUPS)[None, :]
        grouped = tl.reshape(value, [T, GROUPS, CHANNELS])
        in_head = group[:, :, None] * CHANNELS + tl.arange(0, CHANNELS)[None, None, :] < G.head_dim
        smallest = tl.min(tl.where(in_head, grouped, float("inf")), 2)
        scale, low = _affine(smallest, tl.max(tl.where(in_head, grouped, float("-inf")), 2), top)
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        codes = tl.reshape(_code((grouped - low[:, :, None]) * inverse[:, :, None], top), [T, D])
        at = group * (2 * T) + token[:, None]
        exist = group * CHANNELS < G.head_dim
        tl.store(scales + at, scale.to(tl.float16), mask=exist)
        tl.store(scales + at + T, low.to(tl.float16), mask=exist)
    codes = tl.where((tl.arange(0, D) < G.head_dim)[None, :], codes, 0.0)
    _store_value_codes(page + G.value_codes, codes.to(tl.int32), G)


@triton.jit
def _symmetric(value, top: tl.constexpr, G: tl.constexpr):
    """Mid-rise codes [tokens, block_dim] and steps [tokens] (`quantise_symmetric`)."""
    half_top: tl.constexpr = top / 2
    step: tl.constexpr = _STEP_2 if G.value_bits == 2 else (_STEP_4 if G.value_bits == 4 else _STEP_8)
    scale = tl.maximum(tl.sqrt_rn(tl.div_rn(tl.sum(value * value, 1), G.head_dim * 1.0)) * step, _MIN_SCALE)
    codes = value
    for _ in tl.static_range(2):
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        codes = _code(value * inverse[:, None] + half_top, top)
        centred = tl.where((tl.arange(0, G.block_dim) < G.head_dim)[None, :], codes - half_top, 0.0)
        scale = tl.maximum(tl.div_rn(tl.sum(value * centred, 1), tl.sum(centred * centred, 1)), _MIN_SCALE)
    return codes, scale


@triton.jit
def store_slots(cells, slots, mask, key, value, G: tl.constexpr):
    """Write K and V [N, block_dim] to the dense slots at the offsets [N]."""
    d = tl.arange(0, G.block_dim)
    at = (cells + slots[:, None]).to(tl.pointer_type(G.slot_dtype)) + d[None, :]
    both = mask[:, None] & (d < G.head_dim)[None, :]
    tl.store(at, key.to(G.slot_dtype), mask=both)
    tl.store(at + G.head_dim, value.to(G.slot_dtype), mask=both)


@triton.jit
def encode_page(page, key, value, first_counted, G: tl.constexpr):
    """Seal one tile: key and value float32 [tile_tokens, block_dim], the value rotated where the policy rotates.

    Tokens before first_counted do not define key ranges. Padding at the end of the page becomes zero.
    """
    if G.dense_pages:
        slots = tl.arange(0, G.tile_tokens) * G.slot_bytes
        store_slots(page, slots, slots >= 0, key, value, G)
    else:
        _encode_key(page, key, first_counted, G)
        _encode_value(page, value, G)
        end: tl.constexpr = G.key_boost_index + G.boost_channels
        pad = tl.arange(0, 256)
        tl.store(page + end + pad, tl.zeros([256], tl.uint8), mask=pad < G.page_bytes - end)
