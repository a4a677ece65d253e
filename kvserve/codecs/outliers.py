"""The few elements that another codec would spoil, or that would spoil it, stored as they are."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar, Literal

from kvserve.codecs.base import FLOAT16_MAX, MIN_SCALE
from kvserve.codecs.lazy import torch
from kvserve.codecs.tile import Grouping, Parts, Section, Tables, Tile, TileShape
from kvserve.codecs.wrapper import Wrapper

STEP = 8  # outliers of a tile are a multiple of it
MAX_FRACTION = 0.25


@dataclass(frozen=True, kw_only=True)
class Outliers(Wrapper):
    """`fraction` of a tile's elements are float16, each with its place (KVQuant, arXiv 2401.18079; GEAR,
    arXiv 2403.05527).

    Which: those with the largest |x - middle| / reach, ties: the lower place. Where the inner codec has a fixed range
    these are the range's; else mean and standard deviation of the elements that share a scale, summed in float64 over
    the counted tokens and rounded to float32. Tokens that are not counted come last.
    The inner codec is given the middle of its fixed range in their places, else the mean of the others that share the
    scale, so that they widen no range. Places are token * head_dim + channel, ascending. What is read back replaces
    what the inner codec has.
    """

    kind: ClassVar[int] = 5

    name: Literal["outliers"] = "outliers"
    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= MAX_FRACTION:
            raise ValueError(f"fraction must be above 0 and at most {MAX_FRACTION}, got {self.fraction:g}")

    def count(self, shape: TileShape) -> int:
        """Outliers of a tile."""
        return ceil(self.fraction * shape.tokens * shape.head_dim / STEP) * STEP

    def own_sections(self, shape: TileShape) -> tuple[Section, ...]:
        count = (self.count(shape),)
        return Section("values", torch.float16, count, "scales"), Section("index", torch.uint16, count, "index")

    def params(self, shape: TileShape) -> tuple[int, ...]:
        return (self.count(shape),)

    def encode(self, tile: Tile, shape: TileShape, tables: Tables) -> Parts:
        grouping, fixed = self.inner.grouping(shape), self.inner.fixed_range(tables)
        counted = tile.counted[:, None].expand(tile.rows.shape)
        middle, reach = fixed or mean_and_deviation(tile.rows, counted, grouping)
        distance = ((tile.rows - middle).abs() / reach).masked_fill(~counted, -1.0).flatten()
        index = distance.sort(descending=True, stable=True).indices[: self.count(shape)].sort().values
        is_outlier = torch.zeros(tile.rows.numel(), dtype=torch.bool)
        is_outlier[index] = True
        is_outlier = is_outlier.view(tile.rows.shape)
        if fixed is None:
            middle, _ = mean_and_deviation(tile.rows, counted & ~is_outlier, grouping)
        values = tile.rows.flatten()[index].clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
        others = tile._replace(rows=torch.where(is_outlier, middle, tile.rows))
        return values, index.to(torch.uint16), *self.inner.encode(others, shape, tables)

    def decode(self, parts: Parts, shape: TileShape, tables: Tables, positions: torch.Tensor) -> torch.Tensor:
        (values, index), inner = self.split(parts, shape)
        rows = self.inner.decode(inner, shape, tables, positions).flatten()
        rows[index.long().clamp_max(len(rows) - 1)] = values.float()  # whatever a damaged page has
        return rows.view(shape.tokens, shape.head_dim)

    def describe_own(self, shape: TileShape) -> str:
        return f"{self.count(shape)} outliers of a tile in float16"


def mean_and_deviation(rows: torch.Tensor, of: torch.Tensor, grouping: Grouping) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the elements `of` a group, float32 [tokens, head_dim], at least MIN_SCALE.

    Args:
        rows: float32 [tokens, head_dim].
        of: bool [tokens, head_dim]; a group without any has mean 0.
    """
    tokens, head_dim = rows.shape
    groups = (-1, grouping.size, head_dim) if grouping.per_channel else (tokens, -1, grouping.size)
    dim = 1 if grouping.per_channel else 2
    x, weight = rows.double().reshape(groups), of.double().reshape(groups)
    count = weight.sum(dim, keepdim=True).clamp_min(1)
    mean = (x * weight).sum(dim, keepdim=True) / count
    deviation = (((x - mean) * weight).square().sum(dim, keepdim=True) / count).sqrt()
    shaped = (part.float().expand(groups).reshape(tokens, head_dim) for part in (mean, deviation))
    middle, reach = shaped
    return middle, reach.clamp_min(MIN_SCALE)
