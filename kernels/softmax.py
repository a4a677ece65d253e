"""The running softmax over chunks of tokens, in base 2, and the two kinds of chunk it takes."""

from __future__ import annotations

import triton
import triton.language as tl

from kvserve.kernels.geometry import LOG2_E
from kvserve.kernels.pages import dense_row, dot, kept_run, kept_tile_at, slot_of
from kvserve.kernels.sealed import sealed_masses, sealed_scores, sealed_values

_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)


@triton.jit
def soft_capped(scores, G: tl.constexpr):
    """Logits in base 2 as the layer counts them: cap * tanh(logit / cap) where it caps them."""
    if G.soft_cap is not None:
        x = scores * (1.0 / G.soft_cap)
        square = x * x  # the Taylor series where the ratio cancels
        series = x + x * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
        shrunk = tl.exp2(tl.abs(x) * (-2 * _LOG2_E))
        ratio = (1.0 - shrunk) / (1.0 + shrunk)
        scores = tl.where(tl.abs(x) >= 0.25, tl.where(x < 0, -ratio, ratio), series) * G.soft_cap
    return scores


@triton.jit
def start_of_softmax(sink_logits, heads, mask):
    """Maximum and sum [M], in base 2, of rows that have seen no token: their learned sink where `mask`, or nothing."""
    if sink_logits is None:
        peak = tl.full(mask.shape, float("-inf"), tl.float32)
        total = tl.zeros(mask.shape, tl.float32)
    else:
        peak = tl.load(sink_logits + heads, mask=mask, other=float("-inf")) * _LOG2_E
        total = tl.where(peak > float("-inf"), 1.0, 0.0)
    return peak, total


@triton.jit
def _rescale(scores, accumulator, peak, total):
    """Weights of one chunk's scores [M, N], and the state with room for them; rows that saw nothing stay zero."""
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    shrink = tl.exp2(peak - safe)
    weights = tl.exp2(scores - safe[:, None])
    return weights, accumulator * shrink[:, None], new_peak, total * shrink + tl.sum(weights, 1)


@triton.jit
def add_sealed_chunk(
    accumulator, peak, total, query, query_rows, row_mask, page, column0, first_position, head, codec_tables, visible,
    used, scale, CHUNK: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """Attend to one chunk of a sealed page.

    Args:
        accumulator, peak, total: float32 [M, block_dim], [M], [M]; the state so far.
        query: [M, block_dim], its dtype is that of the dots; query_rows [M] are the rows' addresses.
        first_position: position of the token in column0; any number in a kept page.
        codec_tables: CodecTables.
        visible: bool [M, CHUNK]; used: bool [CHUNK], columns that exist.
        scale: softmax scale times log2(e).
    """
    scores = sealed_scores(
        query, query_rows, row_mask, page, column0, first_position, head, codec_tables, CHUNK, G
    ) * scale  # fmt: skip
    scores = soft_capped(scores, G)
    if G.mass:
        scores += sealed_masses(page, column0, CHUNK, G)[None, :]
    scores = tl.where(visible, scores, float("-inf"))
    weights, accumulator, peak, total = _rescale(scores, accumulator, peak, total)
    accumulator += sealed_values(
        weights, used, page, column0, first_position, head, codec_tables, CHUNK, query.dtype, G
    )  # fmt: skip
    return accumulator, peak, total


@triton.jit
def add_other_run(
    accumulator, peak, total, query, query_rows, row_mask, cells, table, blocks, end, head, split, splits, codec_tables,
    scale, block_stride, head_stride, strip_offset, strip_pages, CHUNK: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """Attend to a split's share of a head's kept tokens in format 1, whose geometry G is; every row sees them."""
    first_page, tokens = kept_run(cells, table, head, block_stride, head_stride, end, 1)
    chunks = (tokens + CHUNK - 1) // CHUNK
    share = (chunks + splits - 1) // splits
    for chunk in range(split * share, tl.minimum(split * share + share, chunks)):
        page = kept_tile_at(
            blocks, first_page, chunk // G.chunks_per_tile, True, block_stride, head_stride, strip_offset,
            strip_pages, G
        )  # fmt: skip
        used = chunk * CHUNK + tl.arange(0, CHUNK) < tokens
        accumulator, peak, total = add_sealed_chunk(
            accumulator, peak, total, query, query_rows, row_mask, cells + page, chunk % G.chunks_per_tile * CHUNK, 0,
            head, codec_tables, used[None, :] & row_mask[:, None], used, scale, CHUNK, G
        )  # fmt: skip
    return accumulator, peak, total


@triton.jit
def add_dense_chunk(
    accumulator, peak, total, query, cells, slots, stored, staged, staged_rows, new, visible, scale, G: tl.constexpr
):
    """Attend to N dense tokens: slots where `stored`, staged rows where `new` (see `dense_row`); visible [M, N]."""
    key = dense_row(cells, slots, stored, staged, staged_rows, new, 0, True, G).to(query.dtype)
    scores = soft_capped(dot(query, key) * scale, G)
    scores = tl.where(visible, scores, float("-inf"))
    weights, accumulator, peak, total = _rescale(scores, accumulator, peak, total)
    value = dense_row(cells, slots, stored, staged, staged_rows, new, 1, False, G).to(query.dtype)
    accumulator += dot(weights.to(query.dtype), value)
    return accumulator, peak, total


@triton.jit
def add_dense_tokens(
    accumulator, peak, total, query, cells, table, staged, head, start, first_row, computed, position, sees_from,
    sees_to, row_mask, is_sink: tl.constexpr, scale, block_stride, head_stride,
    CHUNK: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """Attend to the dense tokens start.. + CHUNK; row m sees sees_from[m] <= t < sees_to[m] (and its window)."""
    t = start + tl.arange(0, CHUNK)
    visible = (t[None, :] >= sees_from[:, None]) & (t[None, :] < sees_to[:, None]) & row_mask[:, None]
    if G.sliding_window:
        visible &= t[None, :] > position[:, None] - G.sliding_window
    wanted = tl.max(visible.to(tl.int32), 0) > 0
    stored = wanted & (is_sink | G.dense | (t < computed))
    slots = slot_of(table, t, is_sink, head, stored, block_stride, head_stride, G)
    new = wanted & (not is_sink) & (t >= computed)
    rows = (first_row + t - computed) * G.num_kv_heads + head
    return add_dense_chunk(
        accumulator, peak, total, query, cells, slots, stored, staged, rows, new, visible, scale, G
    )  # fmt: skip
