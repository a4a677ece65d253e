"""No opinion: the control that every other scorer must beat."""

from __future__ import annotations

import hashlib
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from kvserve.scorers.base import LayerView, Scorer

_WORD = 0xFFFFFFFF


class Random(Scorer):
    """Uniform in [0, 1), a function of nothing but (seed, request id, layer, KV head, position).

    A token's score is therefore the same however the prompt was cut into chunks, and after a recomputation.
    """

    query_agnostic: ClassVar[bool] = True

    name: Literal["random"] = "random"
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0

    def _score(self, view: LayerView) -> torch.Tensor:
        heads = range(view.first_head, view.first_head + view.kv_heads)
        return torch.stack([self._of_head(view, head) for head in heads])

    def _of_head(self, view: LayerView, head: int) -> torch.Tensor:
        identity = repr((self.seed, view.request_id, view.layer, head)).encode()
        digest = hashlib.blake2b(identity, digest_size=8).digest()
        first, second = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
        mixed = _mix(_mix((view.positions ^ first) & _WORD) ^ second)
        return (mixed >> 8).float() / 2**24


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit words held in int64, after which close words are far apart (xorshift-multiply)."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = ((x ^ (x >> shift)) * factor) & _WORD
    return x ^ (x >> 15)
