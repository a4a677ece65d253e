"""What a calibration method is: what a model makes of a text in, tables of codecs, transforms and budgets out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field

from kvserve.codecs.layer_tables import KV_HEADS
from kvserve.codecs.tile import Half

# What a table's entries must be, beside finite (kvserve/calibration/tables.py has the checks).
Rule = Literal["finite", "levels", "range", "permutation", "clip", "flag"]


class Table(NamedTuple):
    """A tensor that a method makes for each layer.

    Attributes:
        half: None: it is of heads, and not of the keys or the values.
        name: of the codec or transform that reads it and its own name, for example "table.levels".
        axes: sizes; "kv_heads" stands for the KV heads of the model, and is the first axis where there is one.
    """

    half: Half | None
    name: str
    axes: tuple[str | int, ...]
    dtype: torch.dtype = torch.float32
    rule: Rule = "finite"

    @property
    def full_name(self) -> str:
        """As policies and files name it, for example "key.table.levels"."""
        return f"{self.half}.{self.name}" if self.half else self.name

    def shape(self, num_kv_heads: int) -> tuple[int, ...]:
        """The axes in numbers."""
        return tuple(num_kv_heads if axis == KV_HEADS else int(axis) for axis in self.axes)


@dataclass(frozen=True)
class HalfRows:
    """Keys or values of one layer.

    Attributes:
        rows: float32 [kv_heads, tokens, head_dim]; consecutive tokens, without the first ones of every text.
        weights: how much an error of each element matters (squared gradients of the loss), float32, at least 0 and of
            the same shape; None: all matter alike.
    """

    rows: torch.Tensor
    weights: torch.Tensor | None = None

    def tempered(self, power: float) -> HalfRows:
        """With the weights raised to a power."""
        return self if self.weights is None else HalfRows(self.rows, self.weights**power)


class AnyMethod(BaseModel, ABC):
    """The parameters of a method, whatever it looks at."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    paper: ClassVar[str]

    @abstractmethod
    def tables(self, head_dim: int) -> tuple[Table, ...]:
        """What it makes for a layer.

        Raises:
            ValueError: the parameters do not fit the head; the message names the fix.
        """


class Method(AnyMethod):
    """One that looks at the rows of a layer.

    `keys` says which keys it looks at, those before or those after the rotary embedding. The first `sinks` tokens of
    every text are left out: policies keep them dense, and their rows are like no others.

    Squared gradients weigh errors after they are raised to `temper`. The papers have 1. But a few of some ten thousand
    tokens then count for most of the sum, and tables fit these: on text that was not read, 0.5 has about the weighted
    error of 1, and less plain error.
    """

    keys: Literal["before-rope", "after-rope"] = "before-rope"
    sinks: Annotated[int, Field(ge=0, le=64)] = 4
    temper: Annotated[float, Field(gt=0, le=1)] = 0.5

    @abstractmethod
    def fit(self, half: Half, rows: HalfRows, seed: int) -> dict[str, torch.Tensor]:
        """The tables of one half of one layer, by their names; the same rows and seed give the same tables."""
