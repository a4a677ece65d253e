"""Places in a table of levels (kvserve/codecs/table.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import triton
import triton.language as tl

from kvserve.codecs.base import FLOAT16_MAX, MIN_SCALE, Codec
from kvserve.codecs.tile import Half, TileShape
from kvserve.kernels.codecs.packing import chunk_codes, store_codes

TABLE: tl.constexpr = tl.constexpr(3)
_MIN_SCALE: tl.constexpr = tl.constexpr(MIN_SCALE)
_FLOAT16_MAX: tl.constexpr = tl.constexpr(FLOAT16_MAX)


class TableStage(NamedTuple):
    """Offsets are in bytes from the page. 3-bit codes: `codes` are their two low bits, `high` the third one."""

    kind: int
    of_keys: bool
    bits: int
    low_bits: int
    per_token: bool  # ranges are those of each token, and not calibrated
    codes: int
    high: int = 0
    scales: int = 0

    @classmethod
    def of(cls, codec: Codec, shape: TileShape, at: Mapping[str, int]) -> TableStage:
        """`at`: offsets of the codec's own sections, by name."""
        bits, per_token = codec.params(shape)
        return cls(codec.kind, shape.half is Half.KEY, bits, bits & ~1, bool(per_token), **at)


@triton.jit
def table_rows(page, column0, head, tables, CHUNK: tl.constexpr, S: tl.constexpr, G: tl.constexpr):
    """`tables` (HalfTables) are those of all KV heads."""
    codes = chunk_codes(page + S.codes, column0, CHUNK, S.low_bits, S.of_keys, G)
    if S.bits == 3:
        codes += chunk_codes(page + S.high, column0, CHUNK, 1, S.of_keys, G) << 2
    if S.per_token:
        scales = (page + S.scales).to(tl.pointer_type(tl.float16)) + (column0 + tl.arange(0, CHUNK))[:, None]
        half_range, middle = tl.load(scales).to(tl.float32), tl.load(scales + G.tile_tokens).to(tl.float32)
    else:
        half_range, middle = fixed_range(head, tables, G)
    rows = tl.load(tables.levels + codes) * half_range + middle
    return tl.where((tl.arange(0, G.block_dim) < G.head_dim)[None, :], rows, 0.0)


@triton.jit
def fixed_range(head, tables, G: tl.constexpr):
    """Calibrated half range and middle of each channel, float32 [1, block_dim]."""
    d = tl.arange(0, G.block_dim)[None, :]
    at = tables.ranges + head * (2 * G.head_dim) + d
    half_range = tl.load(at, mask=d < G.head_dim, other=1.0)
    return tl.maximum(half_range, _MIN_SCALE), tl.load(at + G.head_dim, mask=d < G.head_dim, other=0.0)


@triton.jit
def encode_table(page, rows, head, tables, S: tl.constexpr, G: tl.constexpr):
    """Write a tile, float32 [tile_tokens, block_dim]; returns it as it will be read."""
    in_head = (tl.arange(0, G.block_dim) < G.head_dim)[None, :]
    if S.per_token:
        low = tl.min(tl.where(in_head, rows, float("inf")), 1)
        high = tl.max(tl.where(in_head, rows, float("-inf")), 1)
        reach = tl.minimum(tl.maximum((high - low) * 0.5, _MIN_SCALE), _FLOAT16_MAX).to(tl.float16)
        centre = tl.minimum(tl.maximum((high + low) * 0.5, -_FLOAT16_MAX), _FLOAT16_MAX).to(tl.float16)
        scales = (page + S.scales).to(tl.pointer_type(tl.float16)) + tl.arange(0, G.tile_tokens)
        tl.store(scales, reach)
        tl.store(scales + G.tile_tokens, centre)
        half_range, middle = reach.to(tl.float32)[:, None], centre.to(tl.float32)[:, None]
    else:
        half_range, middle = fixed_range(head, tables, G)
    place = (rows - middle) * tl.div_rn(tl.full(half_range.shape, 1.0, tl.float32), half_range)
    codes = tl.zeros_like(rows).to(tl.int32)
    below = tl.load(tables.levels)
    for i in range(1, 1 << S.bits):
        level = tl.load(tables.levels + i)
        codes += (place > (level + below) * 0.5).to(tl.int32)
        below = level
    if S.bits == 3:
        store_codes(page + S.codes, codes & 3, 2, S.of_keys, G)
        store_codes(page + S.high, codes >> 2, 1, S.of_keys, G)
    else:
        store_codes(page + S.codes, codes, S.bits, S.of_keys, G)
    return tl.where(in_head, tl.load(tables.levels + codes) * half_range + middle, 0.0)
