"""How unlike the other keys a key is."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch.nn import functional

from kvserve.scorers.base import LayerView, Scorer


class KeyDiff(Scorer):
    """Minus the cosine between the key and the mean direction of its head's keys (KeyDiff, arXiv 2504.15364).

    The mean is taken over the keys scaled to unit length. A zero key, or a zero mean, has cosine 0.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    query_agnostic: ClassVar[bool] = True

    name: Literal["key-diff"] = "key-diff"

    def _score(self, view: LayerView) -> torch.Tensor:
        assert view.keys is not None
        directions = functional.normalize(view.keys, dim=-1)
        mean = functional.normalize(directions.mean(1, keepdim=True), dim=-1)
        return -(directions * mean).sum(-1)
