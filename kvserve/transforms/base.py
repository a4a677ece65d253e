"""What a transform is: a linear map of the rows of each KV head, in front of the cache and behind it.

With T a head's matrix, key' = T key and query' = T^-T query leave every score as it was, and value' = T value,
output = T^-1 output' every answer: exact, whatever the positions. Codecs, dense slots and scorers see the mapped rows.
Rows are [tokens, kv_heads, rows of the head, head_dim]: one key or value, or the queries of a group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from kvserve.codecs.lazy import torch
from kvserve.codecs.tile import Tables, TableSpec


@dataclass(frozen=True, kw_only=True)
class Transform(ABC):
    """Parameters of one kind of map; subclasses give `name`, the word of YAML files, a default.

    Tables are those of a layer, their first axis the KV heads of the rank.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    name: str

    def tables(self, head_dim: int) -> dict[str, TableSpec]:
        """What it reads beside its parameters, by "transform name.table name"."""
        return {f"{self.name}.{spec.name}": spec for spec in self.own_tables(head_dim)}

    def own_tables(self, head_dim: int) -> tuple[TableSpec, ...]:
        """Its tables by their own names."""
        return ()

    @abstractmethod
    def apply(self, rows: torch.Tensor, tables: Tables) -> torch.Tensor:
        """T x of every row x, float32 as `rows`."""

    @abstractmethod
    def undo(self, rows: torch.Tensor, tables: Tables) -> torch.Tensor:
        """T^-1 x."""

    @abstractmethod
    def oppose(self, rows: torch.Tensor, tables: Tables) -> torch.Tensor:
        """T^-T x: what queries need where keys are mapped."""

    @abstractmethod
    def describe(self) -> str:
        """What it does, in words of the startup table."""
