"""Affine codes: value = code * scale + low, by the smallest and the largest element of a group."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import ClassVar, Literal

from kvserve.codecs.base import Codec
from kvserve.codecs.lazy import torch
from kvserve.codecs.min_max import boosted_channels, quantise_min_max
from kvserve.codecs.packing import check_planes, pack_codes, pack_tile, planes_section, unpack_codes, unpack_tile
from kvserve.codecs.tile import Grouping, Half, Parts, Section, Tables, TableSpec, Tile, TileShape

BOOST_BITS = 2  # what a boosted channel has beside its 2-bit codes


@dataclass(frozen=True, kw_only=True)
class Affine(Codec):
    """Asymmetric min/max codes (KIVI, arXiv 2402.02750, section 3).

    With the axis "channel", the default of keys, `group_size` consecutive tokens share one (scale, low) of a channel;
    with "token", the default of values, `group_size` consecutive channels share one of a token (or as many as it and
    head_dim have as common divisor). 0: all of them. `boost_fraction` of the channels of a key tile, those with the
    widest range, get two more bits (Kitty, arXiv 2511.18643, section 4).

    With `clip` both ends of a token's group are multiplied by what is calibrated for the group, and elements beyond
    them get the nearest end (SKVQ, arXiv 2405.06219, section 3.2). Only writing knows of it. The paper stores scales
    and minima as FP8; here they are float16 as everywhere, 32 bits a group and not 16.
    """

    kind: ClassVar[int] = 1

    name: Literal["affine"] = "affine"
    bits: Literal[2, 4, 8]
    group_size: Literal[0, 32, 64, 128] = 0
    axis: Literal["channel", "token"] | None = None
    boost_fraction: Literal[0, 0.25, 0.5] = 0  # type: ignore[valid-type]
    clip: bool = False

    def __post_init__(self) -> None:
        if self.boost_fraction and self.bits != 2:
            raise ValueError("boost_fraction adds 2 bits to 2-bit codes: set key.bits to 2, or boost_fraction to 0")

    def grouping(self, shape: TileShape) -> Grouping:
        per_channel = (self.axis or ("channel" if shape.half is Half.KEY else "token")) == "channel"
        if per_channel:
            return Grouping(True, self.group_size or shape.tokens)
        size = self.group_size or shape.head_dim
        return Grouping(False, shape.head_dim if size >= shape.head_dim else gcd(size, shape.head_dim))

    def boosted(self, shape: TileShape) -> int:
        """Channels of a tile that get two more bits."""
        return int(shape.head_dim * self.boost_fraction)

    def own_sections(self, shape: TileShape) -> tuple[Section, ...]:
        (per_channel, size), boosted = self.grouping(shape), self.boosted(shape)
        count, lanes = (shape.tokens, shape.head_dim) if per_channel else (shape.head_dim, shape.tokens)
        codes = planes_section("codes", shape, self.bits)
        scales = Section("scales", torch.float16, (count // size, 2, lanes), "scales")  # [group][scale, low][lane]
        if not boosted:
            return codes, scales
        boost_codes = Section("boost_codes", torch.uint8, (boosted * shape.tokens * BOOST_BITS // 8,), "codes")
        return codes, boost_codes, scales, Section("boost_index", torch.uint8, (boosted,), "index")

    def own_tables(self, shape: TileShape) -> tuple[TableSpec, ...]:
        if not self.clip:
            return ()
        groups = shape.head_dim // self.grouping(shape).size
        return (TableSpec("clip", ("kv_heads", groups), torch.float32),)  # above 0, at most 1

    def check_own(self, shape: TileShape) -> None:
        check_planes(shape, self.bits)
        per_channel, size = self.grouping(shape)
        if per_channel and size > shape.tokens:
            raise ValueError(f"{shape.half}.group_size must be at most tile_tokens ({shape.tokens})")
        if self.boost_fraction and not (per_channel and shape.half is Half.KEY):
            raise ValueError(f"boost_fraction is for keys with a scale per channel: leave it out of {shape.half}")
        if self.clip and per_channel:
            raise ValueError(f"clip is for a scale per token: set {shape.half}.axis to token, or leave clip out")

    def params(self, shape: TileShape) -> tuple[int, ...]:
        per_channel, size = self.grouping(shape)
        return self.bits, size, self.boosted(shape), int(not per_channel), int(self.clip)

    def encode(self, tile: Tile, shape: TileShape, tables: Tables) -> Parts:
        per_channel, size = self.grouping(shape)
        if not per_channel:
            clip = tables["affine.clip"][:, None, None] if self.clip else None
            coded = quantise_min_max(tile.rows.reshape(shape.tokens, -1, size, 1), self.bits, clip=clip)
            scales = torch.stack([coded.scale[..., 0, 0].T, coded.low[..., 0, 0].T], 1)
            return pack_tile(coded.codes.reshape(tile.rows.shape), shape, self.bits), scales
        groups, counted = tile.rows.reshape(-1, size, shape.head_dim), tile.counted.reshape(-1, size, 1)
        coded = quantise_min_max(groups, self.bits, counted)
        codes, scale, low = coded.codes.reshape(tile.rows.shape), coded.scale[:, 0], coded.low[:, 0]
        if not (boosted := self.boosted(shape)):
            return pack_tile(codes, shape, self.bits), torch.stack([scale, low], 1)
        index = boosted_channels(tile.rows, tile.counted[:, None], boosted)
        fine = quantise_min_max(groups, self.bits + BOOST_BITS, counted)
        fine_codes = fine.codes.reshape(tile.rows.shape)[:, index]
        codes[:, index] = fine_codes & 3
        scale[:, index], low[:, index] = fine.scale[:, 0, index], fine.low[:, 0, index]
        boost_codes = pack_codes((fine_codes >> self.bits).T, BOOST_BITS)
        return pack_tile(codes, shape, self.bits), boost_codes, torch.stack([scale, low], 1), index.to(torch.uint8)

    def decode(self, parts: Parts, shape: TileShape, tables: Tables, positions: torch.Tensor) -> torch.Tensor:
        per_channel, size = self.grouping(shape)
        codes = unpack_tile(parts[0], shape, self.bits)
        if boosted := self.boosted(shape):
            index = parts[3].long().clamp_max(shape.head_dim - 1)  # whatever a damaged page has
            upper = unpack_codes(parts[1], BOOST_BITS, boosted, shape.tokens).T << self.bits
            codes.index_add_(1, index, upper.to(codes.dtype))
        scales = parts[2 if boosted else 1].float()
        if per_channel:
            rows = codes.reshape(-1, size, shape.head_dim) * scales[:, 0, None] + scales[:, 1, None]
        else:
            rows = codes.reshape(shape.tokens, -1, size) * scales[:, 0].T[..., None] + scales[:, 1].T[..., None]
        return rows.reshape(shape.tokens, shape.head_dim)

    def describe(self, shape: TileShape) -> str:
        per_channel, size = self.grouping(shape)
        if per_channel:
            boost = f", {count} channels at {self.bits + BOOST_BITS} bits" if (count := self.boosted(shape)) else ""
            return f"{self.bits}-bit per channel, groups of {size} tokens{boost}"
        asked = min(self.group_size or shape.head_dim, shape.head_dim)
        differs = "" if size == asked else f" ({self.group_size} asked, they do not divide {shape.head_dim})"
        clipped = ", ranges clipped as calibrated" if self.clip else ""
        return f"{self.bits}-bit per token, groups of {size}{differs}{clipped}"
