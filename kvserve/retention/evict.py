"""What is not chosen is gone."""

from __future__ import annotations

from typing import Literal

import torch

from kvserve.retention.base import HeldTokens, Retention, Rows


class Evict(Retention):
    """The chosen tokens as they are."""

    name: Literal["evict"] = "evict"

    def keep(self, held: HeldTokens, chosen: torch.Tensor) -> Rows:
        return Rows(held.keys[chosen], held.values[chosen], None, chosen)
