"""How much each head looks for what it has seen: attention on a block of random tokens that comes several times.

Retrieval heads are found so (RazorAttention, arXiv 2407.15891, section 3.2): echo heads attend to earlier occurrences
of the token, induction heads to the tokens behind those.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvserve.attention.base import LayerSpec
from kvserve.attention.logits import capped, softmax


class Repeats(NamedTuple):
    """A prompt: `start` tokens, and `repeats` times the same `period` different ones."""

    start: int
    period: int
    repeats: int

    @property
    def num_tokens(self) -> int:
        return self.start + self.period * self.repeats


class HeadScores(NamedTuple):
    """Attention of the tokens that have occurred before, on average, to all their earlier occurrences together (echo),
    and to the tokens right behind these (induction); float32 [heads]."""

    echo: torch.Tensor
    induction: torch.Tensor


def head_scores(query: torch.Tensor, key: torch.Tensor, spec: LayerSpec, prompt: Repeats) -> HeadScores:
    """The scores of one layer's query heads; one head's probabilities exist at a time.

    Args:
        query: [prompt.num_tokens, heads, head_dim], as they enter the dot.
        key: [prompt.num_tokens, kv_heads, head_dim].
        spec: of the layer; its window counts for nothing.
    """
    future = torch.ones(len(query), len(query), dtype=torch.bool, device=query.device).triu_(1)
    group, scores = query.shape[1] // key.shape[1], []
    sinks = [None] * query.shape[1] if spec.sink_logits is None else spec.sink_logits
    for head in range(query.shape[1]):
        logits = capped(query[:, head].float() @ key[:, head // group].float().T * spec.scale, spec.soft_cap)
        weights, _ = softmax(logits.masked_fill_(future, -torch.inf), sinks[head])
        scores.append(_scores_of_head(weights[prompt.start :, prompt.start :], prompt))
    echo, induction = (torch.stack(found).cpu() for found in zip(*scores, strict=True))
    return HeadScores(echo, induction)


def _scores_of_head(weights: torch.Tensor, prompt: Repeats) -> tuple[torch.Tensor, torch.Tensor]:
    """Of probabilities [tokens, tokens] between the repeated tokens."""
    echo, induction = weights.new_zeros(()), weights.new_zeros(())
    for repeat in range(1, prompt.repeats):
        distance = repeat * prompt.period
        echo = echo + weights.diagonal(-distance).sum()
        # The first entry belongs to a token without an occurrence so far back.
        induction = induction + weights.diagonal(1 - distance)[1:].sum()
    count = (prompt.repeats - 1) * prompt.period
    return echo / count, induction / count


def of_kv_heads(scores: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """The largest score among the query heads [..., heads] of each KV head, [..., kv_heads]."""
    return scores.unflatten(-1, (num_kv_heads, -1)).amax(-1)


def highest(scores: torch.Tensor, share: float) -> torch.Tensor:
    """Which of all scores are among the highest `share` of them, at least one; the lower index where they are equal."""
    count = max(1, int(share * scores.numel() + 0.5))
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[scores.flatten().sort(descending=True, stable=True).indices[:count]] = True
    return chosen.view(scores.shape)
