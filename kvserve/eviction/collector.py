"""What a scorer must know of every query of a request, summed up over its steps.

Unlike the queries of a window this does not fit in a request's state blocks, so the worker keeps it, from the step that
begins a prompt to its last cut. Such prompts read nothing from the prefix cache: their queries must all pass.
It takes 4 bytes a token for each layer and KV head (accumulated attention), or one matrix head_dim x head_dim of
floats for each layer and query head (query statistics), of every request that is still to be cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence

from kvserve.eviction.query_window import PagedWindow
from kvserve.scorers.base import Accumulation, Scorer
from kvserve.scorers.query_window import QueryWindow
from kvserve.scorers.rotary import QueryStatistics, Rotary

ROOM = 256  # columns that are added at a time


@dataclass
class Collected:
    """Of one request in one layer.

    Attributes:
        num_tokens: tokens that are part of it.
        columns: tokens that the fullest KV head holds.
        accumulated: float32 [kv_heads, >= columns], zero behind the tokens that a head holds; see LayerView.
        query_statistics: see LayerView.
    """

    num_tokens: int = 0
    columns: int = 0
    accumulated: torch.Tensor | None = None
    query_statistics: QueryStatistics | None = None

    def add_tokens(self, count: int) -> None:
        self.num_tokens += count
        self.columns += count

    def room(self, kv_heads: int, device: torch.device) -> torch.Tensor:
        """`accumulated`, with all columns there."""
        old = self.accumulated
        if old is None or old.shape[1] < self.columns:
            self.accumulated = torch.zeros(kv_heads, self.columns + ROOM, device=device)
            if old is not None:
                self.accumulated[:, : old.shape[1]] = old
        assert self.accumulated is not None
        return self.accumulated

    def keep(self, tokens: Sequence[torch.Tensor]) -> None:
        """Forget what a cut evicts; tokens[h]: int64, which of its columns KV head h keeps, ascending."""
        self.columns = max(len(columns) for columns in tokens)
        if self.accumulated is not None:
            heads = zip(self.accumulated, tokens, strict=True)
            self.accumulated = pad_sequence([head[columns] for head, columns in heads], batch_first=True)


@dataclass(eq=False)
class Collector:
    """All requests of this worker.

    Attributes:
        rotary: the model's RoPE, for query statistics.
    """

    scorer: Scorer
    rotary: Rotary | None = None
    requests: dict[str, dict[int, Collected]] = field(default_factory=dict)  # by request id, by layer

    def of(self, request_id: str, layer: int) -> Collected:
        """What there is of a request; nothing is kept of one that is not collected."""
        return self.requests.get(request_id, {}).get(layer) or Collected()

    def drop(self, request_ids: set[str]) -> None:
        """Forget requests that ended, or are not cut again."""
        for request_id in request_ids & self.requests.keys():
            del self.requests[request_id]

    def begin(
        self, request_id: str, layer: int, before: int, count: int, kv_heads: int, device: torch.device
    ) -> torch.Tensor | None:  # fmt: skip
        """A step computes tokens [before, before + count); one from token 0 on starts over.

        Returns:
            where the attention they pay is added up, if the scorer wants that: float32 [kv_heads, columns].
        """
        layers = self.requests.setdefault(request_id, {})
        found = layers.get(layer) if before else Collected()
        assert found is not None and found.num_tokens == before, "every query of a request passes once"
        layers[layer] = found
        found.add_tokens(count)
        return found.room(kv_heads, device) if self.scorer.accumulation else None

    def add(self, request_id: str, layer: int, window: PagedWindow, accumulated: bool) -> None:
        """Take in the query rows of the step that has begun, all of `window`, once it has attended.

        Args:
            accumulated: whether their attention has been added already.
        """
        found = self.requests[request_id][layer]
        wanted = self.scorer.accumulation
        if wanted and not accumulated:
            assert found.accumulated is not None
            sums = received(window, len(found.accumulated), wanted)
            found.accumulated[:, : sums.shape[1]] += sums
        if "query_statistics" in self.scorer.needs:
            found.query_statistics = self._statistics(window, found.query_statistics)

    def _statistics(self, window: PagedWindow, earlier: QueryStatistics | None) -> QueryStatistics | None:
        """The queries of the first tokens are outliers: those that the scorer never evicts are left out."""
        assert self.rotary is not None
        before = window.stored.num_tokens - window.num_rows
        skipped = max(getattr(self.scorer, "sinks", 0) - before, 0)
        if skipped >= window.num_rows:
            return earlier
        positions = torch.arange(before + skipped, window.stored.num_tokens, device=window.query.device)
        found = QueryStatistics.of(window.query[skipped:].transpose(0, 1), positions, self.rotary)
        return earlier.merge(found) if earlier else found


def received(window: QueryWindow, kv_heads: int, wanted: Accumulation) -> torch.Tensor:
    """What `LayerView.accumulated` grows by in a step whose query rows are all of `window`: float32 [kv_heads, n]."""
    return window.attention(window.num_rows, wanted.power).unflatten(0, (kv_heads, -1)).sum(1)
