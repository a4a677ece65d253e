"""Which kernels decode on a GPU where nobody names them: a table of what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from kvserve.pages.layout import MixedLayout, PageLayout

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
    if layout.head_dim not in CUDA_HEAD_DIMS:
        return f"head_dim {layout.head_dim}"
    if isinstance(layout, MixedLayout):
        wrong = [f"layer {index} ({bits})" for index, layer in enumerate(layout.layers) if (bits := _other_bits(layer))]
        return wrong[0] if wrong else None
    bits = _other_bits(layout)
    return f"policy {layout.policy.name} ({bits})" if bits else None


def _other_bits(layout: PageLayout) -> str | None:
    key, value = layout.policy.key, layout.policy.value
    if key is None or value is None:
        return "dense"
    covered = key.bits in CUDA_BITS and value.bits in CUDA_BITS
    return None if covered else f"K {key.bits}-bit, V {value.bits}-bit"


def measured_kernels(layout: PageLayout, model_dtype: torch.dtype, capability: tuple[int, int]) -> str:
    """cuda where they were measured faster and are built, else triton; so too where layers differ.

    Args:
        model_dtype: of queries and outputs.
        capability: compute capability of the device.
    """
    key, value = layout.policy.key, layout.policy.value
    if not CUDA_LIBRARY.exists() or model_dtype not in CUDA_DTYPES:
        return "triton"
    if layout.policy.layers or key is None or value is None:
        return "triton"
    return "cuda" if Format(capability, layout.head_dim, key.bits, value.bits) in CUDA_IS_FASTER else "triton"
