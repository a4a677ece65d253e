"""Which kernels decode on a GPU where nobody names them: a table of what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from kvserve.codecs.affine import Affine
from kvserve.codecs.affine_family import is_in_family
from kvserve.codecs.format import TileFormat
from kvserve.codecs.symmetric import Symmetric
from kvserve.codecs.tile import Half
from kvserve.pages.layout import PageLayout

CUDA_LIBRARY = Path(__file__).resolve().parent.parent / "native" / "_cuda.so"
CUDA_DTYPES = (torch.float16, torch.bfloat16)
CUDA_HEAD_DIMS, CUDA_BITS = (64, 128), (2, 4)  # as csrc/cuda/dispatch.h


class Format(NamedTuple):
    """What decides which kernels are faster."""

    capability: tuple[int, int]  # of the device
    head_dim: int
    key_bits: int
    value_bits: int


# Where `make bench-gpu` found the CUDA kernels faster than Triton's. No GPU has run them yet.
CUDA_IS_FASTER: frozenset[Format] = frozenset()


def uncovered_by_cuda(layout: PageLayout) -> str | None:
    """What of a layout the CUDA kernels do not cover, in words; None: they cover it."""
    if layout.policy.has_mass:
        assert layout.policy.eviction is not None
        return f"the retention {layout.policy.eviction.retention.name}"
    if layout.head_dim not in CUDA_HEAD_DIMS:
        return f"head_dim {layout.head_dim}"
    for index, layer in enumerate(layout.each_layer(layout.num_layers or 1)):
        if codecs := _other_codecs(layer):
            return f"{f'policy {layout.policy.name}' if layout.is_uniform else f'layer {index}'} ({codecs})"
    return None


def _other_codecs(layout: PageLayout) -> str | None:
    tile_format = layout.tile_format
    if tile_format.dense_dtype is not None:
        return "dense"
    words = [f"{half[0].upper()} {word}" for half in Half if (word := _other_codec(tile_format, half))]
    if layout.other_formats:
        words.append("kept tokens in two formats")
    return ", ".join(words) or None


def _other_codec(tile_format: TileFormat, half: Half) -> str | None:
    """What a half's codec is, in words; None: keys with a scale per channel or values with one per token,
    of the tile's own ranges."""
    codec, _ = tile_format.half(half)
    if isinstance(codec, Affine) and codec.clip:
        return f"{codec.bits}-bit with clipped ranges"
    if is_in_family(codec, half):
        return None if codec.bits in CUDA_BITS else f"{codec.bits}-bit"
    if isinstance(codec, Affine):
        return f"{codec.bits}-bit per {'token' if half is Half.KEY else 'channel'}"
    return " of ".join(stage.name for stage in codec.chain())


def measured_kernels(layout: PageLayout, model_dtype: torch.dtype, capability: tuple[int, int]) -> str:
    """cuda where they were measured faster and are built, else triton; so too where layers differ.

    Args:
        model_dtype: of queries and outputs.
        capability: compute capability of the device.
    """
    if not CUDA_LIBRARY.exists() or model_dtype not in CUDA_DTYPES:
        return "triton"
    if layout.policy.layers or layout.policy.has_mass or _other_codecs(layout):
        return "triton"
    key, value = layout.policy.key, layout.policy.value
    assert isinstance(key, Affine) and isinstance(value, Affine | Symmetric)
    return "cuda" if Format(capability, layout.head_dim, key.bits, value.bits) in CUDA_IS_FASTER else "triton"
