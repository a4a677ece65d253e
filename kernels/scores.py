"""Attention that the last query rows of a request pay to each token it holds (`PagedAttention.attention_sums`).

Two passes over the keys: the first gives each row's softmax denominator, the second reduces powers of the probabilities
over the rows. No probability is ever stored. Keys are read as stored (`PagedAttention.read`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kvserve.kernels.codecs.chain import NO_TABLES, CodecTables
from kvserve.kernels.decode import warps_of
from kvserve.kernels.geometry import (
    CHUNK_TOKENS,
    LOG2_E,
    Geometry,
    check_alignment,
    check_device,
    formats_of,
    on_device,
    strips_of,
)
from kvserve.kernels.pages import dense_row, dot, kept_run, kept_tile_at, page_of_chunk, slot_of
from kvserve.kernels.sealed import sealed_masses, sealed_scores
from kvserve.kernels.softmax import soft_capped

SCORE_ROWS = 32


@triton.jit
def place_of_chunk(chunk, kept_tokens, other_tokens, end, stored, sealed, CHUNK: tl.constexpr, G: tl.constexpr):
    """Where the tokens of a chunk are: sinks of an evicted request first, then those it keeps in format 0 and in format
    1, then those from `end`.

    Of `stored` tokens, those before `sealed` are in pages.

    Returns:
        in_sequence: the chunk's place after the sink chunk, without chunks of format 1, as `page_of_chunk` counts.
        in_page: whether a page of format 0 holds it. other: its place among the chunks of format 1; -1: it is none.
        is_dense [CHUNK]: tokens in dense slots.
        t [CHUNK]: positions; 0 for kept tokens, which every row sees.
        column [CHUNK]: columns of the result; used [CHUNK]: those that there are.
    """
    i = tl.arange(0, CHUNK)
    lead = tl.where(end > 0, 1, 0)
    kept_chunks = (kept_tokens + CHUNK - 1) // CHUNK
    other_chunks = (other_tokens + CHUNK - 1) // CHUNK
    behind = chunk - lead - kept_chunks
    is_other = (behind >= 0) & (behind < other_chunks)
    in_sequence = chunk - lead - tl.where(behind >= other_chunks, other_chunks, 0)
    is_lead = in_sequence < 0
    is_kept = (is_lead == 0) & (in_sequence < kept_chunks)
    kept_index = tl.where(is_other, behind, in_sequence) * CHUNK + i
    limit = tl.where(is_other, other_tokens, kept_tokens)
    t = tl.where(is_lead, 0, end + (in_sequence - kept_chunks) * CHUNK) + i
    used = tl.where(is_lead, i < G.sink_tokens, tl.where(is_kept | is_other, kept_index < limit, t < stored))
    before = lead * G.sink_tokens + tl.where(is_kept, 0, kept_tokens)
    column = before + tl.where(is_kept | is_other, kept_index, other_tokens + t - end)
    in_page = is_kept
    is_dense = used
    if not G.dense:
        in_tile = (is_lead == 0) & (is_other == 0) & (end + (in_sequence - kept_chunks) * CHUNK < sealed)
        in_page = is_kept | in_tile
        is_dense = used & tl.where(is_kept | is_other, t < 0, (t < G.sink_tokens) | (t >= sealed))
    other = tl.where(is_other, behind, -1)
    t = tl.where(is_kept | is_other, 0, t)
    return in_sequence, in_page, other, is_dense, t, tl.where(is_lead, i, column), used


@triton.jit
def other_scores(
    query, query_rows, row_mask, cells, table, blocks, end, chunk, head, codec_tables, block_stride, head_stride,
    strip_offset, strip_pages, CHUNK: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """query [M, block_dim] times the keys of one chunk of a head's kept tokens in format 1, whose geometry G is."""
    first_page, _ = kept_run(cells, table, head, block_stride, head_stride, end, 1)
    page = kept_tile_at(
        blocks, first_page, chunk // G.chunks_per_tile, True, block_stride, head_stride, strip_offset, strip_pages, G
    )  # fmt: skip
    column0 = chunk % G.chunks_per_tile * CHUNK
    return sealed_scores(query, query_rows, row_mask, cells + page, column0, 0, head, codec_tables, CHUNK, G)


@triton.jit
def scores_kernel(
    cells, block_stride, head_stride, strip_offset, strip_pages, table, codec_tables, blocks, end, stored, query,
    query_token_stride, query_head_stride, num_rows, scale, denominators, chunk_denominators, sums, num_columns,
    POWER: tl.constexpr, TAKE_MAX: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """Program (chunk of the tokens that the head holds, query head).

    Without `denominators`: the log2 of the chunk's share of each row's denominator, to chunk_denominators [num_heads,
    chunks, num_rows]. With denominators [num_heads, num_rows]: sums [num_heads, num_columns].
    """
    chunk, query_head = tl.program_id(0), tl.program_id(1)
    head = query_head // G.group
    kept_tokens, other_tokens, first_page = 0, 0, 0
    if blocks is not None:
        first_page, kept_tokens = kept_run(cells, table, head, block_stride, head_stride, end, 0)
        if G.other is not None:
            _, other_tokens = kept_run(cells, table, head, block_stride, head_stride, end, 1)
    sealed = 0 if G.dense else stored // G.tile_tokens * G.tile_tokens
    in_sequence, in_page, other, is_dense, t, column, used = place_of_chunk(
        chunk, kept_tokens, other_tokens, end, stored, sealed, CHUNK, G
    )  # fmt: skip
    in_tail = t >= sealed
    slots = slot_of(table, t, in_tail == 0, head, is_dense, block_stride, head_stride, G)
    has_dense = tl.max(is_dense.to(tl.int32), 0) > 0
    d = tl.arange(0, G.block_dim)
    reduced = tl.zeros([CHUNK], tl.float32)
    for first in range(0, num_rows, ROWS):
        m = first + tl.arange(0, ROWS)
        row_mask = m < num_rows
        query_rows = query + m.to(tl.int64) * query_token_stride + query_head * query_head_stride
        rows = tl.load(query_rows[:, None] + d[None, :], mask=row_mask[:, None] & (d < G.head_dim)[None, :], other=0.0)
        scores = tl.zeros([ROWS, CHUNK], tl.float32)
        masses = tl.zeros([CHUNK], tl.float32)
        if not G.dense:  # noqa: SIM102 (one condition is known at compile time, the other is not)
            if in_page:
                kept_chunks = (kept_tokens + CHUNK - 1) // CHUNK
                page = page_of_chunk(
                    table, table if blocks is None else blocks, in_sequence, kept_chunks, end // G.tile_tokens,
                    first_page, head, block_stride, head_stride, strip_offset, strip_pages, G
                )  # fmt: skip
                in_tiles = tl.where(in_sequence < kept_chunks, in_sequence, in_sequence - kept_chunks)
                column0 = in_tiles % G.chunks_per_tile * CHUNK
                first_position = end + (in_sequence - kept_chunks) * CHUNK
                scores = sealed_scores(
                    rows, query_rows, row_mask, cells + page, column0, first_position, head, codec_tables, CHUNK, G
                )  # fmt: skip
                if G.mass:
                    masses = sealed_masses(cells + page, column0, CHUNK, G)  # 0 where a token of the chunk is dense
        if (blocks is not None) and (G.other is not None):  # noqa: SIM102 (as above)
            if other >= 0:
                scores = other_scores(
                    rows, query_rows, row_mask, cells, table, blocks, end, other, head, codec_tables, block_stride,
                    head_stride, strip_offset, strip_pages, CHUNK, G.other
                )  # fmt: skip
        if has_dense:
            key = dense_row(cells, slots, is_dense, None, slots, is_dense, 0, True, G).to(rows.dtype)
            scores = tl.where(is_dense[None, :], dot(rows, key), scores)
        visible = used[None, :] & (t[None, :] <= (stored - num_rows + m)[:, None]) & row_mask[:, None]
        scores = tl.where(visible, soft_capped(scores * scale, G) + masses[None, :], float("-inf"))
        if denominators is None:
            peak = tl.max(scores, 1)
            safe = tl.where(peak == float("-inf"), 0.0, peak)
            total = tl.sum(tl.exp2(scores - safe[:, None]), 1)
            seen = peak + tl.log2(tl.where(total > 0.0, total, 1.0))
            at = (query_head.to(tl.int64) * tl.num_programs(0) + chunk) * num_rows + m
            tl.store(chunk_denominators + at, seen, mask=row_mask)
        else:
            denominator = tl.load(denominators + query_head * num_rows + m, mask=row_mask, other=0.0)
            weights = tl.exp2(scores - denominator[:, None])
            weights = weights * weights if POWER == 2 else weights
            reduced = tl.maximum(reduced, tl.max(weights, 0)) if TAKE_MAX else reduced + tl.sum(weights, 0)
    if denominators is not None:
        tl.store(sums + query_head.to(tl.int64) * num_columns + column, reduced, mask=used)


def attention_sums(
    geometry: Geometry,
    cells: torch.Tensor,
    table: torch.Tensor,
    stored: int,
    query: torch.Tensor,
    scale: float,
    held: Sequence[int],
    end: int = 0,
    blocks: Sequence[int] = (),
    power: int = 1,
    take_max: bool = False,
    codec_tables: CodecTables = NO_TABLES,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum, or largest, over query rows of probability ** power, for each token that a request holds.

    Args:
        cells: uint8, one layer's cells.
        table: int32 [>= blocks], the request's row of blocks.
        stored: tokens stored of the request; row i of `query` is at position stored - rows + i.
        query: [rows, num_heads, head_dim], last dim contiguous.
        scale: softmax scale.
        held: tokens that each KV head holds (`held_tokens`).
        end, blocks: of the request's `Kept`.
        power: 1 or 2.
        sink_logits: float32 [num_heads], learned sinks, or None.

    Returns:
        float32 [num_heads, max(held)]; zero behind what a head holds.
    """
    rows, num_heads = query.shape[:2]
    check_device(cells=cells, block_table_row=table, query=query)
    check_alignment(cells)
    columns = max(held)
    # An evicted request's sinks, kept tokens of each format and later tokens each start a chunk.
    chunks = triton.cdiv(columns, CHUNK_TOKENS) + (1 + len(formats_of(geometry)) if end else 0)
    partial = torch.empty(num_heads, chunks, rows, dtype=torch.float32, device=query.device)
    sums = torch.zeros(num_heads, columns, dtype=torch.float32, device=query.device)
    block_ids = on_device(blocks, cells.device) if end else None
    strips = strips_of(cells, geometry.kept_page_bytes)

    def launch(denominators: torch.Tensor | None) -> None:
        scores_kernel[(chunks, num_heads)](
            cells, cells.stride(0), cells.stride(1), *strips, table, codec_tables, block_ids, end, stored,
            query, query.stride(0), query.stride(1), rows, scale * LOG2_E, denominators, partial, sums, columns, power,
            take_max, SCORE_ROWS, CHUNK_TOKENS, geometry, num_warps=warps_of(geometry),
        )  # fmt: skip

    launch(None)
    shares = partial / LOG2_E
    if sink_logits is not None:
        shares = torch.cat([shares, sink_logits[:, None, None].expand(-1, 1, rows)], 1)
    launch(shares.logsumexp(1) * LOG2_E)
    return sums
