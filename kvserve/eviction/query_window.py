"""The query rows of one step, for scorers: the attention they pay is summed over pages, never materialised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from kvserve.attention.base import PagedAttention, Stored
from kvserve.scorers.query_window import QueryWindow


@dataclass(frozen=True, eq=False)
class PagedWindow(QueryWindow):
    """All query heads of one layer over the tokens one request holds.

    Attributes:
        kernels: the layer's attention.
        stored, query: as `PagedAttention.attention_sums` takes them.
    """

    kernels: PagedAttention
    stored: Stored
    query: torch.Tensor
    _sums: dict[tuple[int, int, str], torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def num_rows(self) -> int:
        return self.query.shape[0]

    def attention(self, rows: int, power: Literal[1, 2] = 1, reduce: Literal["sum", "max"] = "sum") -> torch.Tensor:
        """As QueryWindow; of an evicted request, each head's columns as `attention_sums` gives them."""
        asked = (rows, power, reduce)
        if asked not in self._sums:
            self._sums[asked] = self.kernels.attention_sums(self.query[-rows:], self.stored, power, reduce)
        return self._sums[asked]

    def by_head(self, held: Sequence[int]) -> list[QueryWindow]:
        """The query heads of each KV head, over the `held[kv_head]` tokens it holds; they share one computation."""
        return [_HeadWindow(self, kv_head, count) for kv_head, count in enumerate(held)]


@dataclass(frozen=True, eq=False)
class _HeadWindow(QueryWindow):
    layer: PagedWindow
    kv_head: int
    num_tokens: int

    @property
    def num_rows(self) -> int:
        return self.layer.num_rows

    def attention(self, rows: int, power: Literal[1, 2] = 1, reduce: Literal["sum", "max"] = "sum") -> torch.Tensor:
        group = self.layer.kernels.spec.group
        heads = slice(self.kv_head * group, (self.kv_head + 1) * group)
        return self.layer.attention(rows, power, reduce)[heads, : self.num_tokens]
