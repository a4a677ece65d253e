"""How far two sets of next-token distributions are apart."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Distances:
    """Per position of one text.

    Attributes:
        kl: Kullback-Leibler divergence of the found distribution from the dense one, nats.
        agrees: 1 where both have the same most likely token.
        logprobs: log-probability of the text's own token, nats.
        dense_logprobs: the same in the dense cache.
    """

    kl: list[float]
    agrees: list[int]
    logprobs: list[float]
    dense_logprobs: list[float]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, rounded to what float32 resolves."""
        return {name: [round(value, 7) for value in values] for name, values in asdict(self).items()}


def distances(dense: np.ndarray, found: np.ndarray, tokens: list[int]) -> Distances:
    """Compare log-probabilities, both [positions, vocabulary] float32.

    Args:
        tokens: the text's token at each position.

    Raises:
        ValueError: the shapes differ.
    """
    if dense.shape != found.shape or len(tokens) != len(dense):
        raise ValueError(f"cannot compare {dense.shape} with {found.shape} at {len(tokens)} tokens")
    kl, agrees = [], []
    for p, q in zip(dense, found, strict=True):  # row by row: a vocabulary of 150k in float64 is 1.2 MB
        p, q = p.astype(np.float64), q.astype(np.float64)
        probability = np.exp(p)
        is_possible = probability > 0
        kl.append(float((probability[is_possible] * (p - q)[is_possible]).sum()))
        agrees.append(int(p.argmax() == q.argmax()))
    rows = np.arange(len(tokens))
    return Distances(kl, agrees, found[rows, tokens].tolist(), dense[rows, tokens].tolist())
