"""The length of a key."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from kvserve.scorers.base import LayerView, Scorer


class KeyNorm(Scorer):
    """Minus the L2 norm of the key: short keys attract attention (arXiv 2406.11430; kvpress: Knorm).

    Norms of different heads and layers are not on one scale: use it with a budget that does not compare them.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    query_agnostic: ClassVar[bool] = True

    name: Literal["key-norm"] = "key-norm"

    def _score(self, view: LayerView) -> torch.Tensor:
        assert view.keys is not None
        return -view.keys.norm(dim=-1)
