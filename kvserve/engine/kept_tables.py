"""What evicted requests keep, in tensors that keep their addresses from step to step.

A replayed CUDA graph reads the tensors that it was captured with, so each step writes its rows into the same ones. Rows
are found on the device, by their state block: nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvserve.pages.kept import Kept, KeptTable


class KeptTables:
    """The `KeptTable` of each step.

    Args:
        max_reqs: rows of the largest step.
        max_blocks: kept blocks of the request that has most.
    """

    def __init__(self, max_reqs: int, max_blocks: int, device: torch.device) -> None:
        self.max_blocks = max(max_blocks, 1)
        options = {"dtype": torch.int32, "device": device}
        self.ends = torch.zeros(max_reqs, **options)
        self.starts = torch.arange(max_reqs + 1, **options) * self.max_blocks
        self.blocks = torch.zeros(max_reqs * self.max_blocks, **options)
        self._state_blocks = self.ends[:0]
        self._kept: Mapping[int, Kept] = {}
        self._entries = self.ends[:0]

    def table(self, block_table: torch.Tensor, kept: Mapping[int, Kept]) -> KeptTable:
        """The table of a step with these rows, int32 [num_reqs, >= 1], filled."""
        self._state_blocks = block_table[:, 0]
        self.fill(kept)
        num_reqs = len(block_table)
        return KeptTable(self.ends[:num_reqs], self.starts[: num_reqs + 1], self.blocks)

    def fill(self, kept: Mapping[int, Kept]) -> None:
        """Write what the rows of the last `table` keep, by state block; other rows are not evicted.

        Raises:
            ValueError: a request has more kept blocks than `max_blocks`.
        """
        num_reqs = len(self._state_blocks)
        self.ends[:num_reqs] = 0
        if not kept or not num_reqs:
            return
        if kept != self._kept:  # it changes where a request comes, goes or is cut, so not in most steps
            self._kept, self._entries = kept, self._upload(kept)
        matches = self._state_blocks[:, None] == self._entries[:, 0]
        found, which = matches.any(1), matches.int().argmax(1)
        self.ends[:num_reqs] = torch.where(found, self._entries[which, 1], 0)
        width = self._entries.shape[1] - 2
        self.blocks.view(-1, self.max_blocks)[:num_reqs, :width] = self._entries[which, 2:]

    def _upload(self, kept: Mapping[int, Kept]) -> torch.Tensor:
        """Int32 [requests, 2 + most kept blocks] on the device: state block, end, kept blocks."""
        width = max(len(entry.blocks) for entry in kept.values())
        if width > self.max_blocks:
            raise ValueError(f"a request keeps {width} blocks, more than the {self.max_blocks} of the longest one")
        rows = [[block, entry.end, *entry.blocks] + [0] * (width - len(entry.blocks)) for block, entry in kept.items()]
        return torch.tensor(rows, dtype=torch.int32).to(self.ends.device, non_blocking=True)
