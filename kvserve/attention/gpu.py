"""Which kernels decode on a GPU where nobody names them: a table of what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from kvserve.pages.layout import PageLayout

CUDA_LIBRARY = Path(__file__).resolve().parent.parent / "native" / "_cuda.so"
CUDA_DTYPES = (torch.float16, torch.bfloat16)


class Format(NamedTuple):
    """What decides which kernels are faster."""

    capability: tuple[int, int]  # of the device
    head_dim: int
    key_bits: int
    value_bits: int


# Where `make bench-gpu` found the CUDA kernels faster than Triton's. No GPU has run them yet.
CUDA_IS_FASTER: frozenset[Format] = frozenset()


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
