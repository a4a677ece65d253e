"""What a budget is: how many pages each layer and KV head may keep.

A budget never decides how many pages there are in all: that number is given, and given out to the last page.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict


class Bounds(NamedTuple):
    """What an allocation must obey: low <= pages <= high (int64 [layers, kv_heads]) and sum(pages) == total."""

    low: torch.Tensor
    high: torch.Tensor
    total: int


class Choice(NamedTuple):
    """What every head keeps.

    Attributes:
        pages, counts: int64 [layers, kv_heads], pages and the tokens in them.
        tokens: [layer][kv_head], int64 [count], ascending.
    """

    pages: torch.Tensor
    counts: torch.Tensor
    tokens: list[list[torch.Tensor]]


class Budget(BaseModel, ABC):
    """Parameters of one way to divide pages; subclasses add a `name` that YAML files use.

    Attributes:
        reads: what the division depends on. "shape": not on scores, zeros will do. "layer": each layer's pages depend
            on no other layer's scores. "sequence": all layers compete, so all their scores must exist together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    reads: ClassVar[Literal["shape", "layer", "sequence"]]

    def allocate(
        self, scores: torch.Tensor, page_tokens: int, total_pages: int, minimum_pages: int = 0
    ) -> torch.Tensor:
        """Divide `total_pages`.

        Args:
            scores: float32 [layers, kv_heads, n], higher = keep, +inf = protected; -inf marks a slot without a token,
                for heads that hold fewer than others.
            page_tokens: tokens of one page of one head.
            total_pages: pages of all layers and heads together.
            minimum_pages: what each head keeps in any case, or all its pages if it has fewer.

        Returns:
            int64 [layers, kv_heads]. No head gets more pages than its tokens fill, the last one partly; the sum is
            total_pages, or the number of pages that exist if that is less.

        Raises:
            ValueError: the minimum does not fit in total_pages.
        """
        high = filled_pages(scores, page_tokens)
        low = high.clamp(max=minimum_pages)
        total = min(total_pages, int(high.sum()))
        if total < int(low.sum()):
            raise ValueError(f"{total_pages} pages are too few for {minimum_pages} in each of {low.numel()} heads")
        return self._allocate(scores, page_tokens, Bounds(low, high, total))

    def choose(self, scores: torch.Tensor, page_tokens: int, total_pages: int, spared: Sequence[int] = ()) -> Choice:
        """`allocate`, at least a page to each head, and the best tokens of each to fill its pages.

        Args:
            spared: layers that keep all their tokens; the pages that they leave are allocated to the others, as if
                there were no more layers than those.
        """
        if spared:
            pages = filled_pages(scores, page_tokens)
            others = [layer for layer in range(len(scores)) if layer not in spared]
            left = total_pages - int(pages[list(spared)].sum())
            pages[others] = self.allocate(scores[others], page_tokens, left, minimum_pages=1)
        else:
            pages = self.allocate(scores, page_tokens, total_pages, minimum_pages=1)
        counts = (pages * page_tokens).minimum((scores > -torch.inf).sum(-1))
        return Choice(pages, counts, [select(*layer) for layer in zip(scores, counts, strict=True)])

    @abstractmethod
    def _allocate(self, scores: torch.Tensor, page_tokens: int, bounds: Bounds) -> torch.Tensor:
        """`allocate`, within bounds that can be met."""


def filled_pages(scores: torch.Tensor, page_tokens: int) -> torch.Tensor:
    """Pages that the tokens of each head fill, int64 [layers, kv_heads]."""
    return (scores > -torch.inf).sum(-1).add(page_tokens - 1) // page_tokens


def spread(wanted: torch.Tensor, bounds: Bounds, priority: torch.Tensor | None = None) -> torch.Tensor:
    """The pages of `bounds` close to `wanted` (int64, the same shape).

    What is missing or too much after clamping is shared out evenly among the heads that have room. Where an even
    share is less than a page, heads of higher priority, then lower index, come first; they are the last to give back.
    """
    low, high = bounds.low.flatten(), bounds.high.flatten()
    pages = wanted.flatten().clamp(low, high)
    order = torch.arange(pages.numel(), device=pages.device)
    if priority is not None:
        order = priority.flatten().sort(descending=True, stable=True).indices
    while gap := bounds.total - int(pages.sum()):
        room = high - pages if gap > 0 else pages - low
        ranked = order if gap > 0 else order.flip(0)
        open_heads = ranked[room[ranked] > 0]
        share = max(abs(gap) // open_heads.numel(), 1)
        chosen = open_heads[: abs(gap)]
        change = room[chosen].clamp(max=share)
        pages[chosen] += change if gap > 0 else -change
    return pages.view_as(wanted)


def select(scores: torch.Tensor, kept_tokens: torch.Tensor) -> list[torch.Tensor]:
    """The tokens each head keeps: its highest scores, the lower index where scores are equal.

    Args:
        scores: float32 [kv_heads, n].
        kept_tokens: int64 [kv_heads].

    Returns:
        For each head, int64 [kept_tokens[head]], ascending.

    Raises:
        ValueError: a head shall keep more tokens than it has (or fewer than none).
    """
    held = (scores > -torch.inf).sum(-1)
    if bool(((kept_tokens > held) | (kept_tokens < 0)).any()):
        raise ValueError(f"heads with {held.tolist()} tokens cannot keep {kept_tokens.tolist()}")
    return [best(row, count) for row, count in zip(scores, kept_tokens.tolist(), strict=True)]


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Ascending indices of the `count` highest of scores [n], the lower index where scores are equal.

    By the count-th highest score, found without sorting. No score may be nan.
    """
    if count == 0:
        return scores.new_zeros(0, dtype=torch.int64)
    lowest = scores.kthvalue(scores.numel() - count + 1).values
    above, tied = scores > lowest, scores == lowest
    chosen = above | (tied & (tied.cumsum(0) <= count - above.sum()))
    return chosen.nonzero()[:, 0]
