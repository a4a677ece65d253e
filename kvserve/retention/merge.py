"""What is not chosen goes into the row that is most like it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch.nn.functional import normalize

from kvserve.retention.base import HeldTokens, Retention, Rows, others


class Merge(Retention):
    """Every token that goes is averaged into the chosen one whose key is nearest in angle, where that is near enough.

    A row becomes the mean of the tokens that it stands for, its log-mass the log of their number: to a query that finds
    them alike the merged row answers as they did together. Tokens with no row within `threshold` (cosine) are gone.
    """

    has_mass: ClassVar[bool] = True
    reads_evicted: ClassVar[bool] = True

    name: Literal["merge"] = "merge"
    threshold: Annotated[float, Field(ge=-1, le=1)] = 0.8

    def keep(self, held: HeldTokens, chosen: torch.Tensor) -> Rows:
        keys, values = held.keys[chosen], held.values[chosen]
        gone = others(len(held.scores), chosen)
        if not (len(gone) and len(chosen)):
            return Rows(keys, values, held.log_mass[chosen], chosen)
        likeness, nearest = (normalize(held.keys[gone], dim=-1) @ normalize(keys, dim=-1).T).max(-1)
        near = likeness >= self.threshold
        gone, nearest = gone[near], nearest[near]
        mass, more = held.log_mass[chosen].exp(), held.log_mass[gone].exp()
        total = mass.index_add(0, nearest, more)
        merged = (
            (rows[chosen] * mass[:, None]).index_add(0, nearest, rows[gone] * more[:, None]) / total[:, None]
            for rows in (held.keys, held.values)
        )
        keys, values = merged
        return Rows(keys, values, total.log(), chosen)
