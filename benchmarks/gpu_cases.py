"""Workloads of `benchmarks.gpu`: arenas of valid pages, the launches of kvserve that are timed, and their check.

Import it only after TRITON_INTERPRET is decided. Formats are written down here and not read from configs/, which needs
pydantic: a bare machine with torch and Triton is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from kvserve.attention.base import Answers, Batch, LayerSpec, NewRows, Received, Stored
from kvserve.attention.cuda import CudaAttention
from kvserve.attention.gpu import CUDA_HEAD_DIMS, CUDA_LIBRARY
from kvserve.attention.reference import ReferenceAttention
from kvserve.attention.triton import TritonAttention
from kvserve.codecs.affine import Affine
from kvserve.codecs.base import Codec
from kvserve.codecs.symmetric import Symmetric
from kvserve.kernels.geometry import Tables
from kvserve.pages.kept import Header, Kept, KeptRows, KeptTable, Run, arena_of, pages_per_block, write_header
from kvserve.pages.layout import PageLayout
from kvserve.pages.reference import encode_page

# name: (keys, values, sinks), as in configs/ of that name
FORMATS: dict[str, tuple[Codec, Codec, int] | None] = {
    "kivi-2bit": (Affine(bits=2, group_size=32), Affine(bits=2, group_size=64), 8),
    "boost-2bit": (Affine(bits=2, group_size=64, boost_fraction=0.25), Symmetric(bits=2), 8),
    "kivi-4bit": (Affine(bits=4, group_size=64), Affine(bits=4, group_size=64), 0),
    "int8": (Affine(bits=8, group_size=64), Affine(bits=8), 0),
    "none": None,
}
CUDA_FORMATS = ("kivi-2bit", "boost-2bit", "kivi-4bit")
DENSE_PAGES = "dense"  # pages that can be evicted, in the model's dtype: checked, and not timed


def kernels_for(name: str, head_dim: int, device: torch.device) -> list[str]:
    """The decode kernels that can serve a format here: triton, and cuda where it is built and covers it."""
    covered = name in CUDA_FORMATS and head_dim in CUDA_HEAD_DIMS
    return ["triton", "cuda"] if covered and device.type == "cuda" and CUDA_LIBRARY.exists() else ["triton"]


def attention_of(kernels: str, layout: PageLayout, spec: LayerSpec) -> TritonAttention:
    """Attention with the named decode kernels."""
    return CudaAttention(layout, spec) if kernels == "cuda" else TritonAttention(layout, spec)


@dataclass(frozen=True)
class Workload:
    """One decode step: `batch` requests of `context` tokens, the new one included."""

    context: int
    batch: int
    head_dim: int
    group: int
    num_kv_heads: int = 8

    @property
    def spec(self) -> LayerSpec:
        return LayerSpec(self.group * self.num_kv_heads, self.num_kv_heads, self.head_dim**-0.5)

    @property
    def dense_bytes(self) -> int:
        """K and V of all tokens in 16 bits."""
        return 4 * self.batch * self.context * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class BarePolicy:
    """As much of a policy as a layout reads."""

    name: str
    key: Codec | None
    value: Codec | None
    sink_tokens: int
    dense_pages: bool
    tile_tokens: int = 64
    eviction: None = None
    layers: tuple[()] = ()
    has_mass: bool = False

    @property
    def is_dense(self) -> bool:
        return self.key is None

    @property
    def has_pages(self) -> bool:
        return self.dense_pages or self.key is not None


def layout_of(name: str, head_dim: int, dtype: torch.dtype, state_blocks: int = 0) -> PageLayout:
    """The page layout of a format, in blocks of 64 tokens."""
    paged = name == DENSE_PAGES
    key, value, sinks = (None if paged else FORMATS[name]) or (None, None, 0)
    policy: Any = BarePolicy(name, key, value, sinks, paged)
    return PageLayout.build(policy, head_dim, 64, dtype, state_blocks)


def filled_cells(layout: PageLayout, num_blocks: int, heads: int, device: torch.device) -> torch.Tensor:
    """An arena of one layer, uint8 [num_blocks, heads, cell_bytes], in which every cell holds valid contents."""
    rows = torch.randn(2, 64, layout.head_dim, generator=torch.Generator().manual_seed(0))
    if not layout.has_pages:
        cell = rows.transpose(0, 1).to(layout.dense_dtype).contiguous().view(torch.uint8).flatten()
    else:
        cell = encode_page(rows[0], rows[1], layout)
    return cell.to(device).expand(num_blocks, heads, -1).contiguous()


@dataclass
class Step:
    """A decode step ready to launch."""

    attention: TritonAttention
    cells: torch.Tensor
    batch: Batch
    query: torch.Tensor
    new: tuple[torch.Tensor, torch.Tensor]  # K and V of the step's tokens
    staged: torch.Tensor
    output: torch.Tensor
    moved_bytes: int  # of pages and slots that attention has to read

    def forward(self) -> None:
        """All that a layer does in the step."""
        self.attention.forward(NewRows(self.query, *self.new), self.cells, self.batch, Answers(self.output))

    def attend(self) -> None:
        self.attention.attend(self.query, self.cells, self.batch, self.staged, Answers(self.output))

    def attend_with(self, **launch: int) -> None:
        """`attend` with other launch parameters than the kernel's own."""
        tables = Tables.of(self.attention.layout, self.cells, self.batch, 1)
        self.attention.decode(self.query, tables, self.staged, Answers(self.output), **launch)

    def receiver(self) -> Callable[[], None]:
        """A call that adds up the attention that tokens receive in the step."""
        heads, columns = self.cells.shape[1], int(self.batch.seq_lens.max())
        sums = {r: torch.zeros(heads, columns, device=self.cells.device) for r in range(self.batch.num_reqs)}
        lse = torch.empty(self.query.shape[:2], device=self.cells.device)
        self.attention.attend(self.query, self.cells, self.batch, self.staged, Answers(self.output, lse))
        asked = (self.query, self.cells, self.batch, self.staged, lse, Received(2, sums))
        return lambda: self.attention.add_received(*asked)

    def store(self) -> None:
        self.attention.store_sealed(self.cells, self.batch, self.staged)
        self.attention.store_tail(self.cells, self.batch, self.staged)


def decode_step(
    name: str, work: Workload, dtype: torch.dtype, device: torch.device, state_blocks: int = 0, kernels: str = "triton"
) -> Step:
    """A decode step over an arena whose blocks lie in random order."""
    layout = layout_of(name, work.head_dim, dtype, state_blocks)
    per_request = layout.blocks_for(work.context)
    table = torch.randperm(work.batch * per_request, device=device).int().view(work.batch, per_request)
    cells = filled_cells(layout, work.batch * per_request, work.num_kv_heads, device)
    if layout.has_pages:  # tail and sink blocks hold slots: zeros are valid ones
        dense_blocks = table[:, state_blocks : layout.private_blocks].flatten()
        if layout.sink_blocks:
            first = layout.tile_row(0) + 1
            dense_blocks = torch.cat([dense_blocks, table[:, first : first + layout.sink_blocks].flatten()])
        cells[dense_blocks.long()] = 0
    starts = torch.arange(work.batch + 1, dtype=torch.int32, device=device)
    lengths = torch.full((work.batch,), work.context, dtype=torch.int32, device=device)
    batch = Batch(starts, lengths, table, max_query_len=1)
    query = torch.randn(work.batch, work.spec.num_heads, work.head_dim, device=device).to(dtype)
    key, value = torch.randn(2, work.batch, work.num_kv_heads, work.head_dim, device=device).to(dtype)
    attention = attention_of(kernels, layout, work.spec)
    staged, output = attention.stage(key, value), torch.empty_like(query)
    return Step(attention, cells, batch, query, (key, value), staged, output, moved_bytes(layout, work))


def moved_bytes(layout: PageLayout, work: Workload) -> int:
    """Bytes of pages and dense slots that one decode step reads."""
    tiles = (work.context - 1) // layout.tile_tokens
    slots = work.context - tiles * layout.tile_tokens + (layout.policy.sink_tokens if tiles else 0)
    per_head = tiles * layout.tile_format.tile_bytes + slots * layout.slot_bytes
    return work.batch * work.num_kv_heads * per_head


def kept_step(
    name: str, work: Workload, dtype: torch.dtype, device: torch.device, ragged: bool, kernels: str = "triton"
) -> Step:
    """A decode step right after eviction: `context` kept tokens per head, or as many in all but ragged.

    Ragged heads keep between a quarter and seven quarters of it.
    """
    layout = layout_of(name, work.head_dim, dtype, state_blocks=1)
    heads, tile = work.num_kv_heads, layout.tile_tokens
    pages = torch.full((heads,), work.context // tile)
    if ragged:
        share = torch.linspace(0.25, 1.75, heads)
        pages = (pages * share).long()
    blocks = ceil(int(pages.sum()) / pages_per_block(layout, heads, 1))
    end = 4 * work.context
    in_row = layout.tile_row(0) + 1 + layout.sink_blocks
    per_request = in_row + blocks
    ids = torch.randperm(work.batch * per_request, device=device).int().view(work.batch, per_request)
    table, kept_blocks = ids[:, :in_row], ids[:, in_row:].flatten()
    cells = filled_cells(layout, work.batch * per_request, heads, device)
    cells[table.flatten().long()] = 0
    first = pages.cumsum(0) - pages
    for row in table.tolist():
        for head in range(heads):
            header = Header(end, (Run(0, int(first[head]), int(pages[head]) * tile),))
            write_header(arena_of(cells, layout), row[0], head, header)
    starts = torch.arange(work.batch + 1, dtype=torch.int32, device=device)
    lengths = torch.full((work.batch,), end + 1, dtype=torch.int32, device=device)
    kept = KeptTable(torch.full_like(lengths, end), starts * blocks, kept_blocks)
    batch = Batch(starts, lengths, table, kept, max_query_len=1)
    query = torch.randn(work.batch, work.spec.num_heads, work.head_dim, device=device).to(dtype)
    key, value = torch.randn(2, work.batch, heads, work.head_dim, device=device).to(dtype)
    attention = attention_of(kernels, layout, work.spec)
    staged = attention.stage(key, value)
    moved = work.batch * int(pages.sum()) * layout.tile_format.tile_bytes
    return Step(attention, cells, batch, query, (key, value), staged, torch.empty_like(query), moved)


def compaction(name: str, work: Workload, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], None], int]:
    """A call that keeps every second token of one request of `context` tokens, and the tokens it writes."""
    step = decode_step(name, Workload(work.context, 1, work.head_dim, 1, work.num_kv_heads), dtype, device, 1)
    layout, heads = step.attention.layout, work.num_kv_heads
    end = work.context // layout.tile_tokens * layout.tile_tokens
    positions = torch.arange(layout.policy.sink_tokens, end, 2, device=device)
    pages = ceil(len(positions) / layout.tile_tokens)
    blocks = ceil(pages * heads / pages_per_block(layout, heads, 1))
    cells = torch.cat([step.cells, torch.empty_like(step.cells[:1]).expand(blocks, -1, -1)])
    row, kept = step.batch.block_table[0], Kept(end, tuple(range(len(step.cells), len(cells))))
    state_block, first_pages = int(row[0]), [head * pages for head in range(heads)]

    def compact() -> None:
        key, value = step.attention.read(Stored(cells, row, end), 0, end)
        assert value is not None
        keys, values = (list(rows[:, positions]) for rows in (key, value))
        step.attention.write_kept(cells, state_block, kept, first_pages, KeptRows(keys, values))

    return compact, heads * len(positions)


def check(
    name: str, work: Workload, dtype: torch.dtype, device: torch.device, kernels: str = "triton"
) -> tuple[float, float]:
    """Largest output error and share of differing arena bytes of a prefill and a decode step against the reference."""
    layout = layout_of(name, work.head_dim, dtype)
    table = torch.randperm(layout.blocks_for(work.context)).int()[None]
    generator = torch.Generator().manual_seed(1)
    sides = {"cpu": ReferenceAttention(layout, work.spec), device: attention_of(kernels, layout, work.spec)}
    shape = (table.shape[1], work.num_kv_heads, layout.cell_bytes)
    arenas = {where: torch.full(shape, 0xFF, dtype=torch.uint8, device=where) for where in sides}
    error = 0.0
    for first, last in ((0, work.context - 1), (work.context - 1, work.context)):
        query, key, value = (
            torch.randn(last - first, heads, work.head_dim, generator=generator).to(dtype)
            for heads in (work.spec.num_heads, work.num_kv_heads, work.num_kv_heads)
        )
        outputs = []
        for where, kernel in sides.items():
            starts = torch.tensor([0, last - first], dtype=torch.int32, device=where)
            batch = Batch(starts, torch.tensor([last], dtype=torch.int32, device=where), table.to(where))
            output = torch.empty_like(query, device=where)
            kernel.forward(
                NewRows(query.to(where), key.to(where), value.to(where)), arenas[where], batch, Answers(output)
            )
            outputs.append(output.float().cpu())
        error = max(error, float((outputs[0] - outputs[1]).abs().max()))
    differs = (arenas["cpu"] != arenas[device].cpu()).float().mean()
    return error, float(differs)
