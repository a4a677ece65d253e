"""Symmetric codes of rotated values, one scale per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from kvserve.codecs.base import FLOAT16_MAX, MIN_SCALE, Codec
from kvserve.codecs.lazy import torch
from kvserve.codecs.min_max import AffineCodes
from kvserve.codecs.packing import check_planes, pack_tile, planes_section, unpack_tile
from kvserve.codecs.tile import Half, Parts, Section, Tables, Tile, TileShape

# Step of the optimal uniform mid-rise quantiser of a unit Gaussian (Max 1960, table II).
GAUSSIAN_STEP = {2: 0.9957, 4: 0.3352, 8: 0.0308}


def quantise_symmetric(x: torch.Tensor, bits: int) -> AffineCodes:
    """Symmetric mid-rise quantisation over the last dim, float32 [..., head_dim].

    The step starts at the Gaussian optimum for the row's RMS and is refitted by least squares twice, with the codes
    recomputed in between.
    """
    half_top = ((1 << bits) - 1) / 2
    scale = (x.square().mean(-1, keepdim=True).sqrt() * GAUSSIAN_STEP[bits]).clamp_min(MIN_SCALE)
    for _ in range(2):
        codes = (x * (1.0 / scale) + half_top).round().clamp(0, 2 * half_top)
        centred = codes - half_top
        scale = ((x * centred).sum(-1, keepdim=True) / centred.square().sum(-1, keepdim=True)).clamp_min(MIN_SCALE)
    stored = scale.clamp_max(FLOAT16_MAX).half()
    return AffineCodes(codes.to(torch.int32), stored, -half_top * stored.float())


@dataclass(frozen=True, kw_only=True)
class Symmetric(Codec):
    """Mid-rise codes with one scale per token, of values that an orthonormal Hadamard transform has rotated.

    The uniform form of a Lloyd-Max quantiser for Gaussian data (QuaRot, arXiv 2404.00456; TurboQuant, arXiv
    2504.19874). The rotation itself is the attention's: rows come rotated and stay so.
    """

    kind: ClassVar[int] = 2
    halves: ClassVar[tuple[Half, ...]] = (Half.VALUE,)

    name: Literal["symmetric"] = "symmetric"
    bits: Literal[2, 4, 8]

    @property
    def rotates(self) -> bool:
        return True

    def own_sections(self, shape: TileShape) -> tuple[Section, ...]:
        return planes_section("codes", shape, self.bits), Section("scales", torch.float16, (shape.tokens,), "scales")

    def check_own(self, shape: TileShape) -> None:
        check_planes(shape, self.bits)

    def params(self, shape: TileShape) -> tuple[int, ...]:
        return (self.bits,)

    def encode(self, tile: Tile, shape: TileShape, tables: Tables) -> Parts:
        coded = quantise_symmetric(tile.rows, self.bits)
        return pack_tile(coded.codes, shape, self.bits), coded.scale[:, 0]

    def decode(self, parts: Parts, shape: TileShape, tables: Tables, positions: torch.Tensor) -> torch.Tensor:
        half_top = ((1 << self.bits) - 1) / 2
        return (unpack_tile(parts[0], shape, self.bits) - half_top) * parts[1].float()[:, None]

    def describe(self, shape: TileShape) -> str:
        block = shape.head_dim & -shape.head_dim  # the rotation mixes as many channels
        blocks = "" if block == shape.head_dim else f" in blocks of {block} channels"
        return f"{self.bits}-bit rotated{blocks}, one scale per token"
