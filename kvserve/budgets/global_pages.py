"""All pages of all heads and layers compete."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch.nn import functional

from kvserve.budgets.base import Bounds, Budget, best


class GlobalPages(Budget):
    """Keep the best pages of the whole sequence (KV-Compress, arXiv 2410.00161).

    A head's tokens, sorted by score, fill its pages from the best to the worst; giving up m pages evicts what is in
    its last m. A page is worth the best token that goes with it (metric: max, the authors' choice) or the mean of its
    tokens. Either way a head's pages are worth less and less, so the best pages overall are the first ones of each
    head. Equally good pages: the head's better-ranked page first, then the lower layer and head.

    There is no sum: full pages rank by it as by the mean, and the partly filled one would rank by how full it is.
    Scores must be comparable between heads and layers.
    """

    reads: ClassVar[Literal["shape", "layer", "sequence"]] = "sequence"

    name: Literal["global-pages"] = "global-pages"
    metric: Literal["max", "mean"] = "max"

    def _allocate(self, scores: torch.Tensor, page_tokens: int, bounds: Bounds) -> torch.Tensor:
        worth = self._page_worth(scores, page_tokens).movedim(-1, 0)  # [pages, layers, heads]
        low, high = (bound.to(scores.device, non_blocking=True) for bound in (bounds.low, bounds.high))
        page = torch.arange(worth.shape[0], device=scores.device)[:, None, None]
        contested = worth.where((page >= low) & (page < high), -torch.inf)
        kept = best(contested.reshape(1, -1), [bounds.total - int(bounds.low.sum())])
        return bounds.low + kept.view_as(worth).sum(0).cpu()

    def _page_worth(self, scores: torch.Tensor, page_tokens: int) -> torch.Tensor:
        """Float64 [layers, kv_heads, pages]; anything for pages that do not exist."""
        ranked = scores.sort(dim=-1, descending=True).values.double()
        if self.metric == "max":
            return ranked[..., ::page_tokens]
        padding = -ranked.shape[-1] % page_tokens
        pages = functional.pad(ranked, (0, padding), value=-torch.inf).unflatten(-1, (-1, page_tokens))
        filled = pages > -torch.inf
        return pages.where(filled, 0).sum(-1) / filled.sum(-1)
