"""The min/max quantiser of affine codes."""

from __future__ import annotations

from typing import NamedTuple

from kvserve.codecs.base import FLOAT16_MAX, MIN_SCALE
from kvserve.codecs.lazy import torch


class AffineCodes(NamedTuple):
    """Codes and the affine map back. Codes have x's shape, scale and low are float16."""

    codes: torch.Tensor
    scale: torch.Tensor
    low: torch.Tensor

    def decode(self) -> torch.Tensor:
        return self.codes * self.scale.float() + self.low.float()


def quantise_min_max(
    x: torch.Tensor, bits: int, counted: torch.Tensor | None = None, clip: torch.Tensor | None = None
) -> AffineCodes:
    """Asymmetric min/max quantisation over dim -2 (KIVI, arXiv 2402.02750, section 3), float32 [..., group, lanes].

    `counted` (bool, [..., group, 1]) marks the rows whose values define the range; a group with none gets the
    smallest scale and low 0. `clip` (float32, broadcast to [..., 1, lanes]) multiplies both ends of the range (SKVQ,
    arXiv 2405.06219, section 3.2); what is beyond them gets the nearest end. Codes are computed with the scale and low
    as stored (float16), rounding half to even.
    """
    top = (1 << bits) - 1
    counted = torch.ones_like(x[..., :1], dtype=torch.bool) if counted is None else counted
    low = torch.where(counted, x, torch.inf).amin(-2, keepdim=True)
    high = torch.where(counted, x, -torch.inf).amax(-2, keepdim=True)
    empty = ~counted.any(-2, keepdim=True)
    low, high = low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)
    width = high - low
    if clip is not None:
        low, width = low * clip, width * clip
    scale = (width / top).clamp(MIN_SCALE, FLOAT16_MAX).half()
    low = low.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
    codes = ((x - low.float()) * (1.0 / scale.float())).round().clamp(0, top)
    return AffineCodes(codes.to(torch.int32), scale, low)


def boosted_channels(key: torch.Tensor, counted: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` channels of a key tile with the widest range (ties: the lower channel), ascending int64 [count]."""
    spread = torch.where(counted, key, -torch.inf).amax(0) - torch.where(counted, key, torch.inf).amin(0)
    return spread.sort(descending=True, stable=True).indices[:count].sort().values
