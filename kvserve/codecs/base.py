"""What a codec is: how one tile of keys, or of values, of one KV head is written and read back.

A codec is a frozen dataclass of parameters. It holds no tensor: what is calibrated comes as `tables`. A wrapper has an
`inner` codec, and adds its own part to what that one writes; `chain()` is the wrappers, outermost first, and the codec
inside them. Pages and kernels know a codec by its `kind` and `params`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from kvserve.codecs.lazy import torch
from kvserve.codecs.tile import Grouping, Half, Parts, Section, Tables, TableSpec, Tile, TileShape

FLOAT16_MAX = 65504.0  # scales, lows and whatever else is stored as float16 saturate
MIN_SCALE = 2.0**-20
MAX_STAGES, MAX_PARAMS = 4, 8  # KvsHalf and KvsCodec of csrc/kvserve.h

__all__ = ["Codec", "Grouping", "Half", "Parts", "Section", "TableSpec", "Tables", "Tile", "TileShape"]


@dataclass(frozen=True, kw_only=True)
class Codec(ABC):
    """Parameters of one way to write a tile; subclasses give `name`, the word of YAML files, a default."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: ClassVar[int] = 0  # its number in csrc/codecs and kernels/codecs; 0: the PyTorch reference alone knows it
    halves: ClassVar[tuple[Half, ...]] = tuple(Half)  # what it can write

    name: str

    @property
    def rotates(self) -> bool:
        """Whether values go through the fused Hadamard transform before they are staged."""
        return False

    @property
    def needs_positions(self) -> bool:
        """Whether reading a tile takes the positions of its tokens."""
        return False

    def chain(self) -> tuple[Codec, ...]:
        """This codec and those inside it, outermost first."""
        return (self,)

    def sections(self, shape: TileShape) -> tuple[Section, ...]:
        """Everything that is stored of a tile: its own sections, then those of the codecs inside."""
        return tuple(section for stage in self.chain() for section in stage.own_sections(shape))

    def tables(self, shape: TileShape) -> dict[str, TableSpec]:
        """Everything that is read beside the tile, by "codec name.table name"."""
        return {f"{stage.name}.{spec.name}": spec for stage in self.chain() for spec in stage.own_tables(shape)}

    def code_bits(self, shape: TileShape) -> float:
        """Bits of an element's code, without scales and whatever else is stored."""
        codes = sum(section.size_bytes for section in self.sections(shape) if section.role == "codes")
        return 8 * codes / (shape.tokens * shape.head_dim)

    def check(self, shape: TileShape) -> None:
        """Refuse tiles that this codec, or one inside it, cannot write.

        Raises:
            ValueError: one sentence that names the fix.
        """
        names = [stage.name for stage in self.chain()]
        if len(names) > MAX_STAGES or len(set(names)) < len(names):
            raise ValueError(f"{shape.half} nests {', '.join(names)}; nest at most {MAX_STAGES}, each of them once")
        for stage in self.chain():
            if shape.half not in stage.halves:
                raise ValueError(f"{stage.name} writes {stage.halves[0]}s only; choose another codec for {shape.half}")
            stage.check_own(shape)

    @abstractmethod
    def own_sections(self, shape: TileShape) -> tuple[Section, ...]:
        """Its sections without those of an inner codec."""

    def own_tables(self, shape: TileShape) -> tuple[TableSpec, ...]:
        """Its tables without those of an inner codec."""
        return ()

    def check_own(self, shape: TileShape) -> None:
        """`check`, without the inner codec."""
        return

    def grouping(self, shape: TileShape) -> Grouping:
        """What shares a scale; where nothing does, a tile's tokens for keys and a token's channels for values."""
        per_channel = shape.half is Half.KEY
        return Grouping(per_channel, shape.tokens if per_channel else shape.head_dim)

    def fixed_range(self, tables: Tables) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(middle, half range) of what it can represent, whatever the tile; float32 [head_dim]. None: it adapts."""
        return None

    @abstractmethod
    def params(self, shape: TileShape) -> tuple[int, ...]:
        """What kernels read of it, at most MAX_PARAMS numbers."""

    @abstractmethod
    def encode(self, tile: Tile, shape: TileShape, tables: Tables) -> Parts:
        """Write a tile: one tensor per section of `sections`."""

    @abstractmethod
    def decode(self, parts: Parts, shape: TileShape, tables: Tables, positions: torch.Tensor) -> torch.Tensor:
        """Read a tile back, float32 [tokens, head_dim]; `positions` is int64 [tokens]."""

    @abstractmethod
    def describe(self, shape: TileShape) -> str:
        """How it writes, in words of the startup table."""
