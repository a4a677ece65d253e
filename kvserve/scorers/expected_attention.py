"""Attention that queries yet to come will probably pay."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from kvserve.scorers.base import LayerView, Scorer, protect
from kvserve.scorers.rotary import QueryStatistics


class ExpectedAttention(Scorer):
    """Attention probability expected of a Gaussian query, times the norm of the value (arXiv 2510.00636).

    Queries before RoPE are taken as Gaussian with the mean μ and covariance Σ seen so far; R is the mean rotation of
    the next `future` positions. For a key k, E[exp(scale q·k)] = exp(scale (Rμ)·k + scale² kᵀ(RΣRᵀ)k / 2), normalised
    over the tokens after the sinks, averaged over the query heads of the KV head. The score is that plus `epsilon`,
    times |v|. The first `sinks` tokens are never evicted; leave their query rows, which are outliers, out of the
    statistics.

    It depends on the prompt through two moments only, so it counts as query-agnostic, as in the paper.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys", "values", "query_statistics"})
    query_agnostic: ClassVar[bool] = True

    name: Literal["expected-attention"] = "expected-attention"
    future: Annotated[int, Field(ge=1, le=65536)] = 512
    sinks: Annotated[int, Field(ge=0, le=1024)] = 4
    covariance: bool = True
    value_norm: bool = True
    epsilon: Annotated[float, Field(ge=0, le=1)] = 0.0

    def _score(self, view: LayerView) -> torch.Tensor:
        assert view.keys is not None and view.values is not None and view.query_statistics is not None
        logits = self._logits(view, view.keys * view.scale, view.query_statistics)
        expected = torch.zeros_like(logits)
        expected[..., self.sinks :] = logits[..., self.sinks :].softmax(-1)
        scores = expected.mean(1) + self.epsilon
        if self.value_norm:
            scores = scores * view.values.norm(dim=-1)
        return protect(scores, self.sinks, 0)

    def _logits(self, view: LayerView, keys: torch.Tensor, statistics: QueryStatistics) -> torch.Tensor:
        """Logarithm of E[exp(q·k)], float32 [kv_heads, group, n]."""
        rotation = statistics.rotary.mean_rotation(view.length, self.future, keys.shape[-1])
        mean = (statistics.mean @ rotation.T).unflatten(0, (view.kv_heads, -1))
        logits = mean @ keys.mT
        if self.covariance:
            spread = (rotation @ statistics.covariance @ rotation.T).unflatten(0, (view.kv_heads, -1))
            logits = logits + torch.einsum("hnd,hgde,hne->hgn", keys, spread, keys) / 2
        return logits
