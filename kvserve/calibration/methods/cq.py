"""Coupled quantisation (Zhang et al., arXiv 2405.03917): neighbouring channels of a head share one code."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from kvserve.calibration.kmeans import codebooks
from kvserve.calibration.methods.base import HalfRows, Method, Table
from kvserve.codecs.layer_tables import KV_HEADS
from kvserve.codecs.tile import Half

CENTROIDS = 256  # of an 8-bit code


class Cq(Method):
    """A codebook for each KV head, half and group of `couple` channels, by weighted k-means.

    The weight of a point is the sum of its elements' weights: codes are chosen by plain distance. `points` of the rows,
    evenly spread, are enough for 256 centroids and bound the time.
    """

    name: Literal["cq"] = "cq"
    couple: Literal[2, 4, 8] = 4
    points: Annotated[int, Field(ge=CENTROIDS)] = 8192
    iterations: Annotated[int, Field(ge=1, le=1000)] = 15
    paper: ClassVar[str] = "CQ, arXiv 2405.03917"

    def tables(self, head_dim: int) -> tuple[Table, ...]:
        if head_dim % self.couple:
            raise ValueError(f"couple {self.couple} does not divide head_dim {head_dim}; set it to 2")
        axes = (KV_HEADS, head_dim // self.couple, CENTROIDS, self.couple)
        return Table(Half.KEY, "vector.codebook", axes), Table(Half.VALUE, "vector.codebook", axes)

    def fit(self, half: Half, rows: HalfRows, seed: int) -> dict[str, torch.Tensor]:
        heads, tokens, head_dim = rows.rows.shape
        spread = torch.linspace(0, tokens - 1, min(self.points, tokens)).round().long()
        points = self._coupled(rows.rows[:, spread])
        weights = None if rows.weights is None else self._coupled(rows.weights[:, spread]).sum(2)
        found = codebooks(points, weights, CENTROIDS, self.iterations, seed)
        return {"vector.codebook": found.view(heads, head_dim // self.couple, CENTROIDS, self.couple)}

    def _coupled(self, rows: torch.Tensor) -> torch.Tensor:
        """[kv_heads, tokens, head_dim] as [kv_heads * groups, tokens, couple]."""
        return rows.unflatten(2, (-1, self.couple)).transpose(1, 2).flatten(0, 1).contiguous()
