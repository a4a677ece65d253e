"""Says in the log that keys or values lie beyond what the pages can hold."""

from __future__ import annotations

import torch

from kvserve.attention.saturation import rows_beyond_range
from kvserve.engine.log import logger


class RangeWatch:
    """Looks at the count of this worker's kernels before each step, and speaks once.

    It never waits for a GPU: what it sees there is the count that an earlier look has asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._counter = rows_beyond_range(device)
        on_gpu = device.type == "cuda"
        self._seen = torch.zeros(1, dtype=torch.int64, pin_memory=True) if on_gpu else self._counter
        self._said = False

    def look(self) -> None:
        """Warn if rows were out of range."""
        if self._said:
            return
        if self._seen is not self._counter:
            self._seen.copy_(self._counter, non_blocking=True)
        if count := int(self._seen):
            self._said = True
            logger.warning(
                "%d rows of keys or values have numbers beyond +-65504, where the float16 of the policy's pages ends: "
                "they are stored as +-65504 and answers may be wrong; serve this model with the policy none",
                count,
            )
