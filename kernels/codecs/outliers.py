"""The few elements of a tile that are stored as they are (kvserve/codecs/outliers.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvserve.codecs.base import FLOAT16_MAX, MIN_SCALE, Codec
from kvserve.codecs.layer_tables import KV_HEADS
from kvserve.codecs.outliers import Outliers
from kvserve.codecs.tile import TileShape
from kvserve.kernels.codecs.table import fixed_range
from kvserve.kernels.pages import dot

OUTLIERS: tl.constexpr = tl.constexpr(5)
_MIN_SCALE: tl.constexpr = tl.constexpr(MIN_SCALE)
_FLOAT16_MAX: tl.constexpr = tl.constexpr(FLOAT16_MAX)
_NAN_KEY: tl.constexpr = tl.constexpr(0x7FFFFFFE)
MIN_DOT_COLUMNS = 16  # least K of tl.dot
DOT_ENTRIES = 64  # outliers that go through a dot at once, for want of shared memory


class OutliersStage(NamedTuple):
    """Offsets are in bytes from the page; `per_channel` and `group` say which elements share a scale."""

    kind: int
    entries: int
    block_entries: int  # that go through a dot at once
    fixed: bool  # the inner codec has a calibrated range
    per_channel: bool
    group: int
    at_values: int
    at_index: int

    @classmethod
    def of(cls, codec: Codec, shape: TileShape, at: Mapping[str, int]) -> OutliersStage:
        """`at`: offsets of the codec's own sections, by name."""
        assert isinstance(codec, Outliers)
        (entries,), grouping = codec.params(shape), codec.inner.grouping(shape)
        block_entries = min(max(MIN_DOT_COLUMNS, triton.next_power_of_2(entries)), DOT_ENTRIES)
        ones = {
            name: torch.ones([1 if isinstance(axis, str) else axis for axis in spec.axes if axis != KV_HEADS])
            for name, spec in codec.inner.tables(shape).items()
        }
        fixed = codec.inner.fixed_range(ones) is not None
        places = at["values"], at["index"]
        return cls(codec.kind, entries, block_entries, fixed, grouping.per_channel, grouping.size, *places)


@triton.jit
def outlier_rows(inner, page, column0, CHUNK: tl.constexpr, S: tl.constexpr, G: tl.constexpr):
    """What the inner codec has of a chunk, float32 [CHUNK, block_dim], with the outliers in their places.

    Dots put them there: of the matrix that says which token an outlier belongs to with the one that says which channel,
    and of the former with the latter's values. Each sum has one term that is not 0, so both are exact.
    """
    token, d = column0 + tl.arange(0, CHUNK), tl.arange(0, G.block_dim)
    is_outlier, exact = tl.zeros_like(inner), tl.zeros_like(inner)
    for first in range(0, S.entries, S.block_entries):
        i = first + tl.arange(0, S.block_entries)
        exist = i < S.entries
        at = tl.load((page + S.at_index).to(tl.pointer_type(tl.uint16)) + i, mask=exist, other=0).to(tl.int32)
        values = tl.load((page + S.at_values).to(tl.pointer_type(tl.float16)) + i, mask=exist, other=0.0)
        one, zero = tl.full(values.shape, 1.0, tl.float16), tl.zeros_like(values)
        of_token = ((at // G.head_dim)[None, :] == token[:, None]) & exist[None, :]
        of_token = tl.where(of_token, one[None, :], zero[None, :])
        of_channel = (at % G.head_dim)[:, None] == d[None, :]
        is_outlier += dot(of_token, tl.where(of_channel, one[:, None], zero[:, None]))
        exact += dot(of_token, tl.where(of_channel, values[:, None], zero[:, None]))
    return tl.where(is_outlier > 0.0, exact, inner)


@triton.jit
def take_outliers(page, rows, first_counted, head, tables, S: tl.constexpr, G: tl.constexpr):
    """Write the outliers of a tile, float32 [tile_tokens, block_dim].

    Returns:
        is_outlier, bool; the rows with each outlier as it will be read; and the rows that the inner codec is given.
    """
    token, d = tl.arange(0, G.tile_tokens)[:, None], tl.arange(0, G.block_dim)[None, :]
    in_head = (token >= 0) & (d < G.head_dim)
    counted = (token >= first_counted) & in_head
    if S.fixed:
        reach, middle = fixed_range(head, tables, G)
    else:
        middle, reach = _mean_and_deviation(rows, counted, S, G)
    distance = tl.div_rn(tl.abs(rows - middle), tl.broadcast_to(reach, rows.shape))
    # Distances are ordered as their bits are; NaN comes first, as in torch.
    key = tl.minimum(distance.to(tl.int32, bitcast=True) & 0x7FFFFFFF, _NAN_KEY) + 1
    key = tl.where(in_head, tl.where(counted, key, 0), -1)
    is_outlier, place = _largest(key, S)
    values = tl.minimum(tl.maximum(rows, -_FLOAT16_MAX), _FLOAT16_MAX).to(tl.float16)
    tl.store((page + S.at_values).to(tl.pointer_type(tl.float16)) + place, values, mask=is_outlier)
    index = (token * G.head_dim + d).to(tl.uint16)
    tl.store((page + S.at_index).to(tl.pointer_type(tl.uint16)) + place, index, mask=is_outlier)
    if not S.fixed:
        middle, reach = _mean_and_deviation(rows, counted & (is_outlier == 0), S, G)
    exact = tl.where(is_outlier, values.to(tl.float32), rows)
    return is_outlier, exact, tl.where(is_outlier, middle, rows)


@triton.jit
def _largest(key, S: tl.constexpr):
    """Which S.entries elements of int32 [rows, columns], >= -1, are the largest (ties: the first), and their places.

    The least of them is found bit by bit.
    """
    least = 0
    for bit in range(31):
        tried = least | (1 << (30 - bit))
        least = tl.where(tl.sum(tl.sum((key >= tried).to(tl.int32), 1), 0) >= S.entries, tried, least)
    above, equal = key > least, key == least
    missing = S.entries - tl.sum(tl.sum(above.to(tl.int32), 1), 0)
    chosen = above | (equal & (_places(equal) < missing))
    return chosen, _places(chosen)


@triton.jit
def _places(marked):
    """How many elements are marked before each one of a matrix, row by row, int32."""
    marked = marked.to(tl.int32)
    in_rows = tl.sum(marked, 1)
    return tl.cumsum(marked, 1) - marked + (tl.cumsum(in_rows, 0) - in_rows)[:, None]


@triton.jit
def _grouped(x, S: tl.constexpr, G: tl.constexpr):
    """[tile_tokens, block_dim] with what shares a scale along axis 1, or along axis 2 if not per_channel."""
    if S.per_channel:
        result = tl.reshape(x, [G.tile_tokens // S.group, S.group, G.block_dim])
    elif S.group < G.head_dim:
        result = tl.reshape(x, [G.tile_tokens, G.block_dim // S.group, S.group])
    else:
        result = tl.reshape(x, [G.tile_tokens, 1, G.block_dim])
    return result


@triton.jit
def _mean_and_deviation(rows, of, S: tl.constexpr, G: tl.constexpr):
    """Mean and deviation of the elements `of` a group, float32 [tile_tokens, block_dim] (`mean_and_deviation`)."""
    AXIS: tl.constexpr = 1 if S.per_channel else 2
    x, of = _grouped(rows, S, G).to(tl.float64), _grouped(of.to(tl.int32), S, G) > 0
    count = tl.maximum(tl.sum(of.to(tl.int32), AXIS, keep_dims=True), 1).to(tl.float64)
    mean = tl.sum(tl.where(of, x, 0.0), AXIS, keep_dims=True) / count
    away = tl.where(of, x - mean, 0.0)
    deviation = tl.sqrt(tl.sum(away * away, AXIS, keep_dims=True) / count)
    reach = tl.maximum(deviation.to(tl.float32), _MIN_SCALE)
    middle = tl.reshape(tl.broadcast_to(mean.to(tl.float32), x.shape), rows.shape)
    return middle, tl.reshape(tl.broadcast_to(reach, x.shape), rows.shape)
