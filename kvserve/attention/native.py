"""The compiled CPU kernels (csrc/), called through ctypes on plain pointers."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch  # loads libgomp.so.1 first: the kernels share its thread pool

from kvserve.attention.base import (
    Answers,
    Batch,
    LayerSpec,
    NewRows,
    PagedAttention,
    Power,
    Received,
    Reduction,
    Stored,
    check_batch,
    check_cells,
    check_lse,
    check_width,
)
from kvserve.attention.saturation import rows_beyond_range
from kvserve.attention.structs import (
    KvsArena,
    KvsBatch,
    KvsKept,
    KvsLayout,
    KvsReceived,
    KvsRows,
    kvs_arena,
    kvs_batch,
    kvs_kept,
    kvs_layout,
    kvs_received,
    kvs_rows,
    rotary_positions,
)
from kvserve.codecs.layer_tables import LayerTables
from kvserve.native import LIBRARY_DIR, library_path
from kvserve.pages.kept import (
    Header,
    Kept,
    KeptRows,
    held_tokens,
    make_headers,
    read_headers,
    runs_of,
)
from kvserve.pages.layout import PageLayout

ISA_VARIABLE = "KVSERVE_ISA"
# Best first; the CPU flags (as /proc/cpuinfo spells them) that each needs.
ISA_FLAGS = {
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx2", "fma", "f16c"},
    "avx2": {"avx2", "fma", "f16c"},
    "portable": set(),
}

_int32, _int64, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class NativeAttention(PagedAttention):
    """Attention by the compiled kernels, on torch's own OpenMP threads.

    Raises:
        RuntimeError: the wanted instruction set is unknown, not built, or not supported by this CPU.
        ValueError: a table that the layer's codecs read is missing, or is not what they read.
    """

    def __init__(self, layout: PageLayout, spec: LayerSpec, isa: str | None = None, tables: LayerTables | None = None):
        super().__init__(layout, spec, tables)
        self._library = load_library(isa or choose_isa())
        self._layout = kvs_layout(layout, spec, self.tables)
        self._positions = rotary_positions(self.tables, layout.tile_format)
        self._arena_struct = KvsArena()
        self._beyond = rows_beyond_range(torch.device("cpu"))

    @property
    def isa(self) -> str:
        """Instruction set in use: portable, avx2 or avx512."""
        return self._library.kvs_isa().decode()

    @property
    def num_threads(self) -> int:
        return self._library.kvs_num_threads()

    def stage(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        num_tokens = key.shape[0]
        staged = _staging_buffer(num_tokens, self.spec.num_kv_heads, self.layout.head_dim)
        key_rows, value_rows = self._kv_rows("key", key), self._kv_rows("value", value)
        where = (staged.data_ptr(), self._beyond.data_ptr())
        self._library.kvs_stage(self._layout, key_rows, value_rows, num_tokens, *where)
        return staged

    def store_sealed(self, cells: torch.Tensor, batch: Batch, staged: torch.Tensor) -> None:
        self._library.kvs_store_sealed(self._layout, self._batch(batch), self._arena(cells), staged.data_ptr())

    def attend(
        self, query: torch.Tensor, cells: torch.Tensor, batch: Batch, staged: torch.Tensor, answers: Answers
    ) -> None:
        self._library.kvs_attend(
            self._layout,
            self._batch(batch),
            self._arena(cells),
            staged.data_ptr(),
            self._query_rows("query", query),
            self._query_rows("output", answers.output),
            _lse_pointer(answers.lse),
            None,
        )

    def forward(
        self, rows: NewRows, cells: torch.Tensor, batch: Batch, answers: Answers, received: Received | None = None
    ) -> None:
        if received:
            self.check_received(received)
        num_tokens = rows.key.shape[0]
        staged = _staging_buffer(num_tokens, self.spec.num_kv_heads, self.layout.head_dim)
        self._library.kvs_forward(
            self._layout,
            self._batch(batch),
            self._arena(cells),
            self._kv_rows("key", rows.key),
            self._kv_rows("value", rows.value),
            num_tokens,
            staged.data_ptr(),
            self._beyond.data_ptr(),
            self._query_rows("query", rows.query),
            self._query_rows("output", answers.output),
            _lse_pointer(answers.lse),
            kvs_received(received, batch.num_reqs) if received else None,
        )

    def store_tail(self, cells: torch.Tensor, batch: Batch, staged: torch.Tensor) -> None:
        self._library.kvs_store_tail(self._layout, self._batch(batch), self._arena(cells), staged.data_ptr())

    def read(
        self, stored: Stored, first: int, last: int, with_values: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.check_span(stored, first, last)
        self._check_positions(stored.num_tokens)
        key = torch.empty(self.spec.num_kv_heads, last - first, self.layout.head_dim)
        value = torch.empty_like(key) if with_values else None
        place = (self._layout, self._arena(stored.cells), stored.block_table_row.data_ptr(), stored.num_tokens)
        pointers = (key.data_ptr(), None if value is None else value.data_ptr())
        self._library.kvs_read(*place, first, last, *pointers)
        return key, value

    def read_kept(self, cells: torch.Tensor, state_block: int, kept: Kept) -> KeptRows:
        headers = read_headers(cells, self.layout, state_block)
        counts = [header.num_tokens for header in headers]
        blocks, table, offsets = _kept_arguments(kept, headers)
        key = torch.empty(sum(counts), self.layout.head_dim)
        value, mass = torch.empty_like(key), torch.empty(sum(counts)) if self._layout.mass else None
        pointers = (key.data_ptr(), value.data_ptr(), None if mass is None else mass.data_ptr())
        self._library.kvs_read_kept(self._layout, self._arena(cells), blocks, table, offsets, *pointers)
        masses = None if mass is None else list(mass.split(counts))
        return KeptRows(list(key.split(counts)), list(value.split(counts)), masses, runs_of(self.layout, headers))

    def write_kept(
        self,
        cells: torch.Tensor,
        state_block: int,
        kept: Kept,
        first_pages: Sequence[int],
        rows: KeptRows,
    ) -> None:
        if self._positions:
            raise ValueError("codecs of keys before-rope read positions, which kept pages do not have; do not evict")
        arena, runs = self._arena(cells), self.check_kept_rows(rows)
        headers = make_headers(self.layout, cells, kept, first_pages, runs)
        blocks, table, offsets = _kept_arguments(kept, headers)
        key, value = torch.cat(list(rows.keys)), torch.cat(list(rows.values))
        mass = None if rows.log_mass is None else torch.cat(list(rows.log_mass))
        pointers = (key.data_ptr(), value.data_ptr(), None if mass is None else mass.data_ptr())
        self._library.kvs_write_kept(self._layout, arena, state_block, blocks, table, offsets, *pointers)

    def attention_sums(
        self, query: torch.Tensor, stored: Stored, power: Power = 1, reduce: Reduction = "sum"
    ) -> torch.Tensor:
        cells, block_table_row, num_tokens, kept = stored
        arena = self._arena(cells)
        self.check_sums(query, stored, power, reduce)
        self._check_positions(num_tokens)
        columns = max(held_tokens(cells, self.layout, int(block_table_row[0]), num_tokens, kept))
        sums = torch.empty(self.spec.num_heads, columns)
        row, blocks = block_table_row.data_ptr(), (_int32 * len(kept.blocks))(*kept.blocks)
        rows, how = self._query_rows("query", query), (power, reduce == "max")
        place = (self._layout, arena, row, kept.end, blocks, num_tokens)
        self._library.kvs_attention_sums(*place, rows, query.shape[0], *how, sums.data_ptr(), columns)
        return sums

    def _batch(self, batch: Batch) -> KvsBatch:
        self.check_kept(batch)
        if self._positions:
            self._check_positions(max(batch.seq_lens.tolist(), default=0))
        if batch.native is None:  # once for all layers of a step
            check_batch(batch)
            check_width(batch, self.layout)
            batch.native = kvs_batch(batch)
        native: KvsBatch = batch.native
        return native

    def _check_positions(self, num_tokens: int) -> None:
        """Refuse tokens behind the rotary table, which kernels would read past."""
        if self._positions and num_tokens > self._positions:
            raise ValueError(
                f"a request of {num_tokens} tokens is longer than the rotary table of {self._positions} positions"
            )

    def _kv_rows(self, name: str, rows: torch.Tensor) -> KvsRows:
        return kvs_rows(name, rows, self.spec.num_kv_heads, self.layout.head_dim)

    def _query_rows(self, name: str, rows: torch.Tensor) -> KvsRows:
        return kvs_rows(name, rows, self.spec.num_heads, self.layout.head_dim)

    def _arena(self, cells: torch.Tensor) -> KvsArena:
        known, base = self._arena_struct, cells.data_ptr()
        if known.base != base or (known.block_stride, known.head_stride) != cells.stride()[:2]:
            check_cells(cells, self.layout, self.spec.num_kv_heads)
            self._arena_struct = kvs_arena(cells, self.layout)
        return self._arena_struct


# Shared by all layers, since staged rows live for one `forward` only: {(num_kv_heads, head_dim): buffer}.
_staging_buffers: dict[tuple[int, int], torch.Tensor] = {}


def _staging_buffer(num_tokens: int, num_kv_heads: int, head_dim: int) -> torch.Tensor:
    """Float32 [num_tokens, num_kv_heads, 2, head_dim], uninitialised."""
    buffer = _staging_buffers.get((num_kv_heads, head_dim))
    if buffer is None or buffer.shape[0] < num_tokens:
        buffer = torch.empty(num_tokens, num_kv_heads, 2, head_dim)
        _staging_buffers[num_kv_heads, head_dim] = buffer
    return buffer[:num_tokens]


def supported_isas() -> list[str]:
    """Instruction sets this CPU can run, best first."""
    flags = _cpu_flags()
    return [isa for isa, needed in ISA_FLAGS.items() if needed <= flags]


def available_isas() -> list[str]:
    """Supported instruction sets whose library is built, best first."""
    return [isa for isa in supported_isas() if library_path(isa).exists()]


def choose_isa() -> str:
    """The instruction set named by $KVSERVE_ISA, else the best available one.

    Raises:
        RuntimeError: nothing is built, or the named one is unknown, unsupported or not built.
    """
    wanted = os.environ.get(ISA_VARIABLE)
    if not wanted:
        available = available_isas()
        if not available:
            raise RuntimeError(
                f"no kvserve kernel library in {LIBRARY_DIR}; build with `python setup.py build_ext --inplace`"
            )
        return available[0]
    if wanted not in ISA_FLAGS:
        raise RuntimeError(f"{ISA_VARIABLE}={wanted} is unknown; choose one of {', '.join(ISA_FLAGS)}")
    if wanted not in supported_isas():
        missing = ", ".join(sorted(ISA_FLAGS[wanted] - _cpu_flags()))
        raise RuntimeError(f"{ISA_VARIABLE}={wanted} is not supported by this CPU, which lacks {missing}")
    return wanted


@functools.cache
def load_library(isa: str) -> ctypes.CDLL:
    """Load the kernels of one instruction set.

    Raises:
        RuntimeError: the library is not built, or was built from other sources; the message says how to build it.
    """
    path = library_path(isa)
    if not path.exists():
        raise RuntimeError(f"kernel library {path} is not built; run `python setup.py build_ext --inplace`")
    library = ctypes.CDLL(str(path))
    _check_sources(library, path)
    structs = (KvsLayout, KvsBatch, KvsArena, KvsRows, KvsReceived)
    layout, batch, arena, rows, received = map(ctypes.POINTER, structs)
    for name, arguments in {
        "kvs_stage": [layout, rows, rows, _int32, _pointer, _pointer],
        "kvs_store_sealed": [layout, batch, arena, _pointer],
        "kvs_attend": [layout, batch, arena, _pointer, rows, rows, _pointer, received],
        "kvs_store_tail": [layout, batch, arena, _pointer],
        "kvs_read": [layout, arena, _pointer, _int32, _int32, _int32, _pointer, _pointer],
        "kvs_read_kept": [layout, arena, *[_pointer] * 6],
        "kvs_write_kept": [layout, arena, _int32, *[_pointer] * 6],
        "kvs_attention_sums": [
            *(layout, arena, _pointer, _int32, _pointer, _int32, rows),
            *(_int32, _int32, _int32, _pointer, _int64),
        ],
        "kvs_forward": [
            *(layout, batch, arena, rows, rows, _int32, _pointer, _pointer),
            *(rows, rows, _pointer, received),
        ],
    }.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    library.kvs_isa.argtypes, library.kvs_isa.restype = [], ctypes.c_char_p
    library.kvs_num_threads.argtypes, library.kvs_num_threads.restype = [], _int32
    return library


def _check_sources(library: ctypes.CDLL, path: Path) -> None:
    """Refuse a library whose structs are not those of structs.py, which it would read as something else."""
    layout_bytes = getattr(library, "kvs_layout_bytes", None)  # None: older than the function
    if layout_bytes is not None:
        layout_bytes.argtypes, layout_bytes.restype = [], _int64
    if layout_bytes is None or layout_bytes() != ctypes.sizeof(KvsLayout):
        raise RuntimeError(
            f"kernel library {path} was built from other sources; run `python setup.py build_ext --inplace`"
        )


@functools.cache
def _cpu_flags() -> frozenset[str]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def _kept_arguments(kept: Kept, headers: Sequence[Header]) -> tuple[Any, Any, Any]:
    """The kernels' block ids, headers and row offsets of what one layer keeps."""
    table = (KvsKept * len(headers))(*(kvs_kept(header) for header in headers))
    offsets = (_int64 * (len(headers) + 1))(0, *accumulate(header.num_tokens for header in headers))
    return (_int32 * len(kept.blocks))(*kept.blocks), table, offsets


def _lse_pointer(lse: torch.Tensor | None) -> int | None:
    check_lse(lse)
    return None if lse is None else lse.data_ptr()
