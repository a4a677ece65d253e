"""The product of two thin matrices that is added to another codec's rows (kvserve/codecs/low_rank.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import triton
import triton.language as tl

from kvserve.codecs.base import FLOAT16_MAX, Codec
from kvserve.codecs.low_rank import LEAST_REST, ROUNDS
from kvserve.codecs.tile import TileShape
from kvserve.kernels.pages import dot

LOW_RANK: tl.constexpr = tl.constexpr(6)
_FLOAT16_MAX: tl.constexpr = tl.constexpr(FLOAT16_MAX)
_LEAST_REST: tl.constexpr = tl.constexpr(LEAST_REST)
_ROUNDS: tl.constexpr = tl.constexpr(ROUNDS)
_PI: tl.constexpr = tl.constexpr(3.141592653589793)
_TINY: tl.constexpr = tl.constexpr(2.0**-126)
MIN_DOT_COLUMNS = 16  # least K of tl.dot


class LowRankStage(NamedTuple):
    """Offsets are in bytes from the page."""

    kind: int
    rank: int
    block_rank: int  # rank, rounded up to what a dot takes
    left: int
    right: int

    @classmethod
    def of(cls, codec: Codec, shape: TileShape, at: Mapping[str, int]) -> LowRankStage:
        """`at`: offsets of the codec's own sections, by name."""
        (rank,) = codec.params(shape)
        return cls(codec.kind, rank, max(MIN_DOT_COLUMNS, triton.next_power_of_2(rank)), **at)


@triton.jit
def low_rank_rows(inner, page, column0, CHUNK: tl.constexpr, S: tl.constexpr, G: tl.constexpr):
    """What the inner codec has of a chunk, float32 [CHUNK, block_dim], and the product."""
    r, token, d = tl.arange(0, S.block_rank), column0 + tl.arange(0, CHUNK), tl.arange(0, G.block_dim)
    left = (page + S.left).to(tl.pointer_type(tl.float16)) + token[:, None] * S.rank + r[None, :]
    right = (page + S.right).to(tl.pointer_type(tl.float16)) + r[:, None] * G.head_dim + d[None, :]
    left = tl.load(left, mask=(r < S.rank)[None, :], other=0.0)
    right = tl.load(right, mask=(r < S.rank)[:, None] & (d < G.head_dim)[None, :], other=0.0)
    return inner + dot(left, right)


@triton.jit
def encode_low_rank(page, rows, inner, first_counted, S: tl.constexpr, G: tl.constexpr):
    """Fit what the inner codec gets wrong of a tile; rows and inner are float32 [tile_tokens, block_dim]."""
    token, d = tl.arange(0, G.tile_tokens), tl.arange(0, G.block_dim)
    counted = (token >= first_counted)[:, None] & (d < G.head_dim)[None, :]
    error = tl.where(counted, rows - inner, 0.0)
    r = tl.arange(0, S.rank)
    directions = _first_directions(S, G)
    for _ in range(_ROUNDS):
        found = tl.zeros_like(directions)
        for i in range(S.rank):
            direction = tl.sum(tl.where((r == i)[:, None], directions, 0.0), 0)
            image = tl.sum(error * direction[None, :], 1)
            column = _independent(tl.sum(error * image[:, None], 0), found)
            found = tl.where((r == i)[:, None], column[None, :], found)
        directions = found
    for i in range(S.rank):
        right = tl.sum(tl.where((r == i)[:, None], directions, 0.0), 0).to(tl.float16)
        tl.store((page + S.right).to(tl.pointer_type(tl.float16)) + i * G.head_dim + d, right, mask=d < G.head_dim)
        left = tl.sum(error * right.to(tl.float32)[None, :], 1)
        left = tl.minimum(tl.maximum(left, -_FLOAT16_MAX), _FLOAT16_MAX).to(tl.float16)
        tl.store((page + S.left).to(tl.pointer_type(tl.float16)) + token * S.rank + i, left)


@triton.jit
def _first_directions(S: tl.constexpr, G: tl.constexpr):
    """Where the iteration starts, float32 [rank, block_dim] (`first_directions`)."""
    r, d = tl.arange(0, S.rank)[:, None], tl.arange(0, G.block_dim)[None, :]
    if G.block_dim == G.head_dim:
        x = r & d
        x ^= x >> 4
        x ^= x >> 2
        x ^= x >> 1
        result = (1 - 2 * (x & 1)).to(tl.float32)
    else:
        result = tl.cos(((2 * d + 1) * r).to(tl.float32) * (_PI / (2 * G.head_dim)))
        result = tl.where(d < G.head_dim, result, 0.0)
    return result


@triton.jit
def _independent(column, found):
    """The part of a column [block_dim] that is orthogonal to the rows found [rank, block_dim], of length 1, or 0."""
    column /= tl.maximum(tl.sqrt(tl.sum(column * column, 0)), _TINY)
    for _ in range(2):
        shares = tl.sum(found * column[None, :], 1)
        column -= tl.sum(found * shares[:, None], 0)
    length = tl.sqrt(tl.sum(column * column, 0))
    return tl.where(length > _LEAST_REST, column / tl.maximum(length, _LEAST_REST), 0.0)
