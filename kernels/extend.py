"""Prefill and extend attention: many query tokens of a request over its compressed past and the step's dense tokens.

A program takes the query heads of one KV head for a few consecutive tokens as the rows of its dots. What each row sees
depends on its position only (csrc/kvserve.h), so chunking a prompt does not change what is attended to.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvserve.kernels.decode import LN_2, store_rows
from kvserve.kernels.geometry import CHUNK_TOKENS, LOG2_E, Geometry, Tables, check_device
from kvserve.kernels.pages import kept_of, kept_run, page_of_chunk, request_of
from kvserve.kernels.softmax import add_dense_tokens, add_other_run, add_sealed_chunk, start_of_softmax

EXTEND_ROWS = 64  # rows of one program's dots


@triton.jit
def extend_kernel(
    cells, block_stride, head_stride, strip_offset, strip_pages, query_start_loc, seq_lens, block_table, table_stride,
    codec_tables, kept_ends, kept_starts, kept_blocks, query, query_token_stride, query_head_stride, staged,
    sink_logits, output, output_token_stride, output_head_stride, lse, num_heads, scale,
    LEAST_TOKENS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """Program (row tile, request, kv_head): row m is head m % group of the tile's token m // group."""
    r, head = tl.program_id(1), tl.program_id(2)
    first_row, computed, seq_len = request_of(r, query_start_loc, seq_lens)
    TOKENS: tl.constexpr = ROWS // G.group
    first = computed + tl.program_id(0) * TOKENS
    if (seq_len - computed >= LEAST_TOKENS) & (first < seq_len):
        m, d = tl.arange(0, ROWS), tl.arange(0, G.block_dim)
        position = first + m // G.group
        row_mask = (m < TOKENS * G.group) & (position < seq_len)
        token = (first_row + position - computed).to(tl.int64)
        heads = head * G.group + m % G.group
        query_rows = query + token * query_token_stride + heads * query_head_stride
        rows = tl.load(query_rows[:, None] + d[None, :], mask=row_mask[:, None] & (d < G.head_dim)[None, :], other=0.0)
        table = block_table + r.to(tl.int64) * table_stride
        last = tl.minimum(first + TOKENS, seq_len) - 1
        DIM: tl.constexpr = G.block_dim
        accumulator = tl.zeros([ROWS, DIM], tl.float32)
        peak, total = start_of_softmax(sink_logits, heads, row_mask)
        dense_from, tile_start = tl.zeros_like(first), tl.zeros_like(position)
        if G.dense:
            if G.sliding_window:
                dense_from = tl.maximum(first + 1 - G.sliding_window, 0)
        else:
            dense_from = first // G.tile_tokens * G.tile_tokens
            tile_start = position // G.tile_tokens * G.tile_tokens
            accumulator, peak, total = _past(
                accumulator, peak, total, rows, query_rows, row_mask, cells, table, staged, r, head, first_row,
                computed, first, last, position, tile_start, codec_tables, kept_ends, kept_starts, kept_blocks, scale,
                block_stride, head_stride, strip_offset, strip_pages, CHUNK, G
            )  # fmt: skip
        for start in range(dense_from, last + 1, CHUNK):
            accumulator, peak, total = add_dense_tokens(
                accumulator, peak, total, rows, cells, table, staged, head, start, first_row, computed, position,
                tile_start, position + 1, row_mask, False, scale, block_stride, head_stride, CHUNK, G
            )  # fmt: skip
        total = tl.where(row_mask, total, 1.0)
        if lse is not None:
            tl.store(lse + token * num_heads + heads, (peak + tl.log2(total)) * LN_2, mask=row_mask)
        out_rows = output + token * output_token_stride + heads * output_head_stride
        store_rows(accumulator / total[:, None], out_rows, row_mask, COLUMNS, G)


@triton.jit
def _past(
    accumulator, peak, total, rows, query_rows, row_mask, cells, table, staged, r, head, first_row, computed, first,
    last, position, tile_start, codec_tables, kept_ends, kept_starts, kept_blocks, scale, block_stride, head_stride,
    strip_offset, strip_pages, CHUNK: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """Kept pages, sealed tiles before the last row's tile, and sinks."""
    end, blocks = kept_of(r, table, kept_ends, kept_starts, kept_blocks)
    first_page, kept_tokens = 0, 0
    if kept_ends is not None:
        first_page, kept_tokens = kept_run(cells, table, head, block_stride, head_stride, end, 0)
    oldest = tl.maximum(first + 1 - G.sliding_window, 0) if G.sliding_window else 0
    kept_chunks = (kept_tokens + CHUNK - 1) // CHUNK
    first_tile = tl.maximum(end, oldest) // G.tile_tokens
    chunks = kept_chunks + (last // G.tile_tokens - first_tile) * G.chunks_per_tile
    for chunk in range(0, chunks):
        page = page_of_chunk(
            table, blocks, chunk, kept_chunks, first_tile, first_page, head, block_stride, head_stride, strip_offset,
            strip_pages, G
        )  # fmt: skip
        is_kept = chunk < kept_chunks
        in_sequence = first_tile * G.tile_tokens + (chunk - kept_chunks) * CHUNK
        t = tl.where(is_kept, chunk * CHUNK, in_sequence) + tl.arange(0, CHUNK)
        used = tl.where(is_kept, t < kept_tokens, t >= G.sink_tokens)
        visible = used[None, :] & row_mask[:, None] & (is_kept | (t[None, :] < tile_start[:, None]))
        if G.sliding_window:
            visible &= t[None, :] > position[:, None] - G.sliding_window
        column0 = tl.where(is_kept, chunk, chunk - kept_chunks) % G.chunks_per_tile * CHUNK
        accumulator, peak, total = add_sealed_chunk(
            accumulator, peak, total, rows, query_rows, row_mask, cells + page, column0, in_sequence, head,
            codec_tables, visible, used, scale, CHUNK, G
        )  # fmt: skip
    if (kept_ends is not None) and (G.other is not None):
        accumulator, peak, total = add_other_run(
            accumulator, peak, total, rows, query_rows, row_mask, cells, table, blocks, end, head, 0, 1, codec_tables,
            scale, block_stride, head_stride, strip_offset, strip_pages, CHUNK, G.other
        )  # fmt: skip
    if G.sink_tokens:  # noqa: SIM102 (one condition is known at compile time, the other is not)
        if last >= G.tile_tokens:
            accumulator, peak, total = add_dense_tokens(
                accumulator, peak, total, rows, cells, table, staged, head, 0, first_row, computed, position,
                tl.zeros_like(position), tl.minimum(tile_start, G.sink_tokens), row_mask, True, scale, block_stride,
                head_stride, CHUNK, G
            )  # fmt: skip
    return accumulator, peak, total


def extend(
    geometry: Geometry,
    tables: Tables,
    query: torch.Tensor,
    staged: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor | None,
    scale: float,
    least_tokens: int = 2,
) -> None:
    """Attention of the requests that bring at least `least_tokens` tokens; rows of the others are not written.

    Sealed pages of this step's tiles must have been written (`store.store_sealed`). Arguments as in `decode`.
    """
    batch = tables.batch
    check_device(cells=tables.cells, query=query, staged=staged, output=output, lse=lse, block_table=batch.block_table)
    wide = not geometry.integer and geometry.block_dim > 128  # decoded pages need the room of some rows
    rows = max(EXTEND_ROWS // 2 if wide else EXTEND_ROWS, geometry.group_rows)
    row_tiles = triton.cdiv(tables.max_query_len, rows // geometry.group)
    extend_kernel[(row_tiles, batch.num_reqs, geometry.num_kv_heads)](
        *tables.arguments, *tables.kept_arguments, query, query.stride(0), query.stride(1), staged,
        tables.sink_logits, output, output.stride(0), output.stride(1), lse, query.shape[1], scale * LOG2_E,
        least_tokens, rows, CHUNK_TOKENS, min(32, geometry.block_dim), geometry,
        num_warps=4 if geometry.block_dim < 128 else 8, num_stages=1,
    )  # fmt: skip
