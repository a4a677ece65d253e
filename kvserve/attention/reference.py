"""PyTorch reference of the attention kernels: clear rather than fast, and the same arena bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from kvserve.attention.base import (
    Answers,
    Batch,
    PagedAttention,
    Power,
    Reduction,
    Stored,
    check_batch,
    check_cells,
    check_rows,
)
from kvserve.attention.logits import capped, softmax
from kvserve.attention.saturation import rows_beyond_range
from kvserve.codecs.base import FLOAT16_MAX
from kvserve.codecs.layer_tables import tables_of_head
from kvserve.codecs.tile import Tables
from kvserve.pages.kept import (
    NOT_KEPT,
    Header,
    Kept,
    KeptPages,
    KeptRows,
    arena_of,
    make_headers,
    read_header,
    read_headers,
    runs_of,
    write_header,
)
from kvserve.pages.reference import beyond_range, decode_page, encode_page, hadamard


class _Request(NamedTuple):
    first_row: int  # of the query rows
    computed: int  # tokens stored before this step
    seq_len: int
    blocks: list[int]
    kept: Kept = NOT_KEPT

    @classmethod
    def of(cls, stored: Stored) -> _Request:
        return cls(0, stored.num_tokens, stored.num_tokens, stored.block_table_row.tolist(), stored.kept)


class _History(NamedTuple):
    """What one KV head sees of a request, float32; dense and sealed are zero where a token has no such row."""

    dense: torch.Tensor  # [seq_len, 2, head_dim]
    sealed: torch.Tensor  # [seq_len, 2, head_dim]
    kept: torch.Tensor  # [num_kept, 2, head_dim]
    kept_mass: torch.Tensor  # [num_kept]
    end: int  # tokens before it are sinks, kept or gone
    sink_logits: torch.Tensor | None  # learned, of the query heads, [group]


class ReferenceAttention(PagedAttention):
    """Reads and writes the arena token by token and page by page."""

    def stage(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        check_rows("key", key, self.spec.num_kv_heads, self.layout.head_dim)
        check_rows("value", value, self.spec.num_kv_heads, self.layout.head_dim)
        staged = torch.stack([key.float(), self._rotate(value.float())], 2)
        if self.layout.saturates:
            rows_beyond_range(staged.device).add_(beyond_range(staged))
        if self.layout.dense_dtype == torch.float16:
            staged = staged.clamp(-FLOAT16_MAX, FLOAT16_MAX)
        return staged.to(self.layout.dense_dtype).float()

    def store_sealed(self, cells: torch.Tensor, batch: Batch, staged: torch.Tensor) -> None:
        tile_tokens, sinks = self.layout.tile_tokens, self.layout.policy.sink_tokens
        for request in self._requests(cells, batch):
            for head in range(self.spec.num_kv_heads):
                for tile in range(request.computed // tile_tokens, request.seq_len // tile_tokens):
                    positions = range(tile * tile_tokens, (tile + 1) * tile_tokens)
                    rows = torch.stack([self._dense_row(cells, request, head, t, staged) for t in positions])
                    first_counted = sinks if tile == 0 else 0
                    self._seal(cells, request, head, tile, rows)
                    for t in range(first_counted):
                        self._sink(cells, request, head, t)[:] = rows[t].to(self.layout.dense_dtype)

    def _seal(self, cells: torch.Tensor, request: _Request, head: int, tile: int, rows: torch.Tensor) -> None:
        """Write a page of rows [tile_tokens, 2, head_dim]."""
        first_counted, first = self.layout.policy.sink_tokens if tile == 0 else 0, tile * self.layout.tile_tokens
        page = encode_page(rows[:, 0], rows[:, 1], self.layout, first_counted, first, self._tables(head))
        self._page(cells, request, head, tile)[:] = page

    def _unsealed(self, cells: torch.Tensor, request: _Request, head: int, tile: int) -> torch.Tensor:
        """A page as it decodes, float32 [tile_tokens, 2, head_dim]; V stays rotated."""
        page, first = self._page(cells, request, head, tile), tile * self.layout.tile_tokens
        return torch.stack(decode_page(page, self.layout, first, self._tables(head)), 1)

    def _tables(self, head: int) -> Tables:
        """What a KV head has of the layer's tables."""
        return tables_of_head(self.tables, self.layout.tile_format, head) if self.tables else {}

    def store_tail(self, cells: torch.Tensor, batch: Batch, staged: torch.Tensor) -> None:
        for request in self._requests(cells, batch):
            first = max(request.computed, self.layout.first_tail_token(request.seq_len))
            for head in range(self.spec.num_kv_heads):
                for t in range(first, request.seq_len):
                    self._tail(cells, request, head, t)[:] = self._new(request, head, t, staged)

    def attend(
        self, query: torch.Tensor, cells: torch.Tensor, batch: Batch, staged: torch.Tensor, answers: Answers
    ) -> None:
        check_rows("query", query, self.spec.num_heads, self.layout.head_dim)
        check_rows("output", answers.output, self.spec.num_heads, self.layout.head_dim)
        for request in self._requests(cells, batch):
            rows = slice(request.first_row, request.first_row + request.seq_len - request.computed)
            for kv_head in range(self.spec.num_kv_heads):
                history = self._history(cells, request, kv_head, staged)
                heads = slice(kv_head * self.spec.group, (kv_head + 1) * self.spec.group)
                for p, row in enumerate(range(rows.start, rows.stop), request.computed):
                    result, log_sum = self._attend_row(query[row, heads].float(), p, history)
                    answers.output[row, heads] = result.to(answers.output.dtype)
                    if answers.lse is not None:
                        answers.lse[row, heads] = log_sum

    def _attend_row(self, query: torch.Tensor, position: int, history: _History) -> tuple[torch.Tensor, torch.Tensor]:
        """One token's heads of one group: query [group, head_dim]."""
        assert position >= history.end, f"a query at {position} of a request evicted at {history.end}"
        sinks = self.layout.policy.sink_tokens
        window = self.spec.sliding_window or position + 1
        t = torch.arange(max(0, position + 1 - window), position + 1)
        t = t[(t < sinks) | (t >= history.end)]
        tile_start = position // self.layout.tile_tokens * self.layout.tile_tokens
        is_sealed = (t < tile_start) & (t >= sinks)
        seen = torch.cat([history.kept, torch.where(is_sealed[:, None, None], history.sealed[t], history.dense[t])])
        scores = capped(query @ seen[:, 0].T * self.spec.scale, self.spec.soft_cap)
        scores[:, : len(history.kept)] += history.kept_mass
        weights, log_sum = softmax(scores, history.sink_logits)
        return self._rotate(weights @ seen[:, 1]), log_sum

    def _history(self, cells: torch.Tensor, request: _Request, head: int, staged: torch.Tensor) -> _History:
        dense = torch.zeros(request.seq_len, 2, self.layout.head_dim)
        sealed = torch.zeros_like(dense)
        kept = (self._kept_rows(cells, request, head), self._kept_mass(cells, request, head))
        history = _History(dense, sealed, *kept, request.kept.end, self._sinks_of(head))
        tile_tokens = self.layout.tile_tokens
        for tile in range(request.kept.end // tile_tokens, request.seq_len // tile_tokens):
            sealed[tile * tile_tokens : (tile + 1) * tile_tokens] = self._unsealed(cells, request, head, tile)
        if request.seq_len >= tile_tokens:
            for t in range(self.layout.policy.sink_tokens):
                dense[t] = self._sink(cells, request, head, t).float()
        for t in range(request.computed // tile_tokens * tile_tokens, request.seq_len):
            dense[t] = self._dense_row(cells, request, head, t, staged)
        return history

    def _sinks_of(self, head: int) -> torch.Tensor | None:
        """Learned sinks of a KV head's query heads, float32 [group]."""
        sinks = self.spec.sinks_by_group()
        return None if sinks is None else sinks[head]

    def _kept_rows(self, cells: torch.Tensor, request: _Request, head: int) -> torch.Tensor:
        """What an evicted request keeps for one KV head, float32 [num_kept, 2, head_dim]; V stays rotated."""
        if not request.kept.end:
            return torch.zeros(0, 2, self.layout.head_dim)
        return self._kept_pages(cells, request, head).read()

    def _kept_mass(self, cells: torch.Tensor, request: _Request, head: int) -> torch.Tensor:
        """The log-masses of those rows, float32 [num_kept]."""
        return self._kept_pages(cells, request, head).log_mass() if request.kept.end else torch.zeros(0)

    def _kept_pages(self, cells: torch.Tensor, request: _Request, head: int) -> KeptPages:
        header = read_header(arena_of(cells, self.layout), request.blocks[0], head)
        assert header.end == request.kept.end
        return self._pages_of(cells, request.kept, header, head)

    def _pages_of(self, cells: torch.Tensor, kept: Kept, header: Header, head: int) -> KeptPages:
        return KeptPages(arena_of(cells, self.layout), self.layout, kept, header, self._tables(head))

    def read(
        self, stored: Stored, first: int, last: int, with_values: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.check_span(stored, first, last)
        request, cells = _Request.of(stored), stored.cells
        check_cells(cells, self.layout, self.spec.num_kv_heads)
        rows = torch.empty(self.spec.num_kv_heads, last - first, 2, self.layout.head_dim)
        for head in range(self.spec.num_kv_heads):
            self._read_head(cells, request, head, first, rows[head])
        return rows[:, :, 0].contiguous(), self._rotate(rows[:, :, 1]) if with_values else None

    def _read_head(self, cells: torch.Tensor, request: _Request, head: int, first: int, rows: torch.Tensor) -> None:
        """Stored K and V from token `first` on to rows, [tokens, 2, head_dim]; V stays rotated."""
        tile_tokens, sealed = self.layout.tile_tokens, request.computed // self.layout.tile_tokens
        pages: dict[int, torch.Tensor] = {}
        for t, row in enumerate(rows, first):
            tile, index = divmod(t, tile_tokens)
            if tile >= sealed:
                row[:] = self._tail(cells, request, head, t)
            elif t < self.layout.policy.sink_tokens:
                row[:] = self._sink(cells, request, head, t)
            else:
                if tile not in pages:
                    pages[tile] = self._unsealed(cells, request, head, tile)
                row[:] = pages[tile][index]

    def read_kept(self, cells: torch.Tensor, state_block: int, kept: Kept) -> KeptRows:
        check_cells(cells, self.layout, self.spec.num_kv_heads)
        headers = read_headers(cells, self.layout, state_block)
        pages = [self._pages_of(cells, kept, header, head) for head, header in enumerate(headers)]
        rows = [of_head.read() for of_head in pages]
        masses = None if self.layout.tile_format.mass is None else [of_head.log_mass() for of_head in pages]
        both = [r[:, 0].contiguous() for r in rows], [self._rotate(r[:, 1]) for r in rows]
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
        for head, header in enumerate(headers):
            both = torch.stack([rows.keys[head], self._rotate(rows.values[head])], 1)
            mass = None if rows.log_mass is None else rows.log_mass[head]
            self._pages_of(cells, kept, header, head).write(both, mass)
            write_header(arena_of(cells, self.layout), state_block, head, header)

    def attention_sums(
        self, query: torch.Tensor, stored: Stored, power: Power = 1, reduce: Reduction = "sum"
    ) -> torch.Tensor:
        request, cells = _Request.of(stored), stored.cells
        check_cells(cells, self.layout, self.spec.num_kv_heads)
        self.check_sums(query, stored, power, reduce)
        group, sums = self.spec.group, []
        for kv_head in range(self.spec.num_kv_heads):
            rows = query[:, kv_head * group : (kv_head + 1) * group].float().transpose(0, 1)
            keys = self._held_keys(cells, request, kv_head)
            seen = torch.ones(len(query), len(keys)).tril(len(keys) - len(query)) > 0
            logits = capped(rows @ keys.T * self.spec.scale, self.spec.soft_cap)
            masses, sinks = self._kept_mass(cells, request, kv_head), self.layout.policy.sink_tokens
            logits[..., sinks : sinks + len(masses)] += masses
            logits.masked_fill_(~seen, -torch.inf)
            own_sinks = self._sinks_of(kv_head)
            powers = softmax(logits, None if own_sinks is None else own_sinks[:, None])[0] ** power
            sums.append(powers.amax(1) if reduce == "max" else powers.sum(1))
        columns = max(part.shape[1] for part in sums)
        return torch.cat([functional.pad(part, (0, columns - part.shape[1])) for part in sums])

    def _held_keys(self, cells: torch.Tensor, request: _Request, head: int) -> torch.Tensor:
        """Keys of the tokens that one KV head holds, float32 [n, head_dim]."""
        parts, end = [], request.kept.end
        if end:
            sinks = torch.empty(self.layout.policy.sink_tokens, 2, self.layout.head_dim)
            self._read_head(cells, request, head, 0, sinks)
            parts = [sinks, self._kept_rows(cells, request, head)]
        later = torch.empty(request.seq_len - end, 2, self.layout.head_dim)
        self._read_head(cells, request, head, end, later)
        return torch.cat([*parts, later])[:, 0]

    def _requests(self, cells: torch.Tensor, batch: Batch) -> list[_Request]:
        check_batch(batch)
        self.check_kept(batch)
        check_cells(cells, self.layout, self.spec.num_kv_heads)
        starts, lengths, rows = batch.query_start_loc.tolist(), batch.seq_lens.tolist(), batch.block_table.tolist()
        kept = [batch.kept.of_request(r) if batch.kept else NOT_KEPT for r in range(batch.num_reqs)]
        return [
            _Request(starts[r], lengths[r] - (starts[r + 1] - starts[r]), lengths[r], rows[r], kept[r])
            for r in range(batch.num_reqs)
        ]

    def _rotate(self, rows: torch.Tensor) -> torch.Tensor:
        return rows @ hadamard(self.layout.head_dim) if self.layout.rotates else rows

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
        block, index = divmod(tile, self.layout.tiles_per_block)
        row = self.layout.tile_row(block)
        size = self.layout.tile_format.tile_bytes
        return cells[request.blocks[row], head].flatten()[index * size : (index + 1) * size]

    def _slot_at(self, cells: torch.Tensor, block: int, head: int, index: int) -> torch.Tensor:
        """A writable view of one dense slot, [2, head_dim] of the dense dtype."""
        size = self.layout.slot_bytes
        data = cells[block, head].view(-1)[index * size : (index + 1) * size]
        return data.view(self.layout.dense_dtype).view(2, self.layout.head_dim)

    def _tail(self, cells: torch.Tensor, request: _Request, head: int, t: int) -> torch.Tensor:
        block, index = divmod(t % self.layout.tail_slots, self.layout.slots_per_cell)
        return self._slot_at(cells, request.blocks[self.layout.state_blocks + block], head, index)

    def _sink(self, cells: torch.Tensor, request: _Request, head: int, t: int) -> torch.Tensor:
        block, index = divmod(t, self.layout.slots_per_cell)
        return self._slot_at(cells, request.blocks[self.layout.tile_row(0) + 1 + block], head, index)
