"""What an evicted request keeps: where it lies, and the PyTorch reference that reads and writes it.

Eviction at `end` leaves a request's sinks and its tokens from `end` on where they are. Of the tokens between, every
layer and KV head keeps its own subset, or rows that stand for several of them, packed into *kept pages*.

A kept page holds tiles of one format, back to back. A *run* is consecutive pages of one format, of which the last tile,
and the last page, may be partly filled. What a (layer, KV head) keeps is one run of each of the policy's formats, or
fewer, on consecutive pages; its `Header` in the cell (state block, kv_head) says which. The order of a head's tokens is
sinks, run 0, run 1, and so on, tokens from `end` on; within a run they ascend in position.

A *strip* is the bytes of all layers' cells of one (block, KV head), which are contiguous. Kept pages are numbered over
the whole request. They fill the strips of its kept blocks, which are not part of its row, in the order [kept block]
[kv_head][index in the strip], whichever layer and head they belong to. The state block is the first of the request's
row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import ceil
from typing import NamedTuple

import torch

from kvserve.codecs.format import TileFormat
from kvserve.codecs.tile import Tables, Tile
from kvserve.pages.layout import PageLayout
from kvserve.pages.page_size import MAX_RUNS

HEADER_BYTES = 4 * (2 + 3 * MAX_RUNS)


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
        runs: per KV head, how many of them each run has, in the order of the layout's formats. None: all are in the
            first format.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    log_mass: Sequence[torch.Tensor] | None = None
    runs: Sequence[tuple[int, ...]] | None = None


class Run(NamedTuple):
    """Tokens of one (layer, KV head) in pages of one format; three int32 (KvsRun in csrc/kvserve.h)."""

    format: int
    first_page: int
    num_tokens: int


class Header(NamedTuple):
    """What one (layer, KV head) keeps; int32 at byte 0 of its state cell (KvsKept in csrc/kvserve.h).

    They are `end`, how many runs there are, and MAX_RUNS runs, zeros where there are fewer.
    """

    end: int
    runs: tuple[Run, ...]

    @property
    def num_tokens(self) -> int:
        return sum(run.num_tokens for run in self.runs)

    @property
    def numbers(self) -> list[int]:
        """As they are stored."""
        stored = [self.end, len(self.runs), *(number for run in self.runs for number in run)]
        return stored + [0] * (HEADER_BYTES // 4 - len(stored))

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Header:
        """The reverse of `numbers`."""
        end, count, *stored = numbers
        return cls(end, tuple(Run(*stored[3 * i : 3 * i + 3]) for i in range(count)))


class Arena(NamedTuple):
    """A pool as one of its layers sees it.

    Attributes:
        cells: the layer's own, uint8 [num_blocks, num_kv_heads, cell_bytes].
        strips: of all layers, uint8 [num_blocks, num_kv_heads, strip bytes].
    """

    cells: torch.Tensor
    strips: torch.Tensor


def num_layers_of(cells: torch.Tensor, layout: PageLayout) -> tuple[int, int]:
    """Layers of the arena, and the index of the one that `cells` (uint8 [blocks, heads, ...]) shows."""
    head_stride = cells.stride(1)
    if layout.strip_starts:
        return len(layout.strip_starts), layout.strip_starts.index(strip_offset(cells))
    return head_stride // layout.cell_bytes, cells.storage_offset() % head_stride // layout.cell_bytes


def strip_offset(cells: torch.Tensor) -> int:
    """Bytes from the start of a strip to the layer's cell in it."""
    return cells.storage_offset() % cells.stride(1)


def in_strips(cells: torch.Tensor, num_layers: int) -> torch.Tensor:
    """The bytes of a full layer's cells where the strips of a block are in one piece.

    Args:
        cells: what vLLM gives the layer in its layout BLHNC, uint8 [num_blocks, num_kv_heads, ...]: in a block the
            cells of all its KV heads, behind those of the layers before it.
        num_layers: layers whose cells share a block.

    Returns:
        A view of the same storage and shape: in a block the cells of all layers of a KV head, behind those of the KV
        heads before it.

    Raises:
        ValueError: the cells are not those of one of `num_layers` layers in that layout.
    """
    block_stride, cell_bytes = cells.stride()[:2]
    page_bytes, first = cells.shape[1] * cell_bytes, cells.storage_offset()
    layer, rest = divmod(first % block_stride, page_bytes)
    if rest or layer >= num_layers or num_layers * page_bytes > block_stride or cells.shape[2:].numel() != cell_bytes:
        raise ValueError(
            f"cells of one of {num_layers} layers in a block of {block_stride} bytes are expected, got "
            f"{list(cells.shape)} with strides {cells.stride()} at {first}; this vLLM lays its cache out otherwise"
        )
    strides = (block_stride, num_layers * cell_bytes, *cells.stride()[2:])
    return cells.as_strided(cells.shape, strides, first - layer * page_bytes + layer * cell_bytes)


def arena_of(cells: torch.Tensor, layout: PageLayout) -> Arena:
    """The arena around one layer's `cells`."""
    strides, offset = (*cells.stride()[:2], 1), cells.storage_offset()
    own = cells.as_strided((*cells.shape[:2], layout.cell_bytes), strides, offset)
    strips = cells.as_strided((*cells.shape[:2], cells.stride(1)), strides, offset - strip_offset(cells))
    return Arena(own, strips)


def pages_per_block(layout: PageLayout, num_kv_heads: int, num_layers: int) -> int:
    """Kept pages of one block."""
    return num_kv_heads * layout.pages_per_strip(num_layers)


def make_headers(
    layout: PageLayout, cells: torch.Tensor, kept: Kept, first_pages: Sequence[int], runs: Sequence[Sequence[int]]
) -> list[Header]:
    """The headers of one layer's KV heads, which keep `runs[h][f]` tokens in format f from page `first_pages[h]` on.

    Raises:
        ValueError: the layout has no state blocks, `kept.end` is no tile border, or pages lie outside the kept blocks.
    """
    num_kv_heads = cells.shape[1]
    if layout.state_blocks == 0:
        raise ValueError("kept pages need a policy with pages and a layout with state_blocks")
    if kept.end <= 0 or kept.end % layout.tile_tokens:
        raise ValueError(f"kept.end must be a positive multiple of {layout.tile_tokens}, got {kept.end}")
    if len(first_pages) != num_kv_heads or len(runs) != num_kv_heads:
        raise ValueError(f"need pages and tokens of {num_kv_heads} KV heads, got {len(first_pages)}, {len(runs)}")
    capacity = len(kept.blocks) * num_kv_heads * (cells.stride(1) // layout.kept_page_bytes)
    headers = []
    for first, counts in zip(first_pages, runs, strict=True):
        page, made = first, []
        for number, count in enumerate(counts):
            made.append(Run(number, page, count))
            page += layout.run_pages(count, number)
        if first < 0 or page > capacity:
            raise ValueError(f"pages [{first}, {page}) do not fit in {len(kept.blocks)} blocks of kept pages")
        headers.append(Header(kept.end, tuple(made)))
    return headers


def kept_page(arena: Arena, layout: PageLayout, kept: Kept, page: int) -> torch.Tensor:
    """A writable view of kept page number `page`, uint8 [kept_page_bytes]."""
    size = layout.kept_page_bytes
    strip, index = divmod(page, arena.strips.shape[2] // size)
    block, kv_head = divmod(strip, arena.strips.shape[1])
    return arena.strips[kept.blocks[block], kv_head, index * size : (index + 1) * size]


def _header_bytes(arena: Arena, state_block: int, kv_head: int) -> torch.Tensor:
    return arena.cells[state_block, kv_head, :HEADER_BYTES]


def read_header(arena: Arena, state_block: int, kv_head: int) -> Header:
    return Header.of(_header_bytes(arena, state_block, kv_head).clone().view(torch.int32).tolist())


def read_headers(cells: torch.Tensor, layout: PageLayout, state_block: int) -> list[Header]:
    """The headers of all KV heads of one layer, which `cells` (uint8 [blocks, heads, ...]) shows."""
    rows = arena_of(cells, layout).cells[state_block, :, :HEADER_BYTES].contiguous().view(torch.int32)
    return [Header.of(row) for row in rows.tolist()]


def write_header(arena: Arena, state_block: int, kv_head: int, header: Header) -> None:
    _header_bytes(arena, state_block, kv_head)[:] = torch.tensor(header.numbers, dtype=torch.int32).view(torch.uint8)


def held_tokens(cells: torch.Tensor, layout: PageLayout, state_block: int, num_tokens: int, kept: Kept) -> list[int]:
    """Tokens that each KV head of one layer holds of a request with `num_tokens` computed ones.

    After an eviction those are the sinks, what the head keeps, and the tokens from kept.end on, in this order.
    """
    if not kept.end:
        return [num_tokens] * cells.shape[1]
    others = layout.policy.sink_tokens + num_tokens - kept.end
    return [others + header.num_tokens for header in read_headers(cells, layout, state_block)]


def runs_of(layout: PageLayout, headers: Sequence[Header]) -> list[tuple[int, ...]] | None:
    """`KeptRows.runs` of what headers name; None where the layout has one format."""
    if not layout.other_formats:
        return None
    return [tuple(run.num_tokens for run in header.runs) for header in headers]


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
        for tile_format, data, tokens in self._tiles():
            tile, masses = rows[tokens], None if log_mass is None else log_mass[tokens]
            data[:] = tile_format.encode_tile(*filled_tile(tile, tile_format.tokens), self.tables, masses)

    def read(self) -> torch.Tensor:
        """Kept tokens as their pages decode, float32 [num_tokens, 2 (K, V), head_dim]; V stays rotated."""
        rows = torch.zeros(self.header.num_tokens, 2, self.layout.head_dim)
        for tile_format, data, tokens in self._tiles():
            decoded = torch.stack(tile_format.decode_tile(data, tables=self.tables), 1)
            rows[tokens] = decoded[: tokens.stop - tokens.start]
        return rows

    def log_mass(self) -> torch.Tensor:
        """Of the kept tokens, float32 [num_tokens]; zeros where pages have none."""
        masses = torch.zeros(self.header.num_tokens)
        for tile_format, data, tokens in self._tiles():
            if tile_format.mass is not None:
                masses[tokens] = tile_format.log_mass(data)[: tokens.stop - tokens.start]
        return masses

    def _tiles(self) -> Iterator[tuple[TileFormat, torch.Tensor, slice]]:
        """Of every tile its format, its bytes, and which of the header's tokens it holds."""
        before, size = 0, self.layout.tile_tokens
        for run in self.header.runs:
            tile_format, of_page = self.layout.formats[run.format], self.layout.tiles_per_page(run.format)
            for tile in range(ceil(run.num_tokens / size)):
                page, index = divmod(tile, of_page)
                data = kept_page(self.arena, self.layout, self.kept, run.first_page + page)
                at, first = index * tile_format.tile_bytes, before + tile * size
                tokens = slice(first, min(first + size, before + run.num_tokens))
                yield tile_format, data[at : at + tile_format.tile_bytes], tokens
            before += run.num_tokens


def filled_tile(rows: torch.Tensor, tile_tokens: int) -> tuple[Tile, Tile]:
    """Keys and values of a tile of kept tokens, [at most tile_tokens, 2, head_dim]; the last one fills what is left."""
    filled = torch.cat([rows, rows[-1:].expand(tile_tokens - len(rows), -1, -1)])
    return Tile.of(filled[:, 0]), Tile.of(filled[:, 1])
