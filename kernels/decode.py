"""Decode attention: one query token per request, the sequence split over programs, then a combine kernel.

Requests whose step has another number of tokens than one are left to `extend`. Every grid depends on shapes alone, and
all tables are read on the device, so that a CUDA graph may be replayed with other lengths, tables and kept pages.
"""

from __future__ import annotations

from math import log2

import torch
import triton
import triton.language as tl

from kvserve.kernels.geometry import CHUNK_TOKENS, LOG2_E, Geometry, Tables, check_device
from kvserve.kernels.pages import (
    kept_of,
    kept_run,
    page_of_chunk,
    request_of,
    rotated_columns,
)
from kvserve.kernels.softmax import add_dense_tokens, add_other_run, add_sealed_chunk, start_of_softmax

LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
SEALED_STAGES: tl.constexpr = tl.constexpr(3)  # chunks of a sealed page in flight
MAX_SPLITS = 64
DECODE_WARPS = 4
ROWS_WARPS = 8  # where pages are decoded to rows that are wide
PROGRAMS_PER_PROCESSOR = 4  # what the number of splits aims at


@triton.jit
def decode_kernel(
    cells, block_stride, head_stride, strip_offset, strip_pages, query_start_loc, seq_lens, block_table, table_stride,
    codec_tables, kept_ends, kept_starts, kept_blocks, query, query_token_stride, query_head_stride, staged,
    sink_logits, partial, partial_lse, scale, CHUNK: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """Program (request, kv_head, split): its share of the chunks; the first one starts with the learned sinks, the last
    one adds sinks and tail."""
    r, head, split, splits = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    first_row, computed, seq_len = request_of(r, query_start_loc, seq_lens)
    if seq_len - computed == 1:
        m, d = tl.arange(0, G.group_rows), tl.arange(0, G.block_dim)
        row_mask = m < G.group
        query_rows = query + first_row.to(tl.int64) * query_token_stride + (head * G.group + m) * query_head_stride
        rows = tl.load(query_rows[:, None] + d[None, :], mask=row_mask[:, None] & (d < G.head_dim)[None, :], other=0.0)
        table = block_table + r.to(tl.int64) * table_stride
        ROWS: tl.constexpr = G.group_rows
        DIM: tl.constexpr = G.block_dim
        accumulator = tl.zeros([ROWS, DIM], tl.float32)
        peak, total = start_of_softmax(sink_logits, head * G.group + m, m < tl.where(split == 0, G.group, 0))
        oldest = tl.maximum(computed + 1 - G.sliding_window, 0) if G.sliding_window else 0
        position = tl.zeros([ROWS], tl.int32) + computed
        if G.dense:
            chunks = (computed - oldest) // CHUNK + 1
            share = (chunks + splits - 1) // splits
            STAGES: tl.constexpr = 2 if G.block_dim <= 128 else 1
            for chunk in tl.range(split * share, tl.minimum(split * share + share, chunks), num_stages=STAGES):
                accumulator, peak, total = add_dense_tokens(
                    accumulator, peak, total, rows, cells, table, staged, head, oldest + chunk * CHUNK, first_row,
                    computed, position, tl.zeros_like(position), position + 1, row_mask, False, scale, block_stride,
                    head_stride, CHUNK, G
                )  # fmt: skip
        else:
            accumulator, peak, total = _sealed_share(
                accumulator, peak, total, rows, query_rows, row_mask, cells, table, r, head, split, splits, computed,
                oldest, codec_tables, kept_ends, kept_starts, kept_blocks, scale, block_stride, head_stride,
                strip_offset, strip_pages, CHUNK, G
            )  # fmt: skip
            if split == splits - 1:
                tile_start = tl.zeros_like(position) + computed // G.tile_tokens * G.tile_tokens
                if G.sink_tokens:
                    accumulator, peak, total = add_dense_tokens(
                        accumulator, peak, total, rows, cells, table, staged, head, 0, first_row, computed, position,
                        tl.zeros_like(position), tl.minimum(tile_start, G.sink_tokens), row_mask, True, scale,
                        block_stride, head_stride, CHUNK, G
                    )  # fmt: skip
                first_tail = computed // G.tile_tokens * G.tile_tokens
                for start in tl.range(first_tail, computed + 1, CHUNK, num_stages=1):
                    accumulator, peak, total = add_dense_tokens(
                        accumulator, peak, total, rows, cells, table, staged, head, start, first_row, computed,
                        position, tile_start, position + 1, row_mask, False, scale, block_stride, head_stride, CHUNK, G
                    )  # fmt: skip
        at = ((r.to(tl.int64) * G.num_kv_heads + head) * splits + split) * G.group_rows + m
        divisor = tl.where(total > 0.0, total, 1.0)  # a split without tokens: peak is -inf, and so is its LSE
        tl.store(partial_lse + at, peak + tl.log2(divisor))
        tl.store(partial + at[:, None] * G.block_dim + d[None, :], accumulator / divisor[:, None])


@triton.jit
def _sealed_share(
    accumulator, peak, total, rows, query_rows, row_mask, cells, table, r, head, split, splits, computed, oldest,
    codec_tables, kept_ends, kept_starts, kept_blocks, scale, block_stride, head_stride, strip_offset, strip_pages,
    CHUNK: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """This split's share of a head's kept chunks and of the chunks of its sealed tiles."""
    end, blocks = kept_of(r, table, kept_ends, kept_starts, kept_blocks)
    first_page, kept_tokens = 0, 0
    if kept_ends is not None:
        first_page, kept_tokens = kept_run(cells, table, head, block_stride, head_stride, end, 0)
    kept_chunks = (kept_tokens + CHUNK - 1) // CHUNK
    first_tile = tl.maximum(end, oldest) // G.tile_tokens
    chunks = kept_chunks + (computed // G.tile_tokens - first_tile) * G.chunks_per_tile
    share = (chunks + splits - 1) // splits
    STAGES: tl.constexpr = SEALED_STAGES if G.integer else 1
    for chunk in tl.range(split * share, tl.minimum(split * share + share, chunks), num_stages=STAGES):
        page = page_of_chunk(
            table, blocks, chunk, kept_chunks, first_tile, first_page, head, block_stride, head_stride, strip_offset,
            strip_pages, G
        )  # fmt: skip
        is_kept = chunk < kept_chunks
        in_sequence = first_tile * G.tile_tokens + (chunk - kept_chunks) * CHUNK
        t = tl.where(is_kept, chunk * CHUNK, in_sequence) + tl.arange(0, CHUNK)
        used = tl.where(is_kept, t < kept_tokens, t >= G.sink_tokens)
        if G.sliding_window:
            used &= t >= oldest
        column0 = tl.where(is_kept, chunk, chunk - kept_chunks) % G.chunks_per_tile * CHUNK
        accumulator, peak, total = add_sealed_chunk(
            accumulator, peak, total, rows, query_rows, row_mask, cells + page, column0,
            in_sequence, head, codec_tables, used[None, :] & row_mask[:, None], used, scale, CHUNK, G
        )  # fmt: skip
    if (kept_ends is not None) and (G.other is not None):
        accumulator, peak, total = add_other_run(
            accumulator, peak, total, rows, query_rows, row_mask, cells, table, blocks, end, head, split, splits,
            codec_tables, scale, block_stride, head_stride, strip_offset, strip_pages, CHUNK, G.other
        )  # fmt: skip
    return accumulator, peak, total


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    query_start_loc, partial, partial_lse, output, output_token_stride, output_head_stride, lse, num_heads, splits,
    COLUMNS: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """Program (request, kv_head): merges the splits by their LSE, and turns rotated values back."""
    r, head = tl.program_id(0), tl.program_id(1)
    first_row = tl.load(query_start_loc + r)
    if tl.load(query_start_loc + r + 1) - first_row == 1:
        m, d = tl.arange(0, G.group_rows), tl.arange(0, G.block_dim)
        row_mask = m < G.group
        at = (r.to(tl.int64) * G.num_kv_heads + head) * splits * G.group_rows + m
        ROWS: tl.constexpr = G.group_rows
        DIM: tl.constexpr = G.block_dim
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        for split in range(splits):
            peak = tl.maximum(peak, tl.load(partial_lse + at + split * G.group_rows))
        total = tl.zeros([ROWS], tl.float32)
        merged = tl.zeros([ROWS, DIM], tl.float32)
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        for split in range(splits):
            weight = tl.exp2(tl.load(partial_lse + at + split * G.group_rows) - safe)
            part = tl.load(partial + (at + split * G.group_rows)[:, None] * G.block_dim + d[None, :])
            merged += weight[:, None] * part
            total += weight
        total = tl.where(row_mask, total, 1.0)
        merged = merged / total[:, None]
        heads = head * G.group + m
        if lse is not None:
            tl.store(lse + first_row.to(tl.int64) * num_heads + heads, (peak + tl.log2(total)) * LN_2, mask=row_mask)
        rows = output + first_row.to(tl.int64) * output_token_stride + heads * output_head_stride
        store_rows(merged, rows, row_mask, COLUMNS, G)


@triton.jit
def store_rows(result, rows, row_mask, COLUMNS: tl.constexpr, G: tl.constexpr):
    """Write float32 [M, block_dim] to the rows at the addresses [M], turned back where values are rotated."""
    if G.rotated:
        for first in range(0, G.head_dim, COLUMNS):
            turned = rotated_columns(result, first, COLUMNS, rows.dtype.element_ty == tl.float32, G)
            d = first + tl.arange(0, COLUMNS)
            tl.store(rows[:, None] + d[None, :], turned.to(rows.dtype.element_ty), mask=row_mask[:, None])
    else:
        d = tl.arange(0, G.block_dim)
        mask = row_mask[:, None] & (d < G.head_dim)[None, :]
        tl.store(rows[:, None] + d[None, :], result.to(rows.dtype.element_ty), mask=mask)


def num_splits(geometry: Geometry, num_reqs: int, max_blocks: int, processors: int) -> int:
    """Splits of each sequence: enough programs to fill the device, but not more than a row of the table has chunks."""
    wanted = PROGRAMS_PER_PROCESSOR * processors // max(num_reqs * geometry.num_kv_heads, 1)
    chunks = max_blocks * max(geometry.block_size // CHUNK_TOKENS, 1) + 1
    return min(1 << int(log2(max(wanted, 1))), triton.next_power_of_2(chunks), MAX_SPLITS)


def warps_of(geometry: Geometry) -> int:
    """Warps of a program that attends to pages."""
    return DECODE_WARPS if geometry.integer or geometry.block_dim < 128 else ROWS_WARPS


def decode(
    geometry: Geometry,
    tables: Tables,
    query: torch.Tensor,
    staged: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor | None,
    scale: float,
    splits: int | None = None,
    warps: int | None = None,
) -> None:
    """Attention of the requests that bring exactly one token; rows of the others are not written.

    Args:
        query, output: [num_tokens, num_heads, head_dim], last dim contiguous; float32, float16 or bfloat16, and the
            dots run in the query's dtype.
        staged: float32 [num_tokens, num_kv_heads, 2, head_dim], contiguous (PagedAttention.stage).
        lse: float32 [num_tokens, num_heads], contiguous, or None.
        scale: softmax scale.
        splits: programs that share a sequence; None: by the shapes. warps: of each program; None: likewise.
    """
    batch = tables.batch
    check_device(cells=tables.cells, query=query, staged=staged, output=output, lse=lse, block_table=batch.block_table)
    warps = warps or warps_of(geometry)
    splits = splits or num_splits(geometry, batch.num_reqs, batch.block_table.shape[1], processors(query.device))
    shape = (batch.num_reqs, geometry.num_kv_heads, splits, geometry.group_rows)
    partial = torch.empty(*shape, geometry.block_dim, dtype=torch.float32, device=query.device)
    partial_lse = torch.empty(shape, dtype=torch.float32, device=query.device)
    decode_kernel[(batch.num_reqs, geometry.num_kv_heads, splits)](
        *tables.arguments, *tables.kept_arguments, query, query.stride(0), query.stride(1), staged,
        tables.sink_logits, partial, partial_lse, scale * LOG2_E, CHUNK_TOKENS, geometry, num_warps=warps,
    )  # fmt: skip
    combine_kernel[(batch.num_reqs, geometry.num_kv_heads)](
        batch.query_start_loc, partial, partial_lse, output, output.stride(0), output.stride(1), lse, query.shape[1],
        splits, min(32, geometry.block_dim), geometry, num_warps=4,
    )  # fmt: skip


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
