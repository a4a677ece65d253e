"""Where things lie in the arena, and dense rows: the device functions that all kernels share.

Byte layout: kvserve/pages/layout.py (arena, rows of blocks), pages/kept.py (kept pages); `codecs` is about what is
inside a page. `G` is a Geometry. Offsets into the arena are int64 bytes from `cells`, the layer's first cell.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter computes with the bits of bfloat16 as if they were integers: there, dots run in float32 on the rounded
# operands, and codes become float32 first.
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b):
    """a @ b, accumulated in float32; float32 operands are multiplied as such."""
    if INTERPRETED:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        result = tl.dot(a, b, input_precision="ieee")
    return result


@triton.jit
def request_of(r, query_start_loc, seq_lens):
    """First query row, tokens stored before this step, and tokens with it, of request r."""
    first_row = tl.load(query_start_loc + r)
    seq_len = tl.load(seq_lens + r)
    return first_row, seq_len - (tl.load(query_start_loc + r + 1) - first_row), seq_len


@triton.jit
def kept_of(r, table, kept_ends, kept_starts, kept_blocks):
    """(end, address of its first kept block id) of request r (KeptTable); end 0 where it was not evicted."""
    if kept_ends is None:
        return 0, table
    else:
        return tl.load(kept_ends + r), kept_blocks + tl.load(kept_starts + r)


@triton.jit
def kept_run(cells, table, head, block_stride, head_stride, end, run: tl.constexpr):
    """(first page, tokens) of a run of one KV head; none where end is 0 (row[0] may then be no block at all)."""
    block = tl.load(table, mask=end > 0, other=0).to(tl.int64)
    header = (cells + block * block_stride + head * head_stride).to(tl.pointer_type(tl.int32))
    first_page = tl.load(header + 3 * run + 3, mask=end > 0, other=0)
    return first_page, tl.load(header + 3 * run + 4, mask=end > 0, other=0)


@triton.jit
def tile_index(tile, G: tl.constexpr):
    """Index in a request's row of the block of a sealed tile."""
    block = tile // G.tiles_per_block
    return G.first_tile_row + block + tl.where(block > 0, G.sink_blocks, 0)


@triton.jit
def tile_page_at(table, tile, head, mask, block_stride, head_stride, G: tl.constexpr):
    """Offset of the page of a sealed tile."""
    block = tl.load(table + tile_index(tile, G), mask=mask, other=0).to(tl.int64)
    offset = block * block_stride + head * head_stride + tile % G.tiles_per_block * G.page_bytes
    return tl.multiple_of(offset, 16)


@triton.jit
def kept_place(first_page, tile, head_stride, strip_offset, strip_pages, G: tl.constexpr):
    """(index of its block among the kept blocks, offset in that block from this layer's first cell) of a kept tile.

    `tile` counts from the start of a run on page `first_page`; a strip has `strip_pages` pages, and begins
    `strip_offset` bytes before the layer's cell.
    """
    page = first_page + tile // G.tiles_per_page
    strip = page // strip_pages
    offset = (strip % G.num_kv_heads).to(tl.int64) * head_stride - strip_offset
    offset += (page % strip_pages).to(tl.int64) * G.kept_page_bytes + tile % G.tiles_per_page * G.page_bytes
    return strip // G.num_kv_heads, offset


@triton.jit
def kept_tile_at(
    blocks, first_page, tile, mask, block_stride, head_stride, strip_offset, strip_pages, G: tl.constexpr
):  # fmt: skip
    """Offset of tile `tile` of the run on page `first_page` of the request whose kept block ids are at `blocks`."""
    index, offset = kept_place(first_page, tile, head_stride, strip_offset, strip_pages, G)
    return tl.multiple_of(tl.load(blocks + index, mask=mask, other=0).to(tl.int64) * block_stride + offset, 16)


@triton.jit
def page_of_chunk(
    table, blocks, chunk, kept_chunks, first_tile, first_page, head, block_stride, head_stride, strip_offset,
    strip_pages, G: tl.constexpr
):  # fmt: skip
    """Offset of the page that holds a chunk: first a head's kept chunks, then those of the tiles from first_tile on."""
    is_kept = chunk < kept_chunks
    tile = first_tile + (chunk - kept_chunks) // G.chunks_per_tile
    index, kept_offset = kept_place(
        first_page, chunk // G.chunks_per_tile, head_stride, strip_offset, strip_pages, G
    )  # fmt: skip
    block = tl.load(tl.where(is_kept, blocks + index, table + tile_index(tile, G))).to(tl.int64)
    tile_offset = head.to(tl.int64) * head_stride + tile % G.tiles_per_block * G.page_bytes
    return tl.multiple_of(block * block_stride + tl.where(is_kept, kept_offset, tile_offset), 16)


@triton.jit
def slot_of(table, t, is_sink, head, mask, block_stride, head_stride, G: tl.constexpr):
    """Offsets of the dense slots of tokens t [N] (K row, then V row): in the sink blocks where is_sink, else the tail.

    Dense policy: the slot of token t. Tokens outside `mask` have offset 0.
    """
    if G.dense:
        index = t // G.block_size
        slot = t % G.block_size
    else:
        slot_in_part = tl.where(is_sink, t, t % G.tail_slots)
        index = tl.where(is_sink, G.first_tile_row + 1, G.state_blocks) + slot_in_part // G.slots_per_cell
        slot = slot_in_part % G.slots_per_cell
    block = tl.load(table + index, mask=mask, other=0).to(tl.int64)
    return tl.multiple_of(tl.where(mask, block * block_stride + head * head_stride + slot * G.slot_bytes, 0), 16)


@triton.jit
def dense_row(
    cells, slots, stored, staged, staged_rows, new, part: tl.constexpr, BY_COLUMN: tl.constexpr, G: tl.constexpr
):
    """K (part 0) or V (part 1) of N tokens, [N, block_dim], or [block_dim, N] BY_COLUMN; zero where neither.

    Float32, or the dtype of the slots where no row is staged (staged None, or dense policy).

    Args:
        slots: offsets [N] of the slots, read where `stored`.
        staged: float32 [num_tokens, num_kv_heads, 2, head_dim], or None.
        staged_rows: rows [N] of it (token * num_kv_heads + head), read where `new`.
    """
    d = tl.arange(0, G.block_dim)
    if BY_COLUMN:
        d, slots, staged_rows = d[:, None], slots[None, :], staged_rows[None, :]
        stored, new = stored[None, :] & (d < G.head_dim), new[None, :] & (d < G.head_dim)
    else:
        d, slots, staged_rows = d[None, :], slots[:, None], staged_rows[:, None]
        stored, new = stored[:, None] & (d < G.head_dim), new[:, None] & (d < G.head_dim)
    at = (cells + slots).to(tl.pointer_type(G.slot_dtype)) + (part * G.head_dim + d)
    old = tl.load(at, mask=stored, other=0.0)
    if (not G.dense) and (staged is not None):
        old = old.to(tl.float32)
        old += tl.load(staged + (staged_rows * 2 + part).to(tl.int64) * G.head_dim + d, mask=new, other=0.0)
    return old


@triton.jit
def rotated_columns(rows, first, COLUMNS: tl.constexpr, EXACT: tl.constexpr, G: tl.constexpr):
    """Columns [first, first + COLUMNS) of rows [M, block_dim] times the rotation (`hadamard`), float32 [M, COLUMNS].

    16-bit rows, and the two bfloat16 halves of float32 rows, run on tensor cores; float32 rows are only multiplied as
    such where EXACT.
    """
    d, column = tl.arange(0, G.block_dim)[:, None], (first + tl.arange(0, COLUMNS))[None, :]
    x = d & column & (G.rotation_dim - 1)
    x ^= x >> 4
    x ^= x >> 2
    x ^= x >> 1
    signs = (1 - 2 * (x & 1)).to(tl.float32)
    if G.rotation_dim < G.block_dim:
        signs = tl.where(d // G.rotation_dim == column // G.rotation_dim, signs, 0.0)
    if rows.dtype != tl.float32:
        sums = dot(rows, signs.to(rows.dtype))
    elif EXACT:
        sums = dot(rows, signs)
    else:
        upper = rows.to(tl.bfloat16)
        lower = (rows - upper.to(tl.float32)).to(tl.bfloat16)
        sums = dot(upper, signs.to(tl.bfloat16)) + dot(lower, signs.to(tl.bfloat16))
    return sums * (G.rotation_dim**-0.5)
