"""Attention's two products with one chunk of a sealed page, whatever its codecs.

Affine keys with one scale per channel, and affine or symmetric values with one per token, enter the dots as integers.
Every other half is decoded to rows first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvserve.kernels.codecs.affine import affine_scores, affine_values
from kvserve.kernels.codecs.chain import read_rows
from kvserve.kernels.geometry import LOG2_E
from kvserve.kernels.pages import dense_row, dot

_FLOAT16_MAX: tl.constexpr = tl.constexpr(65504.0)
_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)


@triton.jit
def _operand(rows, DTYPE: tl.constexpr):
    """Decoded rows in the dtype of a dot; what float16 has no room for saturates."""
    if DTYPE == tl.float16:
        rows = tl.minimum(tl.maximum(rows, -_FLOAT16_MAX), _FLOAT16_MAX)
    return rows.to(DTYPE)


@triton.jit
def sealed_scores(
    query, query_rows, row_mask, page, column0, first_position, head, codec_tables, CHUNK: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """query [M, block_dim] times the keys of one chunk, float32 [M, CHUNK].

    Args:
        query_rows: addresses [M] of the query rows.
        first_position: position in the sequence of the chunk's first token.
        codec_tables: CodecTables.
    """
    if G.dense_pages:
        slots = (column0 + tl.arange(0, CHUNK)) * G.slot_bytes
        key = dense_row(page, slots, slots >= 0, None, slots, slots >= 0, 0, True, G)
        scores = dot(query, key.to(query.dtype))
    elif G.key.integer:
        scores = affine_scores(query, query_rows, row_mask, page, column0, CHUNK, G.key.stages[0], G)
    else:
        key = read_rows(page, column0, first_position, head, codec_tables.key, CHUNK, G.key, G)
        scores = dot(query, tl.trans(_operand(key, query.dtype)))
    return scores


@triton.jit
def sealed_masses(page, column0, CHUNK: tl.constexpr, G: tl.constexpr):
    """What is added to the logits, in base 2, of one chunk's tokens, float32 [CHUNK]: the log of how many they are."""
    at = (page + G.mass).to(tl.pointer_type(tl.float32)) + column0 + tl.arange(0, CHUNK)
    return tl.load(at) * _LOG2_E


@triton.jit
def sealed_values(
    weights, used, page, row0, first_position, head, codec_tables, CHUNK: tl.constexpr, DTYPE: tl.constexpr,
    G: tl.constexpr
):  # fmt: skip
    """weights [M, CHUNK] times the values of one chunk, float32 [M, block_dim]; rotated values stay so.

    Columns from head_dim on are finite, otherwise anything: `store_rows` leaves them out, rotations do not mix them in.
    Only the columns in `used` [CHUNK] exist: what a page holds in the others never enters.
    """
    if G.dense_pages:
        slots = (row0 + tl.arange(0, CHUNK)) * G.slot_bytes
        value = dense_row(page, slots, used, None, slots, used, 1, False, G)
        result = dot(weights.to(DTYPE), value.to(DTYPE))
    elif G.value.integer:
        result = affine_values(weights, used, page, row0, CHUNK, DTYPE, G.value.stages[0], G)
    else:
        value = read_rows(page, row0, first_position, head, codec_tables.value, CHUNK, G.value, G)
        result = dot(weights.to(DTYPE), _operand(tl.where(used[:, None], value, 0.0), DTYPE))
    return result


@triton.jit
def sealed_rows(
    page, column0, first_position, head, codec_tables, part: tl.constexpr, CHUNK: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """K (part 0) or V (part 1) of one chunk as stored, float32 [CHUNK, block_dim]; values stay rotated."""
    if G.dense_pages:
        slots = (column0 + tl.arange(0, CHUNK)) * G.slot_bytes
        rows = dense_row(page, slots, slots >= 0, None, slots, slots >= 0, part, False, G).to(tl.float32)
    elif part == 0:
        rows = read_rows(page, column0, first_position, head, codec_tables.key, CHUNK, G.key, G)
    else:
        rows = read_rows(page, column0, first_position, head, codec_tables.value, CHUNK, G.value, G)
    return rows
