"""The Triton kernels (kernels/) behind the PagedAttention interface: attention on a GPU over the CPU's bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvserve.attention.base import Batch, LayerSpec, PagedAttention, check_batch, check_cells, check_row, check_rows
from kvserve.kernels import decode, extend, scores, store
from kvserve.kernels import kept as kept_pages
from kvserve.kernels.geometry import Tables, geometry_of
from kvserve.pages.kept import Kept, make_headers
from kvserve.pages.layout import PageLayout
from kvserve.pages.reference import hadamard


class TritonAttention(PagedAttention):
    """Attention by the Triton kernels, on CUDA tensors (any tensors in Triton's interpreter).

    A decode step whose `Batch.max_query_len` is set reads no data back from the device: it can be captured in a CUDA
    graph as long as its tensors keep their addresses.
    """

    def __init__(self, layout: PageLayout, spec: LayerSpec):
        super().__init__(layout, spec)
        self.geometry = geometry_of(layout, spec)

    def stage(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        check_rows("key", key, self.spec.num_kv_heads, self.layout.head_dim)
        check_rows("value", value, self.spec.num_kv_heads, self.layout.head_dim)
        return store.stage(self.geometry, key, value)

    def store_sealed(self, cells: torch.Tensor, batch: Batch, staged: torch.Tensor) -> None:
        store.store_sealed(self.geometry, self._tables(cells, batch), staged)

    def attend(
        self,
        query: torch.Tensor,
        cells: torch.Tensor,
        batch: Batch,
        staged: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> None:
        check_rows("query", query, self.spec.num_heads, self.layout.head_dim)
        check_rows("output", output, self.spec.num_heads, self.layout.head_dim)
        if lse is not None and (lse.dtype != torch.float32 or not lse.is_contiguous()):
            raise TypeError(f"lse must be contiguous float32, got {lse.dtype} with strides {lse.stride()}")
        tables = self._tables(cells, batch)
        arguments = (self.geometry, tables, query, staged, output, lse, self.spec.scale)
        decode.decode(*arguments)
        if tables.max_query_len > 1:
            extend.extend(*arguments)

    def store_tail(self, cells: torch.Tensor, batch: Batch, staged: torch.Tensor) -> None:
        store.store_tail(self.geometry, self._tables(cells, batch), staged)

    def read(
        self,
        cells: torch.Tensor,
        block_table_row: torch.Tensor,
        first: int,
        last: int,
        num_tokens: int | None = None,
        kept: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stored, place = last if num_tokens is None else num_tokens, Kept(*kept) if kept else Kept(0, 0, 0)
        self.check_span(block_table_row, first, last, stored, place)
        check_cells(cells, self.layout, self.spec.num_kv_heads)
        key, value = kept_pages.read(self.geometry, cells, block_table_row, first, last, stored, place)
        return key, value @ self._rotation(value) if self.geometry.rotated else value

    def write_kept(
        self,
        cells: torch.Tensor,
        block_table_row: torch.Tensor,
        kept: Sequence[int],
        first_pages: Sequence[int],
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
    ) -> None:
        check_row(block_table_row)
        check_cells(cells, self.layout, self.spec.num_kv_heads)
        counts, place = self.check_kept_rows(keys, values), Kept(*kept)
        headers = make_headers(self.layout, cells, place, first_pages, counts)
        key, value = torch.cat(list(keys)), torch.cat(list(values))
        value = value @ self._rotation(value) if self.geometry.rotated else value
        kept_pages.write(self.geometry, cells, block_table_row, place, headers, key, value)

    def compact(
        self,
        cells: torch.Tensor,
        block_table_row: torch.Tensor,
        kept: Sequence[int],
        first_pages: Sequence[int],
        positions: Sequence[torch.Tensor],
    ) -> None:
        """`read` the positions that each KV head keeps and `write_kept` them, in one kernel.

        Args:
            positions: per KV head, int64 [num_kept], ascending, all in [sink_tokens, kept.end).
        """
        check_row(block_table_row)
        check_cells(cells, self.layout, self.spec.num_kv_heads)
        place = Kept(*kept)
        headers = make_headers(self.layout, cells, place, first_pages, [len(chosen) for chosen in positions])
        kept_pages.compact(self.geometry, cells, block_table_row, place, headers, torch.cat(list(positions)))

    def attention_received(
        self, query: torch.Tensor, cells: torch.Tensor, block_table_row: torch.Tensor, stored: int, power: int = 1
    ) -> torch.Tensor:
        """Sum over query rows of probability ** power for each stored token, float32 [num_heads, stored].

        Args:
            query: [rows, num_heads, head_dim], the rows of the last tokens of the `stored` ones.
        """
        check_rows("query", query, self.spec.num_heads, self.layout.head_dim)
        check_row(block_table_row)
        check_cells(cells, self.layout, self.spec.num_kv_heads)
        arguments = (self.geometry, cells, block_table_row, stored, query)
        return scores.attention_received(*arguments, self.spec.scale, power)

    def _tables(self, cells: torch.Tensor, batch: Batch) -> Tables:
        self.check_kept(batch)
        check_cells(cells, self.layout, self.spec.num_kv_heads)
        if not isinstance(batch.native, int):
            check_batch(batch)
            batch.native = batch.max_query_len or int(batch.query_start_loc.diff().max())
        return Tables.of(self.layout, cells, batch, batch.native)

    def _rotation(self, like: torch.Tensor) -> torch.Tensor:
        return hadamard(self.layout.head_dim).to(like.device)
