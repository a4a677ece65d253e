"""What StepEvictor tells others while it evicts: counts for metrics, positions for `kvserve inspect`."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Selection(NamedTuple):
    """What a cut makes of the tokens that the KV heads of one layer hold; indices count what a head holds, in order.

    Attributes:
        first, ends: head h chose among its tokens [first, ends[h]); those before (sinks) and behind them all stay.
        chosen: per KV head, int64 [kept], ascending; index i is the head's token first + i.
        scores: per KV head, float32 [ends[h] - first].
        sources: per KV head, int64 [kept], in the order of its kept pages: the token that each row is, or began as.
    """

    first: int
    ends: list[int]
    chosen: list[torch.Tensor]
    scores: list[torch.Tensor]
    sources: list[torch.Tensor]


class EvictionObserver:
    """Hears of evictions; this one does nothing with them. Layers and KV heads are those of one worker."""

    def selected(self, request_id: str, layer: int, selection: Selection) -> None:
        """What a layer keeps; `layer` is its index among this worker's attention layers."""

    def evicted(
        self, request_id: str, num_tokens: int, evicted: torch.Tensor, kept: torch.Tensor, demoted: torch.Tensor
    ) -> None:
        """A request was cut in all layers.

        Args:
            num_tokens: tokens of the request so far, evicted ones included.
            evicted: int64 [layers, kv_heads], tokens that were held before and are not any more.
            kept: int64 [layers, kv_heads], tokens held afterwards, sinks and unfinished tile included.
            demoted: int64 [layers, kv_heads], those of them that are in another format than the policy's own.
        """
