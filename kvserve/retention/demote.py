"""What is not chosen stays, in a smaller codec."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from kvserve.codecs.base import Codec
from kvserve.codecs.field import GivenCodec
from kvserve.retention.base import HeldTokens, Retention, Rows, others


class Demote(Retention):
    """The chosen tokens in the policy's own codec, all others in a smaller one (MiKV, arXiv 2402.18096, section 3).

    Nothing is evicted: the rate says how many tokens keep their precision. Both runs are in ascending position.
    """

    reads_evicted: ClassVar[bool] = True

    name: Literal["demote"] = "demote"
    key: GivenCodec
    value: GivenCodec

    @property
    def formats(self) -> tuple[tuple[Codec, Codec], ...]:
        return ((self.key, self.value),)

    def keep(self, held: HeldTokens, chosen: torch.Tensor) -> Rows:
        rest = others(len(held.scores), chosen)
        tokens = torch.cat([chosen, rest])
        return Rows(held.keys[tokens], held.values[tokens], None, tokens, (len(chosen), len(rest)))
