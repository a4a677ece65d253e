"""The Triton kernels (kernels/) behind the PagedAttention interface: attention on a GPU over the CPU's bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvserve.attention.base import (
    Answers,
    Batch,
    LayerSpec,
    PagedAttention,
    Power,
    Received,
    Reduction,
    Stored,
    check_batch,
    check_cells,
    check_lse,
    check_rows,
)
from kvserve.attention.saturation import rows_beyond_range
from kvserve.codecs.layer_tables import LayerTables
from kvserve.kernels import decode, extend, received_sums, scores, store
from kvserve.kernels import kept as kept_pages
from kvserve.kernels.geometry import Tables, check_device, codec_tables_of, geometry_of
from kvserve.pages.kept import Kept, KeptRows, held_tokens, make_headers, read_headers, runs_of
from kvserve.pages.layout import PageLayout
from kvserve.pages.reference import hadamard


class TritonAttention(PagedAttention):
    """Attention by the Triton kernels, on CUDA tensors (any tensors in Triton's interpreter).

    A decode step whose `Batch.max_query_len` is set reads no data back from the device: without `received` it can be
    captured in a CUDA graph as long as its tensors keep their addresses.

    Args:
        tables: of this layer, by "half.codec name.table name", on the device of its cells; what its codecs read beside
            the pages. None: they read nothing.

    Raises:
        ValueError: the kernels do not cover the layout, or a table is missing or has the wrong shape or dtype.
    """

    decode_kernels = "triton"  # which ones attend in steps of one token

    def __init__(self, layout: PageLayout, spec: LayerSpec, tables: LayerTables | None = None):
        super().__init__(layout, spec, {name: table.contiguous() for name, table in (tables or {}).items()})
        self.geometry = geometry_of(layout, spec)
        self.codec_tables = codec_tables_of(layout, self.tables)

    def stage(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        check_rows("key", key, self.spec.num_kv_heads, self.layout.head_dim)
        check_rows("value", value, self.spec.num_kv_heads, self.layout.head_dim)
        return store.stage(self.geometry, key, value, rows_beyond_range(key.device))

    def store_sealed(self, cells: torch.Tensor, batch: Batch, staged: torch.Tensor) -> None:
        store.store_sealed(self.geometry, self._tables(cells, batch), staged)

    def attend(
        self, query: torch.Tensor, cells: torch.Tensor, batch: Batch, staged: torch.Tensor, answers: Answers
    ) -> None:
        check_rows("query", query, self.spec.num_heads, self.layout.head_dim)
        check_rows("output", answers.output, self.spec.num_heads, self.layout.head_dim)
        check_lse(answers.lse)
        tables = self._tables(cells, batch)
        self.decode(query, tables, staged, answers)
        if tables.max_query_len > 1:
            extend.extend(self.geometry, tables, query, staged, *answers, self.spec.scale)

    def decode(
        self, query: torch.Tensor, tables: Tables, staged: torch.Tensor, answers: Answers, **launch: int
    ) -> None:
        """Attention of the requests that bring exactly one token; `launch`: parameters of kernels/decode.py."""
        decode.decode(self.geometry, tables, query, staged, *answers, self.spec.scale, **launch)

    def add_received(
        self,
        query: torch.Tensor,
        cells: torch.Tensor,
        batch: Batch,
        staged: torch.Tensor,
        lse: torch.Tensor,
        received: Received,
    ) -> None:
        """What `forward` adds to `received`: what its queries paid, to keys as they saw them."""
        tables = self._tables(cells, batch)
        received_sums.add_received(self.geometry, tables, query, staged, lse, self.spec.scale, received)

    def store_tail(self, cells: torch.Tensor, batch: Batch, staged: torch.Tensor) -> None:
        store.store_tail(self.geometry, self._tables(cells, batch), staged)

    def read(
        self, stored: Stored, first: int, last: int, with_values: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.check_span(stored, first, last)
        cells, block_table_row, num_tokens, _ = stored
        check_cells(cells, self.layout, self.spec.num_kv_heads)
        asked = (block_table_row, first, last, num_tokens, with_values)
        key, value = kept_pages.read(self.geometry, cells, *asked, self.codec_tables)
        return key, None if value is None else self._rotate(value)

    def read_kept(self, cells: torch.Tensor, state_block: int, kept: Kept) -> KeptRows:
        check_cells(cells, self.layout, self.spec.num_kv_heads)
        headers = read_headers(cells, self.layout, state_block)
        counts = [header.num_tokens for header in headers]
        key, value, mass = kept_pages.read_kept(self.geometry, cells, kept.blocks, headers, self.codec_tables)
        masses = None if mass is None else list(mass.split(counts))
        both = list(key.split(counts)), list(self._rotate(value).split(counts))
        return KeptRows(*both, masses, runs_of(self.layout, headers))

    def write_kept(
        self,
        cells: torch.Tensor,
        state_block: int,
        kept: Kept,
        first_pages: Sequence[int],
        rows: KeptRows,
    ) -> None:
        check_cells(cells, self.layout, self.spec.num_kv_heads)
        headers = make_headers(self.layout, cells, kept, first_pages, self.check_kept_rows(rows))
        key, value = torch.cat(list(rows.keys)), self._rotate(torch.cat(list(rows.values)))
        mass = None if rows.log_mass is None else torch.cat(list(rows.log_mass))
        place = (self.geometry, cells, state_block, kept.blocks, headers)
        kept_pages.write_kept(*place, key, value, mass, self.codec_tables)

    def attention_sums(
        self, query: torch.Tensor, stored: Stored, power: Power = 1, reduce: Reduction = "sum"
    ) -> torch.Tensor:
        cells, block_table_row, num_tokens, kept = stored
        check_cells(cells, self.layout, self.spec.num_kv_heads)
        self.check_sums(query, stored, power, reduce)
        state_block = int(block_table_row[0]) if kept.end else 0
        held = held_tokens(cells, self.layout, state_block, num_tokens, kept)
        place, how = (self.geometry, cells, block_table_row, num_tokens), (power, reduce == "max", self.codec_tables)
        sinks = self.spec.sink_logits
        return scores.attention_sums(*place, query, self.spec.scale, held, kept.end, kept.blocks, *how, sinks)

    def _tables(self, cells: torch.Tensor, batch: Batch) -> Tables:
        self.check_kept(batch)
        check_cells(cells, self.layout, self.spec.num_kv_heads)
        if not isinstance(batch.native, int):
            check_batch(batch)
            batch.native = batch.max_query_len or int(batch.query_start_loc.diff().max())
        if self.tables or self.spec.sink_logits is not None:
            check_device(cells=cells, sink_logits=self.spec.sink_logits, **self.tables)
        return Tables.of(self.layout, cells, batch, batch.native, self.codec_tables, self.spec.sink_logits)

    def _rotate(self, values: torch.Tensor) -> torch.Tensor:
        if not self.geometry.rotated:
            return values
        return values @ hadamard(self.layout.head_dim).to(values.device, non_blocking=True)
