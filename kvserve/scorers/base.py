"""What a scorer is: how much each cached token matters, per KV head.

A scorer reads tensors and returns a tensor. It keeps no state, allocates no pages and knows nothing of vLLM.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict

from kvserve.scorers.query_window import QueryWindow
from kvserve.scorers.rotary import QueryStatistics

LOWEST = torch.finfo(torch.float32).min  # the score of a token that nothing speaks for


@dataclass(frozen=True, eq=False)
class LayerView:
    """The cached tokens of one layer of one request, the newest included, in ascending logical position.

    KV heads that hold the same tokens share a view. Once heads hold different tokens each gets its own view, with
    kv_heads = 1, the query heads of its group, and `first_head` set to the head.

    What is None was not collected: a scorer says in `needs` what it reads.

    Attributes:
        positions: int64 [n], strictly ascending; the last is the newest token of the sequence.
        scale: factor of the query-key dot products.
        keys, values: float32 [kv_heads, n, head_dim]; keys after RoPE.
        query_window: the query rows of the newest tokens.
        accumulated: float32 [kv_heads, n]; attention probability (or its power, as `Scorer.accumulation` says) that the
            token received, summed over the query rows seen so far and over the query heads of its KV head.
        query_statistics: of the query rows seen so far.
        kept_tokens: tokens that a KV head will keep, on average.
        request_id, layer, first_head: who this is; `first_head` counts the KV heads of all ranks.
    """

    kv_heads: int
    positions: torch.Tensor
    scale: float
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    query_window: QueryWindow | None = None
    accumulated: torch.Tensor | None = None
    query_statistics: QueryStatistics | None = None
    kept_tokens: int | None = None
    request_id: str = ""
    layer: int = 0
    first_head: int = 0

    @property
    def num_tokens(self) -> int:
        """Cached tokens of each head."""
        return self.positions.shape[0]

    @property
    def length(self) -> torch.Tensor:
        """Logical tokens of the sequence, evicted ones included: the position of the next token, int64 []."""
        return self.positions[-1] + 1


class Accumulation(NamedTuple):
    """What `LayerView.accumulated` is the sum of.

    Attributes:
        power: of each probability.
    """

    power: Literal[1, 2] = 1


class Scorer(BaseModel, ABC):
    """Parameters of one way to score tokens; subclasses add a `name` that YAML files use.

    Attributes:
        needs: optional fields of LayerView that must be collected for this scorer.
        query_agnostic: whether a cache compressed by these scores may serve another question than the prompt's own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    needs: ClassVar[frozenset[str]] = frozenset()
    query_agnostic: ClassVar[bool]

    def score(self, view: LayerView) -> torch.Tensor:
        """Float32 [kv_heads, n], higher = keep; finite, or +inf for tokens the method never evicts.

        Where the method's own score is NaN or -inf it is LOWEST: a budget takes -inf for a slot without a token, and a
        NaN of one head must not push other heads' tokens out of a common order.

        Raises:
            ValueError: the view lacks something of `needs`.
        """
        missing = sorted(field for field in self.needs if getattr(view, field) is None)
        if missing:
            raise ValueError(f"{type(self).__name__} needs {', '.join(missing)}, which the view does not have")
        return self._score(view).nan_to_num(nan=LOWEST, posinf=torch.inf, neginf=LOWEST)

    @property
    def accumulation(self) -> Accumulation | None:
        """What is summed up for it, over every query row; None: nothing, `needs` does not name "accumulated"."""
        return Accumulation() if "accumulated" in self.needs else None

    @property
    def collects(self) -> bool:
        """Whether it must know of every query of the prompt, not only of a window."""
        return bool(self.needs & {"accumulated", "query_statistics"})

    @abstractmethod
    def _score(self, view: LayerView) -> torch.Tensor:
        """`score` of a view that has all of `needs`."""


def protect(scores: torch.Tensor, sinks: int, recent: int) -> torch.Tensor:
    """A copy of scores [..., n] in which the first `sinks` and the last `recent` tokens are +inf.

    A budget must leave each head at least sinks + recent tokens (Budget's minimum_pages): selection treats +inf as a
    tie like any other.
    """
    if sinks < 0 or recent < 0:
        raise ValueError(f"sinks and recent must not be negative, got {sinks} and {recent}")
    index = torch.arange(scores.shape[-1], device=scores.device)
    return scores.masked_fill((index < sinks) | (index >= scores.shape[-1] - recent), torch.inf)
