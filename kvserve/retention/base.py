"""What a retention is: what becomes of the tokens that a cut does not choose.

A budget says how many rows each KV head keeps, a scorer which tokens come first. A retention makes that many rows, of
the tokens that were chosen and of those that were not. It reads tensors and returns tensors; it allocates nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict

from kvserve.codecs.base import Codec


class HeldTokens(NamedTuple):
    """The candidates of one KV head, in ascending position.

    Attributes:
        keys, values: float32 [n, head_dim]; keys after RoPE.
        scores: float32 [n], higher = keep, +inf = protected.
        log_mass: float32 [n]; what is added to a token's logit: the log of how many tokens it stands for.
    """

    keys: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor
    log_mass: torch.Tensor


class Rows(NamedTuple):
    """What one KV head keeps, in the order of its kept pages.

    Attributes:
        keys, values: float32 [m, head_dim].
        log_mass: float32 [m]; None where every row stands for itself.
        sources: int64 [m]; the candidate that a row is, or began as.
        runs: how many of the rows each run has: the first those in the policy's own codec, the others those in the
            retention's `formats`. None: all are in the policy's codec.
    """

    keys: torch.Tensor
    values: torch.Tensor
    log_mass: torch.Tensor | None
    sources: torch.Tensor
    runs: tuple[int, ...] | None = None


class Retention(BaseModel, ABC):
    """Parameters of one way to treat what is not chosen; subclasses add a `name` that YAML files use.

    Attributes:
        has_mass: whether rows may stand for more than one token; pages then hold a log-mass for each.
        reads_evicted: whether `keep` looks at tokens that were not chosen.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    has_mass: ClassVar[bool] = False
    reads_evicted: ClassVar[bool] = False

    @property
    def formats(self) -> tuple[tuple[Codec, Codec], ...]:
        """Codecs of keys and values of what it writes otherwise than in the policy's own; such a policy evicts nothing:
        every candidate that is not chosen is in one of them."""
        return ()

    @abstractmethod
    def keep(self, held: HeldTokens, chosen: torch.Tensor) -> Rows:
        """As many rows as were chosen, or, with `formats`, as there are candidates: how many blocks a request holds is
        known from its length alone.

        Args:
            chosen: int64 [m], ascending; the candidates with the highest scores.
        """


def others(num_tokens: int, chosen: torch.Tensor) -> torch.Tensor:
    """The candidates that were not chosen, int64, ascending."""
    left = torch.ones(num_tokens, dtype=torch.bool, device=chosen.device)
    left[chosen] = False
    return left.nonzero()[:, 0]
