"""What an evicted request keeps: where it lies, and the PyTorch reference that reads and writes it.

Eviction at `end` leaves a request's sinks and its tokens from `end` on where they are. Of the tokens between, every
layer and KV head keeps its own subset, or rows that stand for several of them, packed into *kept pages*: sealed pages
of tile_tokens columns, the last one of a head partly filled.

Kept pages are numbered over the whole request. They fill its kept blocks, which are not part of its row, in the order
[layer][kv_head][page of the cell], whichever layer and head they belong to: a page lies in any layer's cell. A (layer,
head) owns consecutive pages, and its `Header` in the cell (state block, kv_head) says which. The state block is the
first of the request's row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import ceil
from typing import NamedTuple

import torch

from kvserve.codecs.tile import Tables, Tile
from kvserve.pages.layout import PageLayout
from kvserve.pages.reference import decode_page

HEADER_BYTES = 16


class Kept(NamedTuple):
    """Where an evicted request was cut, and the ids of its kept blocks; end 0: it was not evicted."""

    end: int = 0
    blocks: tuple[int, ...] = ()


class KeptTable(NamedTuple):
    """The `Kept` of all requests of a batch, for kernels; all int32.

    Attributes:
        ends: [num_reqs]; 0: not evicted.
        starts: [num_reqs + 1]; request r has the entries [starts[r], starts[r + 1]) of `blocks`.
        blocks: block ids.
    """

    ends: torch.Tensor
    starts: torch.Tensor
    blocks: torch.Tensor

    @classmethod
    def of(cls, kept: Sequence[Kept]) -> KeptTable:
        starts = list(accumulate((len(k.blocks) for k in kept), initial=0))
        blocks = [block for k in kept for block in k.blocks]
        tensors = (torch.tensor(x, dtype=torch.int32) for x in ([k.end for k in kept], starts, blocks))
        return cls(*tensors)

    def of_request(self, request: int) -> Kept:
        first, last = self.starts[request : request + 2].tolist()
        return Kept(int(self.ends[request]), tuple(self.blocks[first:last].tolist()))


NOT_KEPT = Kept()


class KeptRows(NamedTuple):
    """What the KV heads of one layer keep, each in the order of its kept pages.

    Attributes:
        keys, values: per KV head, float32 [num_kept, head_dim]; keys after RoPE, values as the model made them.
        log_mass: per KV head, float32 [num_kept], added to a token's logit: the log of how many tokens it stands for.
            None where every token stands for itself.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    log_mass: Sequence[torch.Tensor] | None = None


class Header(NamedTuple):
    """What one (layer, KV head) keeps; four int32 at byte 0 of its state cell (KvsKept in csrc/kvserve.h)."""

    end: int
    first_page: int
    num_pages: int
    num_tokens: int


class Arena(NamedTuple):
    """All layers' cells, uint8 [num_blocks, num_kv_heads, num_layers, cell_bytes], as one of them sees it."""

    cells: torch.Tensor
    layer: int

    @property
    def num_layers(self) -> int:
        return self.cells.shape[2]


def num_layers_of(cells: torch.Tensor, layout: PageLayout) -> tuple[int, int]:
    """Layers of the arena, and the index of the one that `cells` (uint8 [blocks, heads, ...]) shows."""
    head_stride = cells.stride(1)
    return head_stride // layout.cell_bytes, cells.storage_offset() % head_stride // layout.cell_bytes


def arena_of(cells: torch.Tensor, layout: PageLayout) -> Arena:
    """The arena around one layer's `cells`."""
    num_layers, layer = num_layers_of(cells, layout)
    shape = (*cells.shape[:2], num_layers, layout.cell_bytes)
    strides = (cells.stride(0), cells.stride(1), layout.cell_bytes, 1)
    return Arena(cells.as_strided(shape, strides, cells.storage_offset() - layer * layout.cell_bytes), layer)


def pages_per_block(layout: PageLayout, num_kv_heads: int, num_layers: int) -> int:
    """Kept pages of one block."""
    return num_layers * num_kv_heads * layout.tiles_per_block


def make_headers(
    layout: PageLayout, cells: torch.Tensor, kept: Kept, first_pages: Sequence[int], num_tokens: Sequence[int]
) -> list[Header]:
    """The headers of one layer's KV heads, which keep `num_tokens[h]` tokens from page `first_pages[h]` on.

    Raises:
        ValueError: the layout has no state blocks, `kept.end` is no tile border, or pages lie outside the kept blocks.
    """
    num_kv_heads = cells.shape[1]
    if layout.tile_format is None or layout.state_blocks == 0:
        raise ValueError("kept pages need a policy with codecs and a layout with state_blocks")
    if kept.end <= 0 or kept.end % layout.tile_tokens:
        raise ValueError(f"kept.end must be a positive multiple of {layout.tile_tokens}, got {kept.end}")
    if len(first_pages) != num_kv_heads or len(num_tokens) != num_kv_heads:
        raise ValueError(f"need pages and tokens of {num_kv_heads} KV heads, got {len(first_pages)}, {len(num_tokens)}")
    capacity = len(kept.blocks) * pages_per_block(layout, num_kv_heads, num_layers_of(cells, layout)[0])
    headers = []
    for first, count in zip(first_pages, num_tokens, strict=True):
        pages = ceil(count / layout.tile_tokens)
        if first < 0 or first + pages > capacity:
            raise ValueError(f"pages [{first}, {first + pages}) do not fit in {len(kept.blocks)} blocks of kept pages")
        headers.append(Header(kept.end, first, pages, count))
    return headers


def kept_page(arena: Arena, layout: PageLayout, kept: Kept, page: int) -> torch.Tensor:
    """A writable view of kept page number `page`, uint8 [page bytes]."""
    assert layout.tile_format is not None
    num_kv_heads, size = arena.cells.shape[1], layout.tile_format.tile_bytes
    block, page = divmod(page, pages_per_block(layout, num_kv_heads, arena.num_layers))
    cell, index = divmod(page, layout.tiles_per_block)
    layer, kv_head = divmod(cell, num_kv_heads)
    return arena.cells[kept.blocks[block], kv_head, layer, index * size : (index + 1) * size]


def _header_bytes(arena: Arena, state_block: int, kv_head: int) -> torch.Tensor:
    return arena.cells[state_block, kv_head, arena.layer, :HEADER_BYTES]


def read_header(arena: Arena, state_block: int, kv_head: int) -> Header:
    return Header(*_header_bytes(arena, state_block, kv_head).clone().view(torch.int32).tolist())


def read_headers(cells: torch.Tensor, layout: PageLayout, state_block: int) -> list[Header]:
    """The headers of all KV heads of one layer, which `cells` (uint8 [blocks, heads, ...]) shows."""
    arena = arena_of(cells, layout)
    rows = arena.cells[state_block, :, arena.layer, :HEADER_BYTES].contiguous().view(torch.int32)
    return [Header(*row) for row in rows.tolist()]


def write_header(arena: Arena, state_block: int, kv_head: int, header: Header) -> None:
    _header_bytes(arena, state_block, kv_head)[:] = torch.tensor(header, dtype=torch.int32).view(torch.uint8)


def held_tokens(cells: torch.Tensor, layout: PageLayout, state_block: int, num_tokens: int, kept: Kept) -> list[int]:
    """Tokens that each KV head of one layer holds of a request with `num_tokens` computed ones.

    After an eviction those are the sinks, what the head keeps, and the tokens from kept.end on, in this order.
    """
    if not kept.end:
        return [num_tokens] * cells.shape[1]
    others = layout.policy.sink_tokens + num_tokens - kept.end
    return [others + header.num_tokens for header in read_headers(cells, layout, state_block)]


class KeptPages(NamedTuple):
    """The kept pages of one (layer, KV head), which its header names.

    Attributes:
        tables: what the KV head has of the layer's tables.
    """

    arena: Arena
    layout: PageLayout
    kept: Kept
    header: Header
    tables: Tables | None = None

    def write(self, rows: torch.Tensor, log_mass: torch.Tensor | None = None) -> None:
        """Encode kept tokens, float32 [num_tokens, 2 (K, V), head_dim], V rotated where the layout rotates.

        Args:
            log_mass: float32 [num_tokens], for pages that have it; None: 0 for every token.
        """
        size, tile_format = self.layout.tile_tokens, self.layout.tile_format
        assert tile_format is not None
        for index, page in enumerate(self._pages()):
            tokens = slice(index * size, (index + 1) * size)
            tile, masses = rows[tokens], None if log_mass is None else log_mass[tokens]
            filled = torch.cat([tile, tile[-1:].expand(size - len(tile), -1, -1)])
            keys, values = Tile.of(filled[:, 0]), Tile.of(filled[:, 1])
            page[:] = tile_format.encode_tile(keys, values, self.tables, masses)

    def read(self) -> torch.Tensor:
        """Kept tokens as their pages decode, float32 [num_tokens, 2 (K, V), head_dim]; V stays rotated."""
        decoded = [torch.stack(decode_page(page, self.layout, tables=self.tables), 1) for page in self._pages()]
        return torch.cat([torch.zeros(0, 2, self.layout.head_dim), *decoded])[: self.header.num_tokens]

    def log_mass(self) -> torch.Tensor:
        """Of the kept tokens, float32 [num_tokens]; zeros where pages have none."""
        tile_format = self.layout.tile_format
        assert tile_format is not None
        if tile_format.mass is None:
            return torch.zeros(self.header.num_tokens)
        masses = [tile_format.log_mass(page) for page in self._pages()]
        return torch.cat([torch.zeros(0), *masses])[: self.header.num_tokens]

    def _pages(self) -> Iterator[torch.Tensor]:
        for page in range(self.header.num_pages):
            yield kept_page(self.arena, self.layout, self.kept, self.header.first_page + page)
