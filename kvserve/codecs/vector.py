"""Codes of a few neighbouring channels at once: coupled quantisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from kvserve.codecs.base import Codec
from kvserve.codecs.lazy import torch
from kvserve.codecs.tile import Parts, Section, Tables, TableSpec, Tile, TileShape

CENTROIDS = 256  # of one group of channels: a code is a byte


@dataclass(frozen=True, kw_only=True)
class Vector(Codec):
    """`couple` neighbouring channels share an 8-bit code: the nearest centroid (CQ, arXiv 2405.03917).

    Each KV head and each group of channels has its own codebook. The distance is the sum of squares, channel after
    channel in float32; of equally near centroids the first is taken. Codes are stored row by row.
    """

    kind: ClassVar[int] = 4

    name: Literal["vector"] = "vector"
    couple: Literal[2, 4, 8]

    def own_sections(self, shape: TileShape) -> tuple[Section, ...]:
        return (Section("codes", torch.uint8, (shape.tokens, shape.head_dim // self.couple), "codes"),)

    def own_tables(self, shape: TileShape) -> tuple[TableSpec, ...]:
        axes = ("kv_heads", shape.head_dim // self.couple, CENTROIDS, self.couple)
        return (TableSpec("codebook", axes, torch.float32),)

    def check_own(self, shape: TileShape) -> None:
        if shape.head_dim % self.couple:
            raise ValueError(
                f"{shape.half}.couple must divide head_dim, {self.couple} does not divide {shape.head_dim}"
            )

    def params(self, shape: TileShape) -> tuple[int, ...]:
        return (self.couple,)

    def encode(self, tile: Tile, shape: TileShape, tables: Tables) -> Parts:
        codebook, rows = tables["vector.codebook"], tile.rows.reshape(shape.tokens, -1, 1, self.couple)
        distance = torch.zeros(shape.tokens, *codebook.shape[:2])
        for channel in range(self.couple):
            distance += (rows[..., channel] - codebook[..., channel]).square()
        return (distance.argmin(-1).to(torch.uint8),)

    def decode(self, parts: Parts, shape: TileShape, tables: Tables, positions: torch.Tensor) -> torch.Tensor:
        codebook = tables["vector.codebook"]
        return codebook[torch.arange(len(codebook)), parts[0].long()].reshape(shape.tokens, shape.head_dim)

    def describe(self, shape: TileShape) -> str:
        return f"{8 / self.couple:g}-bit, one byte per {self.couple} channels in calibrated codebooks"
