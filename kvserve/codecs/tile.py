"""A tile of one KV head: its shape, its rows, and the parts that it is stored as."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from math import prod
from typing import Literal, NamedTuple

from kvserve.codecs.lazy import torch

Tables = Mapping[str, "torch.Tensor"]  # "codec name.table name" -> what one KV head has of it
Parts = tuple["torch.Tensor", ...]  # one per section, with its dtype and shape


class Half(StrEnum):
    """The two halves of a page."""

    KEY = "key"
    VALUE = "value"


class TileShape(NamedTuple):
    half: Half
    tokens: int
    head_dim: int


class Grouping(NamedTuple):
    """Which elements share a scale: `size` consecutive tokens of a channel, or as many channels of a token."""

    per_channel: bool
    size: int


class Section(NamedTuple):
    """A contiguous part of one tile of one KV head; parts of a role lie together, codes first."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    role: Literal["codes", "scales", "index"]

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class TableSpec(NamedTuple):
    """A tensor of one layer that a codec reads, and did not make.

    Attributes:
        axes: sizes; "kv_heads" may come first, and means that each KV head has its own. A table with an axis
            "positions" is the model's own, made by the engine; all others are calibrated.
    """

    name: str
    axes: tuple[str | int, ...]
    dtype: torch.dtype


class Tile(NamedTuple):
    """What is written: `tokens` consecutive rows of one KV head.

    Attributes:
        rows: float32 [tokens, head_dim]; keys after RoPE, values rotated where the codec `rotates`.
        counted: bool [tokens]; the others (dense sinks) are never read back, and define no range that tokens share.
        positions: int64 [tokens].
    """

    rows: torch.Tensor
    counted: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor, first_counted: int = 0, first_position: int = 0) -> Tile:
        """A tile of consecutive tokens."""
        index = torch.arange(len(rows))
        return cls(rows, index >= first_counted, first_position + index)
