"""Channels of a head in another order, so that those of alike range share a scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvserve.codecs.lazy import torch
from kvserve.codecs.tile import Tables, TableSpec
from kvserve.transforms.base import Transform


@dataclass(frozen=True, kw_only=True)
class Permutation(Transform):
    """Each KV head has its calibrated order (SKVQ, arXiv 2405.06219, section 3.1): T x = x[order]."""

    name: Literal["permutation"] = "permutation"

    def own_tables(self, head_dim: int) -> tuple[TableSpec, ...]:
        return (TableSpec("order", ("kv_heads", head_dim), torch.int32),)

    def apply(self, rows: torch.Tensor, tables: Tables) -> torch.Tensor:
        return _taken(rows, tables["permutation.order"].long())

    def undo(self, rows: torch.Tensor, tables: Tables) -> torch.Tensor:
        return _taken(rows, tables["permutation.order"].long().argsort(1))

    def oppose(self, rows: torch.Tensor, tables: Tables) -> torch.Tensor:
        return self.apply(rows, tables)

    def describe(self) -> str:
        return "channels in a calibrated order"


def _taken(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return rows.gather(3, order[None, :, None].expand(rows.shape))
