"""KVQuant's non-uniform levels (Hooper et al., arXiv 2401.18079, sections 3.1 to 3.4).

Keys have a fixed range for each channel, values one for each token; both are found without the outliers that the
`outliers` codec stores apart. Rows normalised to [-1, 1] share one list of levels in each half of a layer.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from kvserve.calibration.kmeans import ascending, line_levels
from kvserve.calibration.methods.base import HalfRows, Method, Table
from kvserve.codecs.layer_tables import KV_HEADS
from kvserve.codecs.tile import Half

MAX_SAMPLES = 2**20  # elements that k-means sees; of more, evenly spread tokens
SLOT_MULTIPLE = 8  # the outliers codec has a multiple of so many slots in a tile
_LEAST_RANGE = 1e-6


class Kvquant(Method):
    """Levels by weighted k-means.

    `outliers` is the share of elements that are stored apart: of keys the lowest and the highest half of it in each
    channel, of values those of a tile of `tile_tokens` tokens that lie farthest from their token's mean, in standard
    deviations. `q_norm` moves and stretches the levels so that quantised rows have the mean and the standard deviation
    of the rows themselves (section 3.6 has it for 2 bits).
    """

    name: Literal["kvquant"] = "kvquant"
    bits: Literal[2, 3, 4] = 2
    outliers: Annotated[float, Field(ge=0, le=0.25)] = 0.01
    tile_tokens: Literal[64, 128] = 64
    q_norm: bool | None = None
    iterations: Annotated[int, Field(ge=1, le=1000)] = 50
    paper: ClassVar[str] = "KVQuant, arXiv 2401.18079"

    def tables(self, head_dim: int) -> tuple[Table, ...]:
        levels = (2**self.bits,)
        return (
            Table(Half.KEY, "table.levels", levels, rule="levels"),
            Table(Half.KEY, "table.range", (KV_HEADS, 2, head_dim), rule="range"),
            Table(Half.VALUE, "table.levels", levels, rule="levels"),
        )

    def fit(self, half: Half, rows: HalfRows, seed: int) -> dict[str, torch.Tensor]:
        if half is Half.KEY:
            half_range, middle = channel_range(rows.rows, self.outliers)
            plain, is_kept = normalise(rows.rows, half_range, middle)
            tables = {"table.range": torch.cat([half_range, middle], 1)}
        else:
            is_outlier = token_outliers(rows.rows, self.outliers, self.tile_tokens)
            half_range, middle = token_range(rows.rows, is_outlier)
            plain, is_kept = normalise(rows.rows, half_range, middle)[0], ~is_outlier
            tables = {}
        # An error of a level is one of the row times the half range.
        importance = half_range.square().expand_as(plain)
        if rows.weights is not None:
            importance = importance * rows.weights
        return tables | {"table.levels": self._levels(plain, importance, is_kept)}

    def _levels(self, rows: torch.Tensor, importance: torch.Tensor, is_kept: torch.Tensor) -> torch.Tensor:
        step = math.ceil(rows.numel() / MAX_SAMPLES)
        rows, importance, is_kept = rows[:, ::step], importance[:, ::step], is_kept[:, ::step]
        values, weights = rows[is_kept], importance[is_kept]
        levels = line_levels(values, weights, 2**self.bits, self.iterations)
        if self.q_norm if self.q_norm is not None else self.bits == 2:
            levels = matched(levels, values)
        return ascending(levels, 1.0)


def channel_range(rows: torch.Tensor, outliers: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Half range and middle of each channel's rows between the quantiles outliers / 2 and 1 - outliers / 2.

    Args:
        rows: [kv_heads, tokens, head_dim].

    Returns:
        Two tensors [kv_heads, 1, head_dim].
    """
    ordered = rows.sort(1).values
    last = rows.shape[1] - 1
    cut = min(round(outliers / 2 * last), last // 2)
    low, high = ordered[:, cut : cut + 1], ordered[:, last - cut : last - cut + 1]
    return ((high - low) / 2).clamp(min=_LEAST_RANGE), (high + low) / 2


def token_outliers(rows: torch.Tensor, outliers: float, tile_tokens: int) -> torch.Tensor:
    """Which elements lie farthest from their token's mean, in standard deviations: a fixed number in each tile.

    Args:
        rows: [kv_heads, tokens, head_dim]; tokens behind the last whole tile share a smaller number.

    Returns:
        bool, as rows.
    """
    distance = (rows - rows.mean(2, keepdim=True)).abs() / rows.std(2, keepdim=True, correction=0).clamp(min=1e-12)
    is_outlier = torch.zeros_like(rows, dtype=torch.bool)
    for first in range(0, rows.shape[1], tile_tokens):
        tile = distance[:, first : first + tile_tokens].flatten(1)
        slots = math.ceil(outliers * tile.shape[1])
        slots = min(math.ceil(slots / SLOT_MULTIPLE) * SLOT_MULTIPLE, tile.shape[1] // 2)
        chosen = torch.zeros_like(tile, dtype=torch.bool).scatter_(1, tile.topk(slots).indices, True)
        is_outlier[:, first : first + tile_tokens] = chosen.view(len(rows), -1, rows.shape[2])
    return is_outlier


def token_range(rows: torch.Tensor, is_outlier: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Half range and middle of each token's other elements, [kv_heads, tokens, 1]; 0 where it has none."""
    low = rows.masked_fill(is_outlier, torch.inf).amin(2, keepdim=True)
    high = rows.masked_fill(is_outlier, -torch.inf).amax(2, keepdim=True)
    has_none = is_outlier.all(2, keepdim=True)
    low, high = low.masked_fill(has_none, 0), high.masked_fill(has_none, 0)
    return ((high - low) / 2).clamp(min=_LEAST_RANGE), (high + low) / 2


def normalise(rows: torch.Tensor, half_range: torch.Tensor, middle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in units of their half range around the middle, and which of them lie within it."""
    plain = (rows - middle) / half_range
    return plain, plain.abs() <= 1 + 1e-5


def matched(levels: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Q-Norm: levels moved and stretched so that quantised `values` have the mean and deviation of `values`."""
    boundaries = (levels[1:] + levels[:-1]) / 2
    quantised = levels[torch.bucketize(values, boundaries)]
    spread = quantised.std(correction=0)
    stretch = values.std(correction=0) / spread if spread > 0 else torch.ones(())
    return (levels - quantised.mean()) * stretch + values.mean()
