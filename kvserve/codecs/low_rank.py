"""What another codec gets wrong, as the product of two thin matrices."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi
from typing import ClassVar, Literal

from kvserve.codecs.base import FLOAT16_MAX
from kvserve.codecs.lazy import torch
from kvserve.codecs.tile import Parts, Section, Tables, Tile, TileShape
from kvserve.codecs.wrapper import Wrapper

ROUNDS = 3  # of the subspace iteration
LEAST_REST = 2.0**-10  # a direction that is left with a smaller share of its length is that of rounding errors


@dataclass(frozen=True, kw_only=True)
class LowRank(Wrapper):
    """Adds left @ right to the inner codec's rows, fitted to its error with `rank` columns (GEAR, arXiv 2403.05527).

    E = rows - what the inner codec reads back, 0 where tokens are not counted. From `first_directions` on, three times:
    directions = E^T E directions, made orthonormal. right is their transpose, as stored, and left = E @ right^T. What
    kernels store may differ in rounding.
    """

    kind: ClassVar[int] = 6

    name: Literal["low-rank"] = "low-rank"
    rank: Literal[1, 2, 4, 8]

    def own_sections(self, shape: TileShape) -> tuple[Section, ...]:
        left = Section("left", torch.float16, (shape.tokens, self.rank), "scales")
        return left, Section("right", torch.float16, (self.rank, shape.head_dim), "scales")

    def params(self, shape: TileShape) -> tuple[int, ...]:
        return (self.rank,)

    def encode(self, tile: Tile, shape: TileShape, tables: Tables) -> Parts:
        inner = self.inner.encode(tile, shape, tables)
        error = tile.rows - self.inner.decode(inner, shape, tables, tile.positions)
        error = error.masked_fill(~tile.counted[:, None], 0.0)
        directions = first_directions(shape.head_dim, self.rank)
        for _ in range(ROUNDS):
            directions = orthonormal(error.T @ (error @ directions))
        right = directions.T.half()
        left = (error @ right.float().T).clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
        return left, right, *inner

    def decode(self, parts: Parts, shape: TileShape, tables: Tables, positions: torch.Tensor) -> torch.Tensor:
        (left, right), inner = self.split(parts, shape)
        return self.inner.decode(inner, shape, tables, positions) + left.float() @ right.float()

    def describe_own(self, shape: TileShape) -> str:
        return f"its error to rank {self.rank}"


def first_directions(head_dim: int, rank: int) -> torch.Tensor:
    """Where the iteration starts, float32 [head_dim, rank].

    The first columns of Sylvester's Hadamard matrix; where head_dim is no power of two, those of a cosine transform.
    """
    if head_dim & (head_dim - 1) == 0:
        return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(rank)] for i in range(head_dim)])
    return torch.tensor([[cos(pi * (2 * i + 1) * j / (2 * head_dim)) for j in range(rank)] for i in range(head_dim)])


def orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """Gram-Schmidt, twice over each column of float32 [rows, rank]; one that depends on those before it becomes 0."""
    done: list[torch.Tensor] = []
    for column in columns.T:
        rest = column / column.norm().clamp_min(torch.finfo(torch.float32).tiny)
        for _ in range(2):
            for other in done:
                rest = rest - (other @ rest) * other
        length = rest.norm()
        done.append(rest / length if length > LEAST_REST else torch.zeros_like(rest))
    return torch.stack(done, 1)
