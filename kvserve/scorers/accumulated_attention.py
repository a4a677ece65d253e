"""Attention that each token has received so far."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from kvserve.scorers.base import Accumulation, LayerView, Scorer, protect


class AccumulatedAttention(Scorer):
    """Heavy hitters: attention received, summed over all query rows, and the newest tokens for good.

    H2O (arXiv 2306.14048) keeps as many recent tokens as heavy hitters, 10 % of the prompt each; here
    `recent_share` of whatever a head keeps on average is recent. Sums favour early tokens, which more rows have seen:
    `per_row` divides by the number of rows that could see the token (kvpress's ObservedAttention, not in the paper).

    Attributes:
        exponent: which power of the probability must be accumulated; 2 is KV-Compress' (arXiv 2410.00161).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"accumulated", "kept_tokens"})
    query_agnostic: ClassVar[bool] = False

    name: Literal["accumulated-attention"] = "accumulated-attention"
    exponent: Literal[1, 2] = 1
    recent_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    per_row: bool = False

    @property
    def accumulation(self) -> Accumulation:
        return Accumulation(self.exponent)

    def _score(self, view: LayerView) -> torch.Tensor:
        assert view.accumulated is not None and view.kept_tokens is not None
        scores = view.accumulated.float()
        if self.per_row:
            scores = scores / (view.length - view.positions)
        return protect(scores, 0, int(self.recent_share * view.kept_tokens))
