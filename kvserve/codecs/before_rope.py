"""Keys as they are before the rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from kvserve.codecs.lazy import torch
from kvserve.codecs.tile import Half, Parts, Section, Tables, TableSpec, Tile, TileShape
from kvserve.codecs.wrapper import Wrapper


@dataclass(frozen=True, kw_only=True)
class BeforeRope(Wrapper):
    """Takes the rotary embedding back before the inner codec writes keys, and applies it to what that one reads.

    Keys have steadier ranges per channel before it (KVQuant, arXiv 2401.18079).

    `rotary_dim` channels are turned (0: all), in pairs: channels i and i + rotary_dim / 2, or, `interleaved`, 2 i and
    2 i + 1. The table holds the model's own cosines and sines of every position, with whatever factor it gives both.
    """

    kind: ClassVar[int] = 7
    halves: ClassVar[tuple[Half, ...]] = (Half.KEY,)

    name: Literal["before-rope"] = "before-rope"
    rotary_dim: int = 0
    interleaved: bool = False

    @property
    def needs_positions(self) -> bool:
        return True

    def fixed_range(self, tables: Tables) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None  # the inner codec's is one of other rows

    def turned(self, shape: TileShape) -> int:
        """Channels that the embedding turns."""
        return self.rotary_dim or shape.head_dim

    def own_sections(self, shape: TileShape) -> tuple[Section, ...]:
        return ()

    def own_tables(self, shape: TileShape) -> tuple[TableSpec, ...]:
        return (TableSpec("rotary", (2, self.turned(shape) // 2, "positions"), torch.float32),)  # cosines, sines

    def check_own(self, shape: TileShape) -> None:
        if self.rotary_dim < 0 or self.rotary_dim % 2 or self.rotary_dim > shape.head_dim:
            raise ValueError(
                f"key.rotary_dim must be an even number up to head_dim ({shape.head_dim}), got {self.rotary_dim}; "
                "0 stands for head_dim"
            )

    def params(self, shape: TileShape) -> tuple[int, ...]:
        return self.turned(shape), int(self.interleaved)

    def encode(self, tile: Tile, shape: TileShape, tables: Tables) -> Parts:
        cosine, sine = self._angles(tables, tile.positions)
        first, second, rest = self._pairs(tile.rows, shape)
        squares = cosine.square() + sine.square()
        first, second = (first * cosine + second * sine) / squares, (second * cosine - first * sine) / squares
        return self.inner.encode(tile._replace(rows=self._joined(first, second, rest)), shape, tables)

    def decode(self, parts: Parts, shape: TileShape, tables: Tables, positions: torch.Tensor) -> torch.Tensor:
        cosine, sine = self._angles(tables, positions)
        first, second, rest = self._pairs(self.inner.decode(parts, shape, tables, positions), shape)
        return self._joined(first * cosine - second * sine, second * cosine + first * sine, rest)

    def _angles(self, tables: Tables, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, float32 [tokens, rotary_dim / 2]."""
        cosine, sine = tables["before-rope.rotary"][:, :, positions].transpose(1, 2)
        return cosine, sine

    def _pairs(self, rows: torch.Tensor, shape: TileShape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """First and second channel of each pair, and the channels that are not turned."""
        turned, rest = rows[:, : self.turned(shape)], rows[:, self.turned(shape) :]
        if self.interleaved:
            return turned[:, ::2], turned[:, 1::2], rest
        first, second = turned.chunk(2, 1)
        return first, second, rest

    def _joined(self, first: torch.Tensor, second: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        """Inverse of `_pairs`."""
        pairs = torch.stack([first, second], 2).flatten(1) if self.interleaved else torch.cat([first, second], 1)
        return torch.cat([pairs, rest], 1)

    def describe_own(self, shape: TileShape) -> str:
        return "before the rotary embedding"
