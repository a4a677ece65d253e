"""The CUDA kernels of csrc/cuda/: decode attention over 2- and 4-bit pages; everything else is Triton's."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from math import ceil
from pathlib import Path

import torch

from kvserve.attention.base import Answers, LayerSpec
from kvserve.attention.gpu import CUDA_LIBRARY
from kvserve.attention.structs import (
    KvsArena,
    KvsBatch,
    KvsLayout,
    KvsRows,
    kvs_arena,
    kvs_batch,
    kvs_layout,
    kvs_rows,
)
from kvserve.attention.triton import TritonAttention
from kvserve.kernels.decode import MAX_SPLITS, processors
from kvserve.kernels.geometry import Tables, check_device
from kvserve.pages.layout import PageLayout

HEADS_PER_BLOCK = 8
WARPS_PER_BLOCK = 4
BLOCKS_PER_PROCESSOR = 4  # what the number of splits aims at


class KvsLaunch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("splits", "warps", "stages")),
        *((name, ctypes.c_void_p) for name in ("workspace", "stream")),
    ]


class CudaAttention(TritonAttention):
    """Triton's attention with the CUDA kernels for steps of one token.

    Args:
        library: the compiled kernels.

    Raises:
        ValueError: the kernels do not cover the layout; the message says what does.
        RuntimeError: the library is not built.
    """

    decode_kernels = "cuda"

    def __init__(self, layout: PageLayout, spec: LayerSpec, library: Path = CUDA_LIBRARY):
        super().__init__(layout, spec)
        self._library, self._layout = load_library(library), kvs_layout(layout, spec)
        reason = self._library.kvs_cuda_unsupported(self._layout)
        if reason is not None:
            raise ValueError(reason.decode())

    def decode(
        self, query: torch.Tensor, tables: Tables, staged: torch.Tensor, answers: Answers, **launch: int
    ) -> None:
        """Attention of the requests that bring exactly one token; rows of the others are not written.

        Args:
            query: [num_tokens, num_heads, head_dim] in the dtype of dense slots, as `answers.output`.
            launch: the numbers of a `KvsLaunch`. splits: blocks that share a sequence; 0: by the shapes. warps: of a
                block, 1, 2 or 4; 0: as many as fit. stages: pages that a warp has in flight, 2 to 4; 0: as many as fit,
                up to 3.

        Raises:
            ValueError: the message of the kernels, for a dtype, an alignment or launch parameters that they refuse.
        """
        cells, batch, device, (output, lse) = tables.cells, tables.batch, query.device, answers
        check_device(cells=cells, query=query, staged=staged, output=output, lse=lse, block_table=batch.block_table)
        splits = launch.pop("splits", 0) or self.num_splits(
            batch.num_reqs, batch.block_table.shape[1], processors(device)
        )
        floats = self._library.kvs_cuda_workspace_floats(self._layout, batch.num_reqs, splits)
        workspace = torch.empty(floats, dtype=torch.float32, device=device)
        on_gpu = device.type == "cuda"
        with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
            stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else None
            wrong = self._library.kvs_cuda_decode(
                self._layout,
                kvs_batch(batch),
                kvs_arena(cells, self.layout),
                staged.data_ptr(),
                kvs_rows("query", query, self.spec.num_heads, self.layout.head_dim),
                kvs_rows("output", output, self.spec.num_heads, self.layout.head_dim),
                None if lse is None else lse.data_ptr(),
                KvsLaunch(splits=splits, workspace=workspace.data_ptr(), stream=stream, **launch),
            )
        if wrong is not None:
            raise ValueError(wrong.decode())

    def num_splits(self, num_reqs: int, max_blocks: int, processors: int) -> int:
        """Blocks that share a sequence: enough to fill the device, with a page for each of their warps."""
        blocks = num_reqs * self.spec.num_kv_heads * ceil(self.spec.group / HEADS_PER_BLOCK)
        wanted = BLOCKS_PER_PROCESSOR * processors // max(blocks, 1)
        pages = max_blocks * self.layout.tiles_per_block
        return max(1, min(wanted, ceil(pages / WARPS_PER_BLOCK), MAX_SPLITS))


@functools.cache
def load_library(path: Path) -> ctypes.CDLL:
    """Load the compiled kernels; works without a GPU, where launches then fail.

    Raises:
        RuntimeError: the library is not built; the message says how to build it.
    """
    if not path.exists():
        raise RuntimeError(f"the CUDA kernels {path} are not built; run `make cuda` where there is nvcc")
    library = ctypes.CDLL(str(path))
    layout, batch, arena, rows = (ctypes.POINTER(struct) for struct in (KvsLayout, KvsBatch, KvsArena, KvsRows))
    pointer, launch = ctypes.c_void_p, ctypes.POINTER(KvsLaunch)
    library.kvs_cuda_unsupported.argtypes = [layout]
    library.kvs_cuda_unsupported.restype = ctypes.c_char_p
    library.kvs_cuda_workspace_floats.argtypes = [layout, ctypes.c_int32, ctypes.c_int32]
    library.kvs_cuda_workspace_floats.restype = ctypes.c_int64
    library.kvs_cuda_decode.argtypes = [layout, batch, arena, pointer, rows, rows, pointer, launch]
    library.kvs_cuda_decode.restype = ctypes.c_char_p
    return library
