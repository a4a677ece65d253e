"""How many rows lay beyond float16's range (`beyond_range` in kvserve/pages/reference.py)."""

from __future__ import annotations

import functools

import torch


def rows_beyond_range(device: torch.device) -> torch.Tensor:
    """The count of this process' kernels on a device, int64 [1] there: K and V rows of single heads that were staged.

    Kernels add to it without a wait; reading it waits for the device.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _count(device)


@functools.cache
def _count(device: torch.device) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int64, device=device)
