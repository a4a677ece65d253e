"""Channels of a head divided by factors, so that wide ones don't set the scale of their group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvserve.codecs.lazy import torch
from kvserve.codecs.tile import Tables, TableSpec
from kvserve.transforms.base import Transform


@dataclass(frozen=True, kw_only=True)
class Scale(Transform):
    """Smoothing (QServe, arXiv 2405.04532, section 4.2, "SmoothAttention"): T x = x / factor, factors above 0."""

    name: Literal["scale"] = "scale"

    def own_tables(self, head_dim: int) -> tuple[TableSpec, ...]:
        return (TableSpec("factor", ("kv_heads", head_dim), torch.float32),)

    def apply(self, rows: torch.Tensor, tables: Tables) -> torch.Tensor:
        return rows / tables["scale.factor"][:, None]

    def undo(self, rows: torch.Tensor, tables: Tables) -> torch.Tensor:
        return rows * tables["scale.factor"][:, None]

    def oppose(self, rows: torch.Tensor, tables: Tables) -> torch.Tensor:
        return self.undo(rows, tables)

    def describe(self) -> str:
        return "channels divided by calibrated factors"
