"""Attention that tokens receive in a step of one token per request, added up after the step has attended.

One pass over the keys: the step's log-sum-exp gives the denominators. All requests of the batch run in one launch,
which reads nothing back from the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kvserve.kernels.decode import warps_of
from kvserve.kernels.geometry import CHUNK_TOKENS, LOG2_E, Geometry, Tables, check_device, formats_of
from kvserve.kernels.pages import (
    dense_row,
    dot,
    kept_of,
    kept_run,
    page_of_chunk,
    request_of,
    slot_of,
)
from kvserve.kernels.scores import other_scores, place_of_chunk
from kvserve.kernels.sealed import sealed_masses, sealed_scores
from kvserve.kernels.softmax import soft_capped

if TYPE_CHECKING:
    from kvserve.attention.base import Received

_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)


@triton.jit
def received_kernel(
    cells, block_stride, head_stride, strip_offset, strip_pages, query_start_loc, seq_lens, block_table, table_stride,
    codec_tables, kept_ends, kept_starts, kept_blocks, query, query_token_stride, query_head_stride, staged, lse,
    num_heads, scale, wanted, POWER: tl.constexpr, CHUNK: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """Program (chunk of the tokens that the head holds, index in `wanted`, kv_head).

    wanted: int64 [n, 3], (request, address of its sums, their columns).
    """
    head = tl.program_id(2)
    wanted += tl.program_id(1) * 3
    r = tl.load(wanted).to(tl.int32)
    first_row, computed, seq_len = request_of(r, query_start_loc, seq_lens)
    table = block_table + r.to(tl.int64) * table_stride
    end, blocks = kept_of(r, table, kept_ends, kept_starts, kept_blocks)
    kept_tokens, other_tokens, first_page = 0, 0, 0
    if kept_ends is not None:
        first_page, kept_tokens = kept_run(cells, table, head, block_stride, head_stride, end, 0)
        if G.other is not None:
            _, other_tokens = kept_run(cells, table, head, block_stride, head_stride, end, 1)
    # The query's own tile is dense, even where its token completes it.
    sealed = computed // G.tile_tokens * G.tile_tokens
    in_sequence, in_page, other, is_dense, t, column, used = place_of_chunk(
        tl.program_id(0), kept_tokens, other_tokens, end, seq_len, sealed, CHUNK, G
    )  # fmt: skip
    columns = tl.load(wanted + 2)
    used &= column < columns
    if (tl.max(used.to(tl.int32), 0) > 0) & (seq_len - computed == 1):
        m, d = tl.arange(0, G.group_rows), tl.arange(0, G.block_dim)
        row_mask = m < G.group
        heads = head * G.group + m
        query_rows = query + first_row.to(tl.int64) * query_token_stride + heads * query_head_stride
        rows = tl.load(query_rows[:, None] + d[None, :], mask=row_mask[:, None] & (d < G.head_dim)[None, :], other=0.0)
        ROWS: tl.constexpr = G.group_rows
        scores = tl.zeros([ROWS, CHUNK], tl.float32)
        masses = tl.zeros([CHUNK], tl.float32)
        if in_page:
            kept_chunks = (kept_tokens + CHUNK - 1) // CHUNK
            page = page_of_chunk(
                table, blocks, in_sequence, kept_chunks, end // G.tile_tokens, first_page, head, block_stride,
                head_stride, strip_offset, strip_pages, G
            )  # fmt: skip
            in_tiles = tl.where(in_sequence < kept_chunks, in_sequence, in_sequence - kept_chunks)
            column0 = in_tiles % G.chunks_per_tile * CHUNK
            first_position = end + (in_sequence - kept_chunks) * CHUNK
            scores = sealed_scores(
                rows, query_rows, row_mask, cells + page, column0, first_position, head, codec_tables, CHUNK, G
            )  # fmt: skip
            if G.mass:
                masses = sealed_masses(cells + page, column0, CHUNK, G)  # 0 where a token of the chunk is dense
        if (kept_ends is not None) and (G.other is not None):  # noqa: SIM102 (one is known at compile time)
            if other >= 0:
                scores = other_scores(
                    rows, query_rows, row_mask, cells, table, blocks, end, other, head, codec_tables, block_stride,
                    head_stride, strip_offset, strip_pages, CHUNK, G.other
                )  # fmt: skip
        if tl.max(is_dense.to(tl.int32), 0) > 0:
            stored, new = is_dense & (t < computed), is_dense & (t == computed)
            slots = slot_of(table, t, t < sealed, head, stored, block_stride, head_stride, G)
            staged_rows = (first_row + t - computed) * G.num_kv_heads + head
            key = dense_row(cells, slots, stored, staged, staged_rows, new, 0, True, G).to(rows.dtype)
            scores = tl.where(is_dense[None, :], dot(rows, key), scores)
        denominator = tl.load(lse + first_row.to(tl.int64) * num_heads + heads, mask=row_mask, other=0.0) * _LOG2_E
        weights = tl.exp2(soft_capped(scores * scale, G) + masses[None, :] - denominator[:, None])
        weights = tl.where(row_mask[:, None], weights * weights if POWER == 2 else weights, 0.0)
        sums = tl.load(wanted + 1).to(tl.pointer_type(tl.float32)) + head * columns + column
        tl.store(sums, tl.load(sums, mask=used, other=0.0) + tl.sum(weights, 0), mask=used)


def add_received(
    geometry: Geometry,
    tables: Tables,
    query: torch.Tensor,
    staged: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    received: Received,
) -> None:
    """Add to `received.sums` what the query rows of requests that bring one token paid to each token.

    Which requests those are comes from the host in every step: a CUDA graph cannot be captured with it.

    Args:
        query, staged: as the step attended with them (`decode`); the slots of the tile that it may have completed must
            not have been written since.
        lse: float32 [num_tokens, num_heads], contiguous; what attending gave.
        scale: softmax scale.

    Raises:
        ValueError: the policy has no pages, or the layer a sliding window.
    """
    sums = received.sums
    if geometry.dense or geometry.sliding_window:
        raise ValueError("sums of received attention need pages and a layer without sliding window")
    if not sums:
        return
    check_device(cells=tables.cells, query=query, staged=staged, lse=lse, **{f"sums of {r}": sums[r] for r in sums})
    wanted = torch.tensor([(r, table.data_ptr(), table.shape[1]) for r, table in sums.items()], dtype=torch.int64)
    # An evicted request's sinks, kept tokens of each format and later tokens each start a chunk.
    most = max(table.shape[1] for table in sums.values())
    chunks = triton.cdiv(most, CHUNK_TOKENS) + 1 + len(formats_of(geometry))
    received_kernel[(chunks, len(sums), geometry.num_kv_heads)](
        *tables.arguments, *tables.kept_arguments, query, query.stride(0), query.stride(1), staged, lse,
        query.shape[1], scale * LOG2_E, wanted.to(query.device, non_blocking=True), received.power, CHUNK_TOKENS,
        geometry, num_warps=warps_of(geometry),
    )  # fmt: skip
