"""More for the first layers, fewer for the last."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from kvserve.budgets.base import Bounds, Budget, spread


class Pyramid(Budget):
    """Budgets that fall linearly with the layer (PyramidKV, arXiv 2406.02069).

    With B tokens per head on average beyond the protected minimum, the last layer gets B // beta of them and the first
    2B - B // beta. Where the first layer has fewer tokens than that, it keeps all and the last layer gains; a prompt
    of fewer than 2B tokens is divided uniformly, as in the authors' code. Steps between layers are not rounded, so
    that no tokens are lost or gained; whole pages left over go to the first layers.
    """

    reads: ClassVar[Literal["shape", "layer", "sequence"]] = "shape"

    name: Literal["pyramid"] = "pyramid"
    beta: Annotated[int, Field(ge=1, le=1000)] = 20

    def _allocate(self, scores: torch.Tensor, page_tokens: int, bounds: Bounds) -> torch.Tensor:
        layers, heads, n = scores.shape
        minimum = int(bounds.low.max()) * page_tokens
        base = max(bounds.total * page_tokens // (layers * heads) - minimum, 0)
        if layers == 1 or n < 2 * base:
            return spread(torch.zeros_like(bounds.low), bounds)
        first = max(min(2 * base - base // self.beta, n - minimum), base)
        last = 2 * base - first
        steps = layers - 1
        wanted = [  # pages of a layer: heads * tokens per head / page_tokens, in whole numbers throughout
            heads * ((first + minimum) * steps - layer * (first - last)) // (steps * page_tokens)
            for layer in range(layers)
        ]
        by_layer = Bounds(bounds.low.sum(1), bounds.high.sum(1), bounds.total)
        totals = spread(torch.tensor(wanted), by_layer)
        return torch.stack(
            [
                spread(torch.zeros_like(low), Bounds(low, high, total))
                for low, high, total in zip(bounds.low, bounds.high, totals.tolist(), strict=True)
            ]
        )
