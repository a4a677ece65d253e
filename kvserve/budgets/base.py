"""What a budget is: how many pages each layer and KV head may keep.

A budget never decides how many pages there are in all: that number is given, and given out to the last page.

Scores stay on their device, and so do the tokens that are chosen. Pages are counted on the CPU: what a choice reads
back are a few numbers for each head, of all heads at once, never scores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict

from kvserve.codecs.tile import TableSpec


class Bounds(NamedTuple):
    """What an allocation must obey: low <= pages <= high (int64 [layers, kv_heads], CPU) and sum(pages) == total."""

    low: torch.Tensor
    high: torch.Tensor
    total: int


class Choice(NamedTuple):
    """What every head keeps.

    Attributes:
        pages, counts: int64 [layers, kv_heads] on the CPU, pages and the tokens in them.
        tokens: [layer][kv_head], int64 [count] on the device of the scores, ascending.
    """

    pages: torch.Tensor
    counts: torch.Tensor
    tokens: list[list[torch.Tensor]]


class Budget(BaseModel, ABC):
    """Parameters of one way to divide pages; subclasses add a `name` that YAML files use.

    Attributes:
        reads: what the division depends on. "shape": not on scores, zeros will do. "layer": each layer's pages depend
            on no other layer's scores. "sequence": all layers compete, so all their scores must exist together.
        even: whether heads that hold equally many tokens get equally many pages, wherever the total allows it.
        names_heads: whether parameters name layers or heads of a model by their number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    reads: ClassVar[Literal["shape", "layer", "sequence"]]
    even: ClassVar[bool] = False
    names_heads: ClassVar[bool] = False

    def tables(self) -> dict[str, TableSpec]:
        """What it reads of a calibration, by name; for each layer, and with an axis of KV heads."""
        return {}

    def calibrated(self, tables: Mapping[str, torch.Tensor]) -> Budget:
        """This budget with what a calibration says in place of the word "calibrated".

        Args:
            tables: those of `tables`, [layers, kv_heads] of the whole model.
        """
        return self

    def check(self, num_layers: int, num_kv_heads: int) -> None:
        """Refuse a model that the parameters do not fit.

        Raises:
            ValueError: the message names the fix.
        """

    def part(self, layers: Sequence[int], kv_heads: range) -> Budget:
        """This budget for scores of some `layers` and `kv_heads` of a model alone, in this order."""
        return self

    def allocate(
        self, scores: torch.Tensor, page_tokens: int, total_pages: int, minimum_pages: int = 0
    ) -> torch.Tensor:
        """Divide `total_pages`.

        Args:
            scores: float32 [layers, kv_heads, n], higher = keep, +inf = protected; -inf marks a slot without a token,
                for heads that hold fewer than others. NaN is the lowest score that a token can have.
            page_tokens: tokens of one page of one head.
            total_pages: pages of all layers and heads together.
            minimum_pages: what each head keeps in any case, or all its pages if it has fewer.

        Returns:
            int64 [layers, kv_heads] on the CPU. No head gets more pages than its tokens fill, the last one partly; the
            sum is total_pages, or the number of pages that exist if that is less.

        Raises:
            ValueError: the minimum does not fit in total_pages.
        """
        scores = ordered(scores)
        return self._within(scores, page_tokens, total_pages, minimum_pages, held_counts(scores))

    def choose(self, scores: torch.Tensor, page_tokens: int, total_pages: int, spared: Sequence[int] = ()) -> Choice:
        """`allocate`, at least a page to each head, and the best tokens of each to fill its pages.

        Args:
            spared: layers that keep all their tokens; the pages that they leave are allocated to the others, as if
                there were no more layers than those.
        """
        scores = ordered(scores)
        held = held_counts(scores)
        if spared:
            pages = filled_pages(held, page_tokens)
            others = [layer for layer in range(len(scores)) if layer not in spared]
            left = total_pages - int(pages[list(spared)].sum())
            budget = self.part(others, range(scores.shape[1]))
            pages[others] = budget._within(scores[others], page_tokens, left, 1, held[others])
        else:
            pages = self._within(scores, page_tokens, total_pages, 1, held)
        counts = (pages * page_tokens).minimum(held)
        tokens = select(*(every.flatten(0, 1) for every in (scores, counts, held)))
        heads = scores.shape[1]
        return Choice(pages, counts, [tokens[first : first + heads] for first in range(0, len(tokens), heads)])

    def _within(
        self, scores: torch.Tensor, page_tokens: int, total_pages: int, minimum_pages: int, held: torch.Tensor
    ) -> torch.Tensor:
        high = filled_pages(held, page_tokens)
        low = high.clamp(max=minimum_pages)
        total = min(total_pages, int(high.sum()))
        if total < int(low.sum()):
            raise ValueError(f"{total_pages} pages are too few for {minimum_pages} in each of {low.numel()} heads")
        return self._allocate(scores, page_tokens, Bounds(low, high, total))

    @abstractmethod
    def _allocate(self, scores: torch.Tensor, page_tokens: int, bounds: Bounds) -> torch.Tensor:
        """`allocate`, within bounds that can be met."""


def ordered(scores: torch.Tensor) -> torch.Tensor:
    """Scores without NaN, which compares with nothing and which sorting puts first: it becomes the lowest number."""
    return scores.masked_fill(scores.isnan(), torch.finfo(scores.dtype).min)


def held_counts(scores: torch.Tensor) -> torch.Tensor:
    """Tokens that each head has among `scores` [..., n], int64 [...] on the CPU."""
    return (scores > -torch.inf).sum(-1).cpu()


def filled_pages(held: torch.Tensor, page_tokens: int) -> torch.Tensor:
    """Pages that so many tokens of a head fill."""
    return (held + page_tokens - 1) // page_tokens


def spread(wanted: torch.Tensor, bounds: Bounds, priority: torch.Tensor | None = None) -> torch.Tensor:
    """The pages of `bounds` close to `wanted` (int64, the same shape, CPU).

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


def select(scores: torch.Tensor, kept_tokens: torch.Tensor, held: torch.Tensor) -> list[torch.Tensor]:
    """The tokens each head keeps: its highest scores, the lower index where scores are equal.

    Args:
        scores: float32 [heads, n].
        kept_tokens, held: int64 [heads] on the CPU; `held` as `held_counts` gives it.

    Returns:
        For each head, int64 [kept_tokens[head]], ascending.

    Raises:
        ValueError: a head shall keep more tokens than it has (or fewer than none).
    """
    if bool(((kept_tokens > held) | (kept_tokens < 0)).any()):
        raise ValueError(f"heads with {held.tolist()} tokens cannot keep {kept_tokens.tolist()}")
    counts = kept_tokens.tolist()
    chosen = best(scores, counts)
    # `nonzero` would read its size back.
    return list(torch.nonzero_static(chosen, size=sum(counts))[:, 1].split(counts))


def best(scores: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Which of each row's scores are its `counts[row]` highest, the lower index where scores are equal.

    Args:
        scores: float [rows, n] without nan.

    Returns:
        bool [rows, n].
    """
    wanted = torch.tensor(counts).to(scores.device, non_blocking=True)[:, None]
    lowest = search_lowest(scores, counts) if scores.is_cpu else sort_lowest(scores, wanted)
    above, tied = scores > lowest, scores == lowest
    return above | (tied & (tied.cumsum(1) <= wanted - above.sum(1, keepdim=True)))


def search_lowest(scores: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """The counts[row]-th highest score of each row, [rows, 1]; the highest where that is 0. Sorts nothing."""
    size = scores.shape[1]
    found = [row.kthvalue(size - max(count, 1) + 1).values for row, count in zip(scores, counts, strict=True)]
    return torch.stack(found)[:, None]


def sort_lowest(scores: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The same by one sort of all rows, for a GPU; wanted: int64 [rows, 1]."""
    return scores.sort(dim=1, descending=True).values.gather(1, (wanted - 1).clamp_min(0))
