"""What codecs that add to another one have in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from kvserve.codecs.base import Codec
from kvserve.codecs.lazy import torch
from kvserve.codecs.tile import Grouping, Parts, Tables, TileShape


@dataclass(frozen=True, kw_only=True)
class Wrapper(Codec):
    """A codec with another one inside."""

    inner: Codec

    def chain(self) -> tuple[Codec, ...]:
        return (self, *self.inner.chain())

    @property
    def rotates(self) -> bool:
        return self.inner.rotates

    @property
    def needs_positions(self) -> bool:
        return self.inner.needs_positions

    def grouping(self, shape: TileShape) -> Grouping:
        return self.inner.grouping(shape)

    def fixed_range(self, tables: Tables) -> tuple[torch.Tensor, torch.Tensor] | None:
        return self.inner.fixed_range(tables)

    def split(self, parts: Parts, shape: TileShape) -> tuple[Parts, Parts]:
        """The parts of its own sections, and those of the inner codec's."""
        own = len(self.own_sections(shape))
        return parts[:own], parts[own:]

    def describe(self, shape: TileShape) -> str:
        return f"{self.inner.describe(shape)}, {self.describe_own(shape)}"

    @abstractmethod
    def describe_own(self, shape: TileShape) -> str:
        """What it adds, in words of the startup table."""
