"""Attention that the last query rows of a request pay to each stored token: what window and accumulating scorers need.

Two passes over the keys: the first gives each row's softmax denominator, the second sums powers of the probabilities.
No probability is ever stored. Keys are read as stored (`PagedAttention.read`), so that the result is the one that
kvserve/scorers/window_attention.py computes from them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvserve.kernels.decode import LOG2_E
from kvserve.kernels.geometry import CHUNK_TOKENS, Geometry, check_alignment, check_device
from kvserve.kernels.pages import cell_at, dense_row, dot, sealed_scores, slot_of, tile_index

SCORE_ROWS = 32


@triton.jit
def _stored_scores(
    rows, query_rows, row_mask, cells, table, head, start, position, stored, scale, block_stride, head_stride,
    CHUNK: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """Scores of rows [M, head_dim] against the stored tokens start.. + CHUNK; -inf where t > position[m]."""
    t = start + tl.arange(0, CHUNK)
    tile = start // G.tile_tokens
    is_sealed = tile < stored // G.tile_tokens
    is_dense = (t < G.sink_tokens) | (tl.full([CHUNK], 0, tl.int32) + start >= stored // G.tile_tokens * G.tile_tokens)
    scores = tl.zeros([rows.shape[0], CHUNK], tl.float32)
    if is_sealed:
        index = tile_index(tile, 0, 0, 0, G)
        page = cell_at(table, index, head, block_stride, head_stride) + tile % G.tiles_per_block * G.page_bytes
        page = cells + tl.multiple_of(page, 16)
        scores = sealed_scores(rows, query_rows, row_mask, page, start % G.tile_tokens, CHUNK, G)
    if (start < G.sink_tokens) | (is_sealed == 0):
        mask = is_dense & (t < stored)
        slots = slot_of(table, t, is_sealed, head, mask, block_stride, head_stride, G)
        key = dense_row(cells, slots, mask, None, t, mask, 0, True, G).to(rows.dtype)
        scores = tl.where(is_dense[None, :], dot(rows, key), scores)
    return tl.where((t[None, :] <= position[:, None]) & row_mask[:, None], scores * scale, float("-inf"))


@triton.jit
def scores_kernel(
    cells, block_stride, head_stride, table, stored, query, query_token_stride, query_head_stride, num_rows, scale,
    denominators, chunk_denominators, received, POWER: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    G: tl.constexpr
):  # fmt: skip
    """Program (chunk, query head).

    Without `denominators` it writes chunk_denominators [num_heads, chunks, num_rows]: log2 of the sum of 2^score over
    the chunk. With denominators [num_heads, num_rows] it writes received [num_heads, stored].
    """
    chunk, query_head = tl.program_id(0), tl.program_id(1)
    head = query_head // G.group
    start = chunk * CHUNK
    t, d = start + tl.arange(0, CHUNK), tl.arange(0, G.head_dim)
    sums = tl.zeros([CHUNK], tl.float32)
    for first in range(0, num_rows, ROWS):
        m = first + tl.arange(0, ROWS)
        row_mask = m < num_rows
        query_rows = query + m.to(tl.int64) * query_token_stride + query_head * query_head_stride
        rows = tl.load(query_rows[:, None] + d[None, :], mask=row_mask[:, None], other=0.0)
        scores = _stored_scores(
            rows, query_rows, row_mask, cells, table, head, start, stored - num_rows + m, stored, scale, block_stride,
            head_stride, CHUNK, G
        )  # fmt: skip
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
            sums += tl.sum(weights * weights if POWER == 2 else weights, 0)
    if denominators is not None:
        tl.store(received + query_head.to(tl.int64) * stored + t, sums, mask=t < stored)


def attention_received(
    geometry: Geometry,
    cells: torch.Tensor,
    table: torch.Tensor,
    stored: int,
    query: torch.Tensor,
    scale: float,
    power: int = 1,
) -> torch.Tensor:
    """Sum over query rows of probability ** power, for each stored token of one request that was not evicted.

    Args:
        cells: uint8, one layer's cells. table: int32 [>= blocks], the request's row of blocks.
        stored: tokens stored of the request; row i of `query` is at position stored - rows + i.
        query: [rows, num_heads, head_dim], last dim contiguous; the window's rows, or every row of a step.
        scale: softmax scale.
        power: 1 or 2.

    Returns:
        float32 [num_heads, stored]. A scorer's `accumulated` is its sum over the heads of a group, and over steps.

    Raises:
        ValueError: the dense policy, another power, or more rows than tokens.
    """
    rows, num_heads = query.shape[:2]
    if geometry.dense:
        raise ValueError("scores need a policy with codecs: the dense policy never evicts")
    if power not in (1, 2) or not 1 <= rows <= stored:
        raise ValueError(f"power must be 1 or 2 and rows in [1, {stored}], got {power} and {rows}")
    check_device(cells=cells, block_table_row=table, query=query)
    check_alignment(cells)
    chunks = triton.cdiv(stored, CHUNK_TOKENS)
    partial = torch.empty(num_heads, chunks, rows, dtype=torch.float32, device=query.device)
    received = torch.empty(num_heads, stored, dtype=torch.float32, device=query.device)

    def launch(denominators: torch.Tensor | None) -> None:
        scores_kernel[(chunks, num_heads)](
            cells, cells.stride(0), cells.stride(1), table, stored, query, query.stride(0), query.stride(1), rows,
            scale * LOG2_E, denominators, partial, received, power, SCORE_ROWS, CHUNK_TOKENS, geometry, num_warps=4,
        )  # fmt: skip

    launch(None)
    launch((partial / LOG2_E).logsumexp(1) * LOG2_E)
    return received
