"""Every head the same."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from kvserve.budgets.base import Bounds, Budget, spread


class Uniform(Budget):
    """The same number of pages for every head of every layer; a remainder goes to the first ones."""

    reads: ClassVar[Literal["shape", "layer", "sequence"]] = "shape"
    even: ClassVar[bool] = True

    name: Literal["uniform"] = "uniform"

    def _allocate(self, scores: torch.Tensor, page_tokens: int, bounds: Bounds) -> torch.Tensor:
        return spread(torch.zeros_like(bounds.low), bounds)
