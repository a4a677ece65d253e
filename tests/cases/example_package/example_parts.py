"""What a package that brings parts to kvserve looks like: one of each kind, without a fork."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from kvserve.budgets.uniform import Uniform
from kvserve.retention.evict import Evict
from kvserve.schedules.every_n import EveryN
from kvserve.scorers.base import LayerView, Scorer


class EveryOther(Scorer):
    """Tokens at every `period`-th position are worth 1, the others 0."""

    query_agnostic: ClassVar[bool] = True

    name: Literal["every-other"] = "every-other"  # type: ignore[assignment]
    period: int = 2

    def _score(self, view: LayerView) -> torch.Tensor:
        return (view.positions % self.period == 0).float().expand(view.kv_heads, -1)


class ExampleBudget(Uniform):
    """As `uniform`, under another name."""

    name: Literal["example-budget"] = "example-budget"  # type: ignore[assignment]


class ExampleSchedule(EveryN):
    """As `every-n`, under another name."""

    name: Literal["example-schedule"] = "example-schedule"  # type: ignore[assignment]


class ExampleRetention(Evict):
    """As `evict`, under another name."""

    name: Literal["example-retention"] = "example-retention"  # type: ignore[assignment]
