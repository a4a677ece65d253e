"""Where a token stands."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from kvserve.scorers.base import LayerView, Scorer, protect


class Position(Scorer):
    """The first `sinks` tokens and then the newest ones (StreamingLLM, arXiv 2309.17453).

    Keys keep the positions they were rotated to; the paper turns them to positions inside the cache.
    """

    query_agnostic: ClassVar[bool] = True

    name: Literal["position"] = "position"
    sinks: Annotated[int, Field(ge=0, le=1024)] = 4

    def _score(self, view: LayerView) -> torch.Tensor:
        return protect(view.positions.float().repeat(view.kv_heads, 1), self.sinks, 0)
