"""Codes that are places in a short table of levels, which calibration has fitted ("nuq")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from kvserve.codecs.base import FLOAT16_MAX, MIN_SCALE, Codec
from kvserve.codecs.lazy import torch
from kvserve.codecs.packing import check_planes, pack_tile, planes_section, unpack_tile
from kvserve.codecs.tile import Grouping, Half, Parts, Section, Tables, TableSpec, Tile, TileShape


@dataclass(frozen=True, kw_only=True)
class Table(Codec):
    """value = level[code] * half range + middle (KVQuant's non-uniform datatype, arXiv 2401.18079).

    The 2**bits ascending levels lie in [-1, 1]. With the norm "channel", the default of keys, middle and half range of
    a channel are calibrated; with "token", the default of values, they are those of each token's smallest and largest
    element, stored as float16. An element gets the nearest level, the lower one where two are equally near.

    Codes are packed as the low two bits and, of 3-bit codes, the third one behind them; 4-bit codes as they are.
    """

    kind: ClassVar[int] = 3

    name: Literal["table"] = "table"
    bits: Literal[2, 3, 4]
    norm: Literal["channel", "token"] | None = None

    def is_fixed(self, half: Half) -> bool:
        """Whether ranges are calibrated."""
        return (self.norm or ("channel" if half is Half.KEY else "token")) == "channel"

    def grouping(self, shape: TileShape) -> Grouping:
        fixed = self.is_fixed(shape.half)
        return Grouping(fixed, shape.tokens if fixed else shape.head_dim)

    def fixed_range(self, tables: Tables) -> tuple[torch.Tensor, torch.Tensor] | None:
        if "table.range" not in tables:
            return None
        half_range, middle = tables["table.range"]
        return middle, half_range.clamp_min(MIN_SCALE)

    def own_sections(self, shape: TileShape) -> tuple[Section, ...]:
        sections = [planes_section("codes", shape, self.bits & ~1)]
        if self.bits == 3:
            sections.append(planes_section("high", shape, 1))
        if not self.is_fixed(shape.half):
            sections.append(Section("scales", torch.float16, (2, shape.tokens), "scales"))  # half ranges, middles
        return tuple(sections)

    def own_tables(self, shape: TileShape) -> tuple[TableSpec, ...]:
        levels = TableSpec("levels", (1 << self.bits,), torch.float32)
        if not self.is_fixed(shape.half):
            return (levels,)
        return levels, TableSpec("range", ("kv_heads", 2, shape.head_dim), torch.float32)  # half ranges, middles

    def check_own(self, shape: TileShape) -> None:
        for bits in (2, 1) if self.bits == 3 else (self.bits,):
            check_planes(shape, bits)

    def params(self, shape: TileShape) -> tuple[int, ...]:
        return self.bits, int(not self.is_fixed(shape.half))

    def encode(self, tile: Tile, shape: TileShape, tables: Tables) -> Parts:
        scales: Parts = ()
        if self.is_fixed(shape.half):
            fixed = self.fixed_range(tables)
            assert fixed is not None
            middle, half_range = fixed
        else:
            low, high = tile.rows.amin(1), tile.rows.amax(1)
            stored = torch.stack([
                ((high - low) * 0.5).clamp(MIN_SCALE, FLOAT16_MAX),
                ((high + low) * 0.5).clamp(-FLOAT16_MAX, FLOAT16_MAX),
            ]).half()  # fmt: skip
            scales, (half_range, middle) = (stored,), stored.float()[..., None]
        levels = tables["table.levels"]
        borders = (levels[1:] + levels[:-1]) * 0.5
        codes = ((tile.rows - middle) * (1.0 / half_range))[..., None].gt(borders).sum(-1, dtype=torch.int32)
        if self.bits != 3:
            return pack_tile(codes, shape, self.bits), *scales
        return pack_tile(codes & 3, shape, 2), pack_tile(codes >> 2, shape, 1), *scales

    def decode(self, parts: Parts, shape: TileShape, tables: Tables, positions: torch.Tensor) -> torch.Tensor:
        codes = unpack_tile(parts[0], shape, self.bits & ~1)
        if self.bits == 3:
            codes = codes + (unpack_tile(parts[1], shape, 1) << 2)
        if self.is_fixed(shape.half):
            fixed = self.fixed_range(tables)
            assert fixed is not None
            middle, half_range = fixed
        else:
            half_range, middle = parts[-1].float()[..., None]
        return tables["table.levels"][codes.long()] * half_range + middle

    def describe(self, shape: TileShape) -> str:
        ranges = "calibrated ranges of channels" if self.is_fixed(shape.half) else "a range per token"
        return f"{self.bits}-bit places in a calibrated table, {ranges}"
