"""PyTorch reference of the attention kernels: clear rather than fast, and the same arena bytes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvserve.attention.base import Batch, PagedAttention, check_batch, check_cells, check_rows
from kvserve.pages.reference import FLOAT16_MAX, decode_page, encode_page, hadamard


class _Request(NamedTuple):
    first_row: int  # of the query rows
    computed: int  # tokens stored before this step
    seq_len: int
    blocks: list[int]


class ReferenceAttention(PagedAttention):
    """Reads and writes the arena token by token and page by page."""

    def stage(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        check_rows("key", key, self.spec.num_kv_heads, self.layout.head_dim)
        check_rows("value", value, self.spec.num_kv_heads, self.layout.head_dim)
        staged = torch.stack([key.float(), self._rotate(value.float())], 2)
        if self.layout.dense_dtype == torch.float16:
            staged = staged.clamp(-FLOAT16_MAX, FLOAT16_MAX)
        return staged.to(self.layout.dense_dtype).float()

    def store_sealed(self, cells: torch.Tensor, batch: Batch, staged: torch.Tensor) -> None:
        tile_tokens, sinks = self.layout.tile_tokens, self.layout.policy.sink_tokens
        for request in self._requests(cells, batch):
            for head in range(self.spec.num_kv_heads):
                if self.layout.sections is None:
                    for t in range(request.computed, request.seq_len):
                        self._slot(cells, request, head, t)[:] = self._new(request, head, t, staged)
                    continue
                for tile in range(request.computed // tile_tokens, request.seq_len // tile_tokens):
                    positions = range(tile * tile_tokens, (tile + 1) * tile_tokens)
                    rows = torch.stack([self._dense_row(cells, request, head, t, staged) for t in positions])
                    first_counted = sinks if tile == 0 else 0
                    page = encode_page(rows[:, 0], rows[:, 1], self.layout, first_counted)
                    self._page(cells, request, head, tile)[:] = page
                    for t in range(first_counted):
                        self._sink(cells, request, head, t)[:] = rows[t].to(self.layout.dense_dtype)

    def store_tail(self, cells: torch.Tensor, batch: Batch, staged: torch.Tensor) -> None:
        if self.layout.sections is None:
            return
        tile_tokens = self.layout.tile_tokens
        for request in self._requests(cells, batch):
            first = max(request.computed, request.seq_len // tile_tokens * tile_tokens)
            for head in range(self.spec.num_kv_heads):
                for t in range(first, request.seq_len):
                    self._tail(cells, request, head, t)[:] = self._new(request, head, t, staged)

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
        for request in self._requests(cells, batch):
            rows = slice(request.first_row, request.first_row + request.seq_len - request.computed)
            for kv_head in range(self.spec.num_kv_heads):
                dense, sealed = self._history(cells, request, kv_head, staged)
                heads = slice(kv_head * self.spec.group, (kv_head + 1) * self.spec.group)
                for p, row in enumerate(range(rows.start, rows.stop), request.computed):
                    result, log_sum = self._attend_row(query[row, heads].float(), p, dense, sealed)
                    output[row, heads] = result.to(output.dtype)
                    if lse is not None:
                        lse[row, heads] = log_sum

    def _attend_row(
        self, query: torch.Tensor, position: int, dense: torch.Tensor, sealed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One token's heads of one group: query [group, head_dim], histories [seq_len, 2, head_dim]."""
        window = self.spec.sliding_window or position + 1
        t = torch.arange(max(0, position + 1 - window), position + 1)
        is_sealed = torch.zeros_like(t, dtype=torch.bool)
        if self.layout.sections is not None:
            tile_start = position // self.layout.tile_tokens * self.layout.tile_tokens
            is_sealed = (t < tile_start) & (t >= self.layout.policy.sink_tokens)
        seen = torch.where(is_sealed[:, None, None], sealed[t], dense[t])
        scores = query @ seen[:, 0].T * self.spec.scale
        return self._rotate(scores.softmax(-1) @ seen[:, 1]), scores.logsumexp(-1)

    def _history(
        self, cells: torch.Tensor, request: _Request, head: int, staged: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense and sealed rows of a request, float32 [seq_len, 2, head_dim]; zero where a token has no such row."""
        dense = torch.zeros(request.seq_len, 2, self.layout.head_dim)
        sealed = torch.zeros_like(dense)
        if self.layout.sections is None:
            for t in range(request.seq_len):
                dense[t] = self._slot(cells, request, head, t).float()
            return dense, sealed
        tile_tokens = self.layout.tile_tokens
        for tile in range(request.seq_len // tile_tokens):
            decoded = decode_page(self._page(cells, request, head, tile), self.layout)
            sealed[tile * tile_tokens : (tile + 1) * tile_tokens] = torch.stack(decoded, 1)
        if request.seq_len >= tile_tokens:
            for t in range(self.layout.policy.sink_tokens):
                dense[t] = self._sink(cells, request, head, t).float()
        for t in range(request.computed // tile_tokens * tile_tokens, request.seq_len):
            dense[t] = self._dense_row(cells, request, head, t, staged)
        return dense, sealed

    def _requests(self, cells: torch.Tensor, batch: Batch) -> list[_Request]:
        check_batch(batch)
        check_cells(cells, self.layout, self.spec.num_kv_heads)
        starts, lengths = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
        return [
            _Request(starts[r], lengths[r] - (starts[r + 1] - starts[r]), lengths[r], batch.block_table[r].tolist())
            for r in range(batch.num_reqs)
        ]

    def _rotate(self, rows: torch.Tensor) -> torch.Tensor:
        value = self.layout.policy.value
        return rows @ hadamard(self.layout.head_dim) if value is not None and value.rotate else rows

    def _new(self, request: _Request, head: int, t: int, staged: torch.Tensor) -> torch.Tensor:
        return staged[request.first_row + t - request.computed, head].to(self.layout.dense_dtype)

    def _dense_row(
        self, cells: torch.Tensor, request: _Request, head: int, t: int, staged: torch.Tensor
    ) -> torch.Tensor:
        """K and V of a token that is not sealed yet, float32 [2, head_dim]."""
        if t < request.computed:
            return self._tail(cells, request, head, t).float()
        return staged[request.first_row + t - request.computed, head]

    def _page(self, cells: torch.Tensor, request: _Request, head: int, tile: int) -> torch.Tensor:
        assert self.layout.sections is not None
        block, index = divmod(tile, self.layout.tiles_per_block)
        row = self.layout.tail_blocks + block + (self.layout.sink_blocks if block else 0)
        size = self.layout.sections.size_bytes
        return cells[request.blocks[row], head].flatten()[index * size : (index + 1) * size]

    def _slot_at(self, cells: torch.Tensor, block: int, head: int, index: int) -> torch.Tensor:
        """A writable view of one dense slot, [2, head_dim] of the dense dtype."""
        size = self.layout.slot_bytes
        data = cells[block, head].view(-1)[index * size : (index + 1) * size]
        return data.view(self.layout.dense_dtype).view(2, self.layout.head_dim)

    def _slot(self, cells: torch.Tensor, request: _Request, head: int, t: int) -> torch.Tensor:
        block, index = divmod(t, self.layout.block_size)
        return self._slot_at(cells, request.blocks[block], head, index)

    def _tail(self, cells: torch.Tensor, request: _Request, head: int, t: int) -> torch.Tensor:
        block, index = divmod(t % self.layout.tile_tokens, self.layout.slots_per_cell)
        return self._slot_at(cells, request.blocks[block], head, index)

    def _sink(self, cells: torch.Tensor, request: _Request, head: int, t: int) -> torch.Tensor:
        block, index = divmod(t, self.layout.slots_per_cell)
        return self._slot_at(cells, request.blocks[self.layout.tail_blocks + 1 + block], head, index)
