"""The heads of a layer compete for the layer's pages."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from kvserve.budgets.base import Bounds, Budget, best, held_counts, spread


class HeadsInLayer(Budget):
    """Each head gets what its tokens win among the best of its layer (Ada-KV, arXiv 2407.11550).

    Layers get equal pages. In a layer of H heads that may keep T tokens, head h owns c_h of the T highest scores; it
    gets (1 - floor) * c_h + floor * T / H tokens, in whole pages by largest remainder. `floor` is the safeguard that
    the authors' code calls alpha: 1 is uniform. Scores must be comparable between heads: attention is, key norms are
    not.
    """

    reads: ClassVar[Literal["shape", "layer", "sequence"]] = "layer"

    name: Literal["heads-in-layer"] = "heads-in-layer"
    floor: Annotated[float, Field(ge=0, le=1)] = 0.2

    def _allocate(self, scores: torch.Tensor, page_tokens: int, bounds: Bounds) -> torch.Tensor:
        heads = scores.shape[1]
        by_layer = Bounds(bounds.low.sum(1), bounds.high.sum(1), bounds.total)
        totals = spread(torch.zeros_like(by_layer.low), by_layer)
        budgets = (totals * page_tokens).minimum(held_counts(scores.flatten(1)))  # tokens of each layer
        # Rank-major, so that equal scores are won by turns and not all by the first head.
        ranked = scores.sort(dim=-1, descending=True).values.transpose(1, 2).flatten(1)
        won = best(ranked, budgets.tolist()).unflatten(1, (-1, heads)).sum(1).cpu()
        pages = ((1 - self.floor) * won.double() + self.floor * budgets[:, None].double() / heads) / page_tokens
        whole = (pages + 1e-9).floor()  # 2.9999999 is 3
        return torch.stack(
            [
                spread(wanted, Bounds(low, high, total), priority)
                for wanted, low, high, total, priority in zip(
                    whole.long(), bounds.low, bounds.high, totals.tolist(), pages - whole, strict=True
                )
            ]
        )
