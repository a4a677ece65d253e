"""Which tokens of one prompt every KV head kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from kvserve.eviction.observer import EvictionObserver, Selection


class KeptTokens(EvictionObserver):
    """Notes the positions that stay, of one request on one worker.

    Attributes:
        num_tokens: of the request when it was evicted last; 0: it never was.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._held: list[list[list[int]]] = []  # [layer][kv_head], positions in the order of the head's rows
        self._chosen: list[list[Callable[[list[int]], list[int]]]] = []

    @property
    def positions(self) -> list[list[list[int]]]:
        """[layer][kv_head], ascending; a row that stands for several tokens counts as the one that it began as."""
        return [[sorted(head) for head in layer] for layer in self._held]

    def selected(self, request_id: str, layer: int, selection: Selection) -> None:
        heads = zip(selection.ends, selection.sources, strict=True)
        self._chosen.append([partial(_stay, selection.first, end, index.tolist()) for end, index in heads])

    def evicted(
        self, request_id: str, num_tokens: int, evicted: torch.Tensor, kept: torch.Tensor, demoted: torch.Tensor
    ) -> None:
        later = [*range(self.num_tokens, num_tokens)]
        before = self._held or [[[] for _ in layer] for layer in self._chosen]
        self._held = [
            [stay(head + later) for stay, head in zip(layer, heads, strict=True)]
            for layer, heads in zip(self._chosen, before, strict=True)
        ]
        self.num_tokens, self._chosen = num_tokens, []


def _stay(first: int, end: int, chosen: list[int], held: list[int]) -> list[int]:
    """What is left of the positions that one head held."""
    return held[:first] + [held[first + index] for index in chosen] + held[end:]


@dataclass(frozen=True)
class Inspection:
    """One prompt under one policy.

    Attributes:
        model: its name.
        limit: what was asked for, in words.
        tokens: the prompt's tokens as text.
        positions: [layer][kv_head], ascending positions that are kept.
        report: what the request held, see kvserve.engine.request_report.
    """

    policy: str
    model: str
    limit: str
    tokens: list[str]
    positions: list[list[list[int]]]
    report: dict[str, Any]

    def kept_counts(self) -> np.ndarray:
        """Kept tokens, int64 [layers, kv_heads]."""
        return np.array([[len(head) for head in layer] for layer in self.positions])

    def layer_shares(self) -> np.ndarray:
        """Share of a layer's KV heads that keep each token, float64 [layers, tokens]."""
        shares = np.zeros((len(self.positions), len(self.tokens)))
        for share, layer in zip(shares, self.positions, strict=True):
            for head in layer:
                share[head] += 1 / len(layer)
        return shares

    def token_shares(self) -> np.ndarray:
        """Share of all KV heads of all layers that keep each token, float64 [tokens]."""
        return self.layer_shares().mean(0)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `kept_tokens` and `token_shares` follow from `positions`."""
        shares = [round(float(share), 4) for share in self.token_shares()]
        return asdict(self) | {"kept_tokens": self.kept_counts().tolist(), "token_shares": shares}
