"""Where the parts of one tile lie: codes, then scales, then indices, keys before values in each."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from kvserve.codecs.base import Codec
from kvserve.codecs.layer_tables import tables_of_half
from kvserve.codecs.lazy import torch
from kvserve.codecs.tile import Half, Section, Tables, Tile, TileShape

SECTION_ALIGN_BYTES = 64
MASS_BYTES = 4
ROLES = ("codes", "scales", "index")


def align(size_bytes: int) -> int:
    """Round up to a cache line."""
    return ceil(size_bytes / SECTION_ALIGN_BYTES) * SECTION_ALIGN_BYTES


class Place(NamedTuple):
    section: Section
    offset: int  # bytes from the start of the tile


@dataclass(frozen=True)
class TileFormat:
    """The bytes of one sealed tile of one KV head.

    A dense tile has no codecs: it is its tokens' dense slots one after the other, [tokens][K row, V row][head_dim] of
    `dense_dtype`.

    Attributes:
        keys, values: the places of the codecs' sections, in the order of `Codec.sections`.
        tile_bytes: a whole number of bytes per token, so that vLLM can see a tile as that many equal states.
        mass: offset of the tokens' log-masses, float32 [tokens], behind all sections; None: every token stands for
            itself. A log-mass is added to its token's logit: the log of how many tokens it stands for.
    """

    tokens: int
    head_dim: int
    tile_bytes: int
    key: Codec | None = None
    value: Codec | None = None
    keys: tuple[Place, ...] = ()
    values: tuple[Place, ...] = ()
    dense_dtype: torch.dtype | None = None
    mass: int | None = None

    @classmethod
    def of(cls, key: Codec, value: Codec, tokens: int, head_dim: int, has_mass: bool = False) -> TileFormat:
        """Lay out what two codecs write, and log-masses if the tiles have them.

        Raises:
            ValueError: a codec cannot write such tiles; the message names the fix.
        """
        codecs, places, offset = {Half.KEY: key, Half.VALUE: value}, {}, 0
        shapes = {half: TileShape(half, tokens, head_dim) for half in codecs}
        for half, codec in codecs.items():
            codec.check(shapes[half])
        sections = {half: codec.sections(shapes[half]) for half, codec in codecs.items()}
        for role in ROLES:
            for half in codecs:
                for index, section in enumerate(sections[half]):
                    if section.role == role:
                        places[half, index] = Place(section, offset)
                        offset = align(offset + section.size_bytes)
        keys, values = (tuple(places[half, i] for i in range(len(sections[half]))) for half in codecs)
        end = align(offset + tokens * MASS_BYTES) if has_mass else offset
        mass = offset if has_mass else None
        return cls(tokens, head_dim, ceil(end / tokens) * tokens, key, value, keys, values, mass=mass)

    @classmethod
    def dense(cls, tokens: int, head_dim: int, dtype: torch.dtype) -> TileFormat:
        """Tiles that keep their rows as they are."""
        return cls(tokens, head_dim, tokens * 2 * head_dim * dtype.itemsize, dense_dtype=dtype)

    def shape(self, half: Half) -> TileShape:
        return TileShape(half, self.tokens, self.head_dim)

    def half(self, half: Half) -> tuple[Codec, tuple[Place, ...]]:
        """The codec of a half and the places of its sections."""
        codec, places = (self.key, self.keys) if half is Half.KEY else (self.value, self.values)
        assert codec is not None, "a dense tile has no codecs"
        return codec, places

    def encode_tile(
        self, key: Tile, value: Tile, tables: Tables | None = None, log_mass: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Write one tile of one KV head, uint8 [tile_bytes], padding 0.

        Args:
            tables: as `tables_of_head` gives them.
            log_mass: float32 [at most tokens], of the first ones; the others, and all where it is None, have 0.
        """
        assert log_mass is None or self.mass is not None, "a tile without log-masses"
        if self.dense_dtype is not None:
            return torch.stack([key.rows, value.rows], 1).to(self.dense_dtype).view(torch.uint8).flatten()
        data = torch.zeros(self.tile_bytes, dtype=torch.uint8)
        for half, tile in ((Half.KEY, key), (Half.VALUE, value)):
            codec, places = self.half(half)
            parts = codec.encode(tile, self.shape(half), tables_of_half(tables, half))
            for (section, offset), part in zip(places, parts, strict=True):
                assert part.dtype == section.dtype and tuple(part.shape) == section.shape, f"{codec.name}: {section}"
                data[offset : offset + section.size_bytes] = part.contiguous().view(torch.uint8).flatten()
        if log_mass is not None:
            self.log_mass(data)[: len(log_mass)] = log_mass
        return data

    def log_mass(self, data: torch.Tensor) -> torch.Tensor:
        """The log-masses of a tile that has them, a view of its bytes, float32 [tokens]."""
        assert self.mass is not None, "a tile without log-masses"
        return data[self.mass : self.mass + self.tokens * MASS_BYTES].view(torch.float32)

    def decode_tile(
        self, data: torch.Tensor, positions: torch.Tensor | None = None, tables: Tables | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read one tile back: (key, value), float32 [tokens, head_dim]; values stay rotated.

        Args:
            positions: int64 [tokens], of the tokens; None: those of a sequence's first tile.
        """
        if self.dense_dtype is not None:
            rows = data.view(self.dense_dtype).view(self.tokens, 2, self.head_dim).float()
            return rows[:, 0], rows[:, 1]
        positions = torch.arange(self.tokens) if positions is None else positions
        return self._decode(data, Half.KEY, positions, tables), self._decode(data, Half.VALUE, positions, tables)

    def _decode(self, data: torch.Tensor, half: Half, positions: torch.Tensor, tables: Tables | None) -> torch.Tensor:
        codec, places = self.half(half)
        parts = tuple(
            data[offset : offset + section.size_bytes].contiguous().view(section.dtype).view(section.shape)
            for section, offset in places
        )
        return codec.decode(parts, self.shape(half), tables_of_half(tables, half), positions)
