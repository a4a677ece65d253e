"""One byte for a few neighbouring channels: their place in a codebook (kvserve/codecs/vector.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import triton
import triton.language as tl

from kvserve.codecs.base import Codec
from kvserve.codecs.tile import TileShape
from kvserve.codecs.vector import CENTROIDS

VECTOR: tl.constexpr = tl.constexpr(4)
_CENTROIDS: tl.constexpr = tl.constexpr(CENTROIDS)


class VectorStage(NamedTuple):
    """`codes`: offset in bytes from the page."""

    kind: int
    couple: int
    codes: int

    @classmethod
    def of(cls, codec: Codec, shape: TileShape, at: Mapping[str, int]) -> VectorStage:
        """`at`: offsets of the codec's own sections, by name."""
        return cls(codec.kind, *codec.params(shape), **at)


@triton.jit
def _centroids(codes, head, tables, S: tl.constexpr, G: tl.constexpr):
    """The centroids of codes [N, block_dim / couple], float32 [N, block_dim]; 0 from head_dim on."""
    GROUPS: tl.constexpr = G.block_dim // S.couple
    group, j = tl.arange(0, GROUPS)[None, :], tl.arange(0, S.couple)[None, None, :]
    place = (head * (G.head_dim // S.couple) + group) * _CENTROIDS + codes
    exist = (group < G.head_dim // S.couple)[:, :, None]
    rows = tl.load(tables.codebook + (place * S.couple)[:, :, None] + j, mask=exist, other=0.0)
    return tl.reshape(rows, [codes.shape[0], G.block_dim])


@triton.jit
def vector_rows(page, column0, head, tables, CHUNK: tl.constexpr, S: tl.constexpr, G: tl.constexpr):
    """`tables` (HalfTables) are those of all KV heads."""
    STORED: tl.constexpr = G.head_dim // S.couple
    token, group = column0 + tl.arange(0, CHUNK), tl.arange(0, G.block_dim // S.couple)[None, :]
    codes = tl.load(page + S.codes + token[:, None] * STORED + group, mask=group < STORED, other=0)
    return _centroids(codes.to(tl.int32), head, tables, S, G)


@triton.jit
def encode_vector(page, rows, head, tables, S: tl.constexpr, G: tl.constexpr):
    """Write a tile, float32 [tile_tokens, block_dim]; returns it as it will be read."""
    GROUPS: tl.constexpr = G.block_dim // S.couple
    STORED: tl.constexpr = G.head_dim // S.couple
    token, group, j = tl.arange(0, G.tile_tokens), tl.arange(0, GROUPS), tl.arange(0, S.couple)
    grouped = tl.reshape(rows, [G.tile_tokens, GROUPS, S.couple])
    at = tables.codebook + ((head * STORED + group) * (_CENTROIDS * S.couple))[:, None] + j[None, :]
    exist = (group < STORED)[:, None]
    nearest = tl.full([G.tile_tokens, GROUPS], float("inf"), tl.float32)
    codes = tl.zeros([G.tile_tokens, GROUPS], tl.int32)
    for code in range(_CENTROIDS):
        centroid = tl.load(at + code * S.couple, mask=exist, other=0.0)
        away = grouped - centroid[None, :, :]
        distance = tl.sum(away * away, 2)
        codes = tl.where(distance < nearest, code, codes)
        nearest = tl.minimum(distance, nearest)
    out = page + S.codes + token[:, None] * STORED + group[None, :]
    tl.store(out, codes.to(tl.uint8), mask=(group < STORED)[None, :])
    return _centroids(codes, head, tables, S, G)
