"""Which kernels attend on a GPU: a table of what was measured, and one variable that overrides it."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from kvserve.attention.base import LayerSpec
from kvserve.attention.cuda import LIBRARY, CudaAttention
from kvserve.attention.triton import TritonAttention
from kvserve.pages.layout import PageLayout

KERNELS_VARIABLE = "KVSERVE_GPU_KERNELS"
CUDA_DTYPES = (torch.float16, torch.bfloat16)


class Format(NamedTuple):
    """What decides which kernels are faster."""

    capability: tuple[int, int]  # of the device
    head_dim: int
    key_bits: int
    value_bits: int


# Where `make bench-gpu` found the CUDA kernels faster than Triton's. No GPU has run them yet.
CUDA_IS_FASTER: frozenset[Format] = frozenset()


def gpu_attention(
    layout: PageLayout, spec: LayerSpec, model_dtype: torch.dtype, capability: tuple[int, int]
) -> TritonAttention:
    """The attention of a layer: CUDA where measured faster and built, else Triton; `decode_kernels` says which.

    Args:
        model_dtype: of queries and outputs.
        capability: compute capability of the device.

    Raises:
        ValueError: $KVSERVE_GPU_KERNELS is neither cuda nor triton, or cuda and the kernels do not cover the layer.
        RuntimeError: it is cuda, and the kernels are not built.
    """
    wanted = os.environ.get(KERNELS_VARIABLE, "")
    if wanted not in ("", "cuda", "triton"):
        raise ValueError(f"{KERNELS_VARIABLE} is {wanted!r}, it must be cuda or triton")
    if wanted == "cuda" and model_dtype not in CUDA_DTYPES:
        raise ValueError(f"{KERNELS_VARIABLE}=cuda needs a model in float16 or bfloat16, not {model_dtype}")
    if wanted == "cuda" or (not wanted and _is_measured(layout, model_dtype, capability)):
        return CudaAttention(layout, spec, LIBRARY)
    return TritonAttention(layout, spec)


def _is_measured(layout: PageLayout, model_dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    key, value = layout.policy.key, layout.policy.value
    if key is None or value is None or model_dtype not in CUDA_DTYPES or not LIBRARY.exists():
        return False
    return Format(capability, layout.head_dim, key.bits, value.bits) in CUDA_IS_FASTER
