"""What a package that brings parts to kvserve looks like: one of each kind, without a fork."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from kvserve.budgets.uniform import Uniform
from kvserve.codecs.base import FLOAT16_MAX, Codec, Parts, Section, Tables, Tile, TileShape
from kvserve.retention.evict import Evict
from kvserve.schedules.every_n import EveryN
from kvserve.scorers.base import LayerView, Scorer


class EveryOther(Scorer):
    """Tokens at every `period`-th position are worth 1, the others 0."""

    query_agnostic: ClassVar[bool] = True

    name: Literal["every-other"] = "every-other"  # type: ignore[assignment]
    period: int = 2

    def _score(self, view: LayerView) -> torch.Tensor:
        return (view.positions % self.period == 0).float().expand(view.kv_heads, -1)


class ExampleBudget(Uniform):
    """As `uniform`, under another name."""

    name: Literal["example-budget"] = "example-budget"  # type: ignore[assignment]


class ExampleSchedule(EveryN):
    """As `every-n`, under another name."""

    name: Literal["example-schedule"] = "example-schedule"  # type: ignore[assignment]


class ExampleRetention(Evict):
    """As `evict`, under another name."""

    name: Literal["example-retention"] = "example-retention"  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class OneBit(Codec):
    """The sign of each element, times the mean magnitude of a token's elements."""

    name: Literal["one-bit"] = "one-bit"

    def own_sections(self, shape: TileShape) -> tuple[Section, ...]:
        signs = Section("codes", torch.uint8, (shape.tokens * shape.head_dim // 8,), "codes")
        return signs, Section("scales", torch.float16, (shape.tokens,), "scales")

    def params(self, shape: TileShape) -> tuple[int, ...]:
        return ()

    def encode(self, tile: Tile, shape: TileShape, tables: Tables) -> Parts:
        scale = tile.rows.abs().mean(1).clamp_max(FLOAT16_MAX).half()
        bits = (tile.rows > 0).to(torch.uint8).view(-1, 8) << torch.arange(8, dtype=torch.uint8)
        return bits.sum(1, dtype=torch.uint8), scale

    def decode(self, parts: Parts, shape: TileShape, tables: Tables, positions: torch.Tensor) -> torch.Tensor:
        bits = parts[0][:, None] >> torch.arange(8, dtype=torch.uint8) & 1
        return (bits.float() * 2 - 1).view(shape.tokens, shape.head_dim) * parts[1].float()[:, None]

    def describe(self, shape: TileShape) -> str:
        return "1 bit and a scale per token"
