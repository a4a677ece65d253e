"""What StepEvictor tells others while it evicts: counts for metrics, positions for `kvserve inspect`."""

from __future__ import annotations

import torch


class EvictionObserver:
    """Hears of evictions; this one does nothing with them. Layers and KV heads are those of one worker."""

    def selected(self, request_id: str, layer: int, first: int, ends: list[int], chosen: list[torch.Tensor]) -> None:
        """Which of the tokens that its KV heads held a layer keeps; indices count what the head held, in order.

        Args:
            layer: index among this worker's attention layers.
            first, ends: head h chose among its tokens [first, ends[h]); those before (sinks) and behind them all stay.
            chosen: per KV head, int64 [kept], ascending; index i is the head's token first + i.
        """

    def evicted(self, request_id: str, num_tokens: int, evicted: torch.Tensor, kept: torch.Tensor) -> None:
        """A request was evicted in all layers.

        Args:
            num_tokens: tokens of the request so far, evicted ones included.
            evicted: int64 [layers, kv_heads], tokens that were held before and are not any more.
            kept: int64 [layers, kv_heads], tokens held afterwards, sinks and unfinished tile included.
        """
