"""Keys as they are before the rotary embedding (kvserve/codecs/before_rope.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import triton
import triton.language as tl

from kvserve.codecs.base import Codec
from kvserve.codecs.tile import TileShape

BEFORE_ROPE: tl.constexpr = tl.constexpr(7)


class BeforeRopeStage(NamedTuple):
    """Channels that are turned, and whether neighbours are a pair."""

    kind: int
    rotary_dim: int
    interleaved: bool

    @classmethod
    def of(cls, codec: Codec, shape: TileShape, at: Mapping[str, int]) -> BeforeRopeStage:
        """`at` is empty: nothing is stored."""
        rotary_dim, interleaved = codec.params(shape)
        return cls(codec.kind, rotary_dim, bool(interleaved), **at)


@triton.jit
def turned_rows(rows, first_position, tables, BACK: tl.constexpr, S: tl.constexpr, G: tl.constexpr):
    """Rows [N, block_dim] of consecutive positions with the rotary embedding, or with it taken BACK."""
    N: tl.constexpr = rows.shape[0]
    d = tl.arange(0, G.block_dim)
    HALF: tl.constexpr = S.rotary_dim // 2
    if S.interleaved:
        is_second = d % 2 == 1
        pair, partner = d // 2, tl.where(is_second, d - 1, d + 1)
    else:
        is_second = d >= HALF
        pair, partner = tl.where(is_second, d - HALF, d), tl.where(is_second, d - HALF, d + HALF)
    is_turned = d < S.rotary_dim
    partner = tl.where(is_turned, partner, d)
    partners = tl.gather(rows, tl.broadcast_to(partner[None, :], [N, G.block_dim]), 1)
    positions = (first_position + tl.arange(0, N))[:, None]
    at = tables.rotary + pair[None, :] * tables.positions + positions
    cosine = tl.load(at, mask=is_turned[None, :], other=1.0)
    sine = tl.load(at + HALF * tables.positions, mask=is_turned[None, :], other=0.0)
    if BACK:
        signed = tl.where(is_second[None, :], -sine, sine)
        turned = tl.div_rn(rows * cosine + partners * signed, cosine * cosine + sine * sine)
    else:
        signed = tl.where(is_second[None, :], sine, -sine)
        turned = rows * cosine + partners * signed
    return turned
