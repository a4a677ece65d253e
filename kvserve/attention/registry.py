"""The attention kernels by name. `kvserve.checks.KERNELS` says which device each runs on."""

from __future__ import annotations

from kvserve.attention.base import LayerSpec, PagedAttention
from kvserve.codecs.layer_tables import LayerTables
from kvserve.pages.layout import PageLayout


def make_attention(
    kernels: str, layout: PageLayout, spec: LayerSpec, tables: LayerTables | None = None
) -> PagedAttention:
    """One layer's attention by the kernels of this name; those of other names are not imported.

    Args:
        tables: of the layer, where its codecs read some, on the device of its cells.

    Raises:
        KeyError: there are no such kernels.
        ValueError, RuntimeError: they do not cover the layer, or are not built.
    """
    if kernels == "native":
        from kvserve.attention.native import NativeAttention

        return NativeAttention(layout, spec, tables=tables)
    if kernels == "triton":
        from kvserve.attention.triton import TritonAttention

        return TritonAttention(layout, spec, tables)
    if kernels == "cuda":
        from kvserve.attention.cuda import CudaAttention

        return CudaAttention(layout, spec)
    if kernels == "reference":
        from kvserve.attention.reference import ReferenceAttention

        return ReferenceAttention(layout, spec, tables)
    raise KeyError(kernels)
