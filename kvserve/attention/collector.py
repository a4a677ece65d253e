"""What a scorer must know of every query of a prompt, summed up over its steps.

Unlike the queries of a window this does not fit in a request's state blocks, so the worker keeps it, from the step that
begins a prompt to the one that cuts it. Such prompts read nothing from the prefix cache: their queries must all pass.
It takes 4 bytes a token for each layer and KV head (accumulated attention), or one matrix head_dim x head_dim of
floats for each layer and query head (query statistics), of every prompt that is under way.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kvserve.attention.query_window import PagedWindow
from kvserve.scorers.accumulated_attention import AccumulatedAttention, accumulate
from kvserve.scorers.base import Scorer
from kvserve.scorers.rotary import QueryStatistics, Rotary


@dataclass
class Collected:
    """Of one request in one layer.

    Attributes:
        num_tokens: tokens that are part of it.
        accumulated: see LayerView.
        query_statistics: see LayerView.
    """

    num_tokens: int = 0
    accumulated: torch.Tensor | None = None
    query_statistics: QueryStatistics | None = None


@dataclass
class Collector:
    """All requests of this worker.

    Attributes:
        rotary: the model's RoPE, for query statistics.
    """

    scorer: Scorer
    rotary: Rotary | None = None
    requests: dict[str, dict[int, Collected]] = field(default_factory=dict)  # by request id, by layer

    def drop(self, request_ids: set[str]) -> None:
        """Forget requests that ended or were cut."""
        for request_id in request_ids & self.requests.keys():
            del self.requests[request_id]

    def add(self, request_id: str, layer: int, window: PagedWindow) -> None:
        """Take in the query rows of one step, all of `window`; a step from token 0 on starts over."""
        layers = self.requests.setdefault(request_id, {})
        before = window.num_tokens - window.num_rows
        found = layers.get(layer) if before else Collected()
        assert found is not None and found.num_tokens == before, "every query of a prompt passes once"
        layers[layer] = found
        found.num_tokens = window.num_tokens
        if isinstance(self.scorer, AccumulatedAttention):
            heads = window.kernels.spec.num_kv_heads
            found.accumulated = accumulate(window, heads, self.scorer.exponent, found.accumulated)
        if "query_statistics" in self.scorer.needs:
            found.query_statistics = self._statistics(window, before, found.query_statistics)

    def _statistics(self, window: PagedWindow, before: int, earlier: QueryStatistics | None) -> QueryStatistics | None:
        """The queries of the first tokens are outliers: those that the scorer never evicts are left out."""
        assert self.rotary is not None
        skipped = max(getattr(self.scorer, "sinks", 0) - before, 0)
        if skipped >= window.num_rows:
            return earlier
        positions = torch.arange(before + skipped, window.num_tokens, device=window.query.device)
        found = QueryStatistics.of(window.query[skipped:].transpose(0, 1), positions, self.rotary)
        return earlier.merge(found) if earlier else found
