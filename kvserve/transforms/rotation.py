"""An orthogonal map of a head, which spreads a wide channel over all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from kvserve.codecs.lazy import torch
from kvserve.codecs.tile import Tables, TableSpec
from kvserve.transforms.base import Transform


@dataclass(frozen=True, kw_only=True)
class Rotation(Transform):
    """A normalised Hadamard matrix (QuaRot, arXiv 2404.00456), or each KV head's own calibrated one.

    Where head_dim is no power of two, the Hadamard matrix mixes blocks of the largest one that divides it.
    """

    name: Literal["rotation"] = "rotation"
    matrix: Literal["hadamard", "calibrated"] = "hadamard"

    def own_tables(self, head_dim: int) -> tuple[TableSpec, ...]:
        if self.matrix == "hadamard":
            return ()
        return (TableSpec("matrix", ("kv_heads", head_dim, head_dim), torch.float32),)

    def apply(self, rows: torch.Tensor, tables: Tables) -> torch.Tensor:
        return rows @ self._matrix(rows, tables).mT

    def undo(self, rows: torch.Tensor, tables: Tables) -> torch.Tensor:
        return rows @ self._matrix(rows, tables)

    def oppose(self, rows: torch.Tensor, tables: Tables) -> torch.Tensor:
        return self.apply(rows, tables)

    def describe(self) -> str:
        return "rotated by a Hadamard matrix" if self.matrix == "hadamard" else "rotated by calibrated matrices"

    def _matrix(self, rows: torch.Tensor, tables: Tables) -> torch.Tensor:
        if self.matrix == "calibrated":
            return tables["rotation.matrix"]
        return hadamard(rows.shape[-1]).to(rows.device)


@cache
def hadamard(head_dim: int) -> torch.Tensor:
    """Orthonormal and symmetric, block by block of the largest power of two that divides head_dim; float32."""
    block = torch.ones(1, 1)
    for _ in range((head_dim & -head_dim).bit_length() - 1):
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)]) / 2**0.5
    return torch.block_diag(*[block] * (head_dim // len(block)))
