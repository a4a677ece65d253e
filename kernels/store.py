"""Storing new tokens: staging, sealing the tiles that a step completes, and writing dense slots.

Grids depend on shapes and on `max_query_len` alone; programs whose request has nothing to store return at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvserve.kernels.encode import encode_page, store_slots
from kvserve.kernels.geometry import Geometry, Tables, check_device, storage_geometry
from kvserve.kernels.pages import dense_row, request_of, rotated_columns, slot_of, tile_page_at

STAGE_TOKENS = 16
SLOT_TOKENS = 16  # tokens that one program writes to slots
FLOAT16_MAX: tl.constexpr = tl.constexpr(65504.0)


@triton.jit
def _rounded(rows, G: tl.constexpr):
    """Float32 rows as a dense slot keeps them."""
    if G.slot_dtype == tl.float16:
        rows = tl.minimum(tl.maximum(rows, -FLOAT16_MAX), FLOAT16_MAX)
    return rows.to(G.slot_dtype).to(tl.float32)


@triton.jit
def _beyond(rows):
    """Which rows [N, D] float16 has no room for (`beyond_range`), int32 [N] of 0 and 1."""
    return tl.max(((rows > FLOAT16_MAX) | (rows < -FLOAT16_MAX)).to(tl.int32), 1)


@triton.jit
def stage_kernel(
    key, key_token_stride, key_head_stride, value, value_token_stride, value_head_stride, staged, beyond, num_tokens,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """Program (token tile, kv_head); adds the rows that it finds beyond float16's range to `beyond`, int64 [1]."""
    head = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, G.block_dim)
    mask = (token < num_tokens)[:, None] & (d < G.head_dim)[None, :]
    out = staged + ((token * G.num_kv_heads + head) * 2 * G.head_dim)[:, None]
    key_rows = key + (token * key_token_stride)[:, None] + head * key_head_stride
    rows = tl.load(key_rows + d[None, :], mask=mask, other=0.0).to(tl.float32)
    count = tl.sum(_beyond(rows), 0)
    tl.store(out + d[None, :], _rounded(rows, G), mask=mask)
    value_rows = value + (token * value_token_stride)[:, None] + head * value_head_stride
    rows = tl.load(value_rows + d[None, :], mask=mask, other=0.0)
    out += G.head_dim
    if G.rotated:
        found = tl.zeros([TOKENS], tl.int32)
        for first in range(0, G.head_dim, COLUMNS):
            turned = rotated_columns(rows, first, COLUMNS, True, G)
            found = tl.maximum(found, _beyond(turned))
            columns = first + tl.arange(0, COLUMNS)
            tl.store(out + columns[None, :], _rounded(turned, G), mask=(token < num_tokens)[:, None])
        count += tl.sum(found, 0)
    else:
        count += tl.sum(_beyond(rows.to(tl.float32)), 0)
        tl.store(out + d[None, :], _rounded(rows.to(tl.float32), G), mask=mask)
    if G.saturates:
        tl.atomic_add(beyond, count.to(tl.int64), mask=count > 0)


@triton.jit
def seal_kernel(
    cells, block_stride, head_stride, strip_offset, strip_pages, query_start_loc, seq_lens, block_table, table_stride,
    codec_tables, staged,
    G: tl.constexpr
):  # fmt: skip
    """Program (request, kv_head, n): the n-th tile that this step completes; tile 0 also writes its sinks."""
    r, head = tl.program_id(0), tl.program_id(1)
    first_row, computed, seq_len = request_of(r, query_start_loc, seq_lens)
    tile = computed // G.tile_tokens + tl.program_id(2)
    if tile < seq_len // G.tile_tokens:
        table = block_table + r.to(tl.int64) * table_stride
        t = tile * G.tile_tokens + tl.arange(0, G.tile_tokens)
        stored = t < computed
        slots = slot_of(table, t, False, head, stored, block_stride, head_stride, G)
        rows = (first_row + t - computed) * G.num_kv_heads + head
        key = dense_row(cells, slots, stored, staged, rows, t >= computed, 0, False, G)
        value = dense_row(cells, slots, stored, staged, rows, t >= computed, 1, False, G)
        page = cells + tile_page_at(table, tile, head, True, block_stride, head_stride, G)
        first_counted = tl.where(tile == 0, G.sink_tokens, 0)
        encode_page(page, key, value, None, first_counted, tile * G.tile_tokens, head, codec_tables, G)
        if G.sink_tokens:
            sinks = t < G.sink_tokens  # only in tile 0
            to = slot_of(table, t, True, head, sinks, block_stride, head_stride, G)
            store_slots(cells, to, sinks, key, value, G)


@triton.jit
def slots_kernel(
    cells, block_stride, head_stride, strip_offset, strip_pages, query_start_loc, seq_lens, block_table, table_stride,
    codec_tables, staged,
    TOKENS: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """Program (token tile, request, kv_head): new tokens of the unfinished tile; dense policy: every new token."""
    r, head = tl.program_id(1), tl.program_id(2)
    first_row, computed, seq_len = request_of(r, query_start_loc, seq_lens)
    first = computed
    if not G.dense:
        least = tl.maximum(seq_len - G.draft_tokens, 0)  # the length if all drafts are rejected
        first = tl.maximum(computed, least // G.tile_tokens * G.tile_tokens)
    first += tl.program_id(0) * TOKENS
    if first < seq_len:
        t = first + tl.arange(0, TOKENS)
        mask = t < seq_len
        d = tl.arange(0, G.block_dim)
        row = ((first_row + t - computed) * G.num_kv_heads + head).to(tl.int64) * 2 * G.head_dim
        both = mask[:, None] & (d < G.head_dim)[None, :]
        key = tl.load(staged + row[:, None] + d[None, :], mask=both, other=0.0)
        value = tl.load(staged + row[:, None] + G.head_dim + d[None, :], mask=both, other=0.0)
        table = block_table + r.to(tl.int64) * table_stride
        slots = slot_of(table, t, False, head, mask, block_stride, head_stride, G)
        store_slots(cells, slots, mask, key, value, G)


def stage(geometry: Geometry, key: torch.Tensor, value: torch.Tensor, beyond: torch.Tensor) -> torch.Tensor:
    """New rows as the arena will keep them: rounded to the dense dtype, V rotated where the policy rotates.

    Args:
        key, value: [num_tokens, num_kv_heads, head_dim], last dim contiguous; float32, float16 or bfloat16.
        beyond: int64 [1], grows by the rows beyond float16's range, where scales or slots are float16.

    Returns:
        float32 [num_tokens, num_kv_heads, 2 (K, V), head_dim].
    """
    check_device(key=key, value=value)
    num_tokens, heads, head_dim = key.shape
    staged = torch.empty(num_tokens, heads, 2, head_dim, dtype=torch.float32, device=key.device)
    if num_tokens:
        stage_kernel[(triton.cdiv(num_tokens, STAGE_TOKENS), heads)](
            key, key.stride(0), key.stride(1), value, value.stride(0), value.stride(1), staged, beyond, num_tokens,
            STAGE_TOKENS, min(32, geometry.block_dim), storage_geometry(geometry),
        )  # fmt: skip
    return staged


def store_sealed(geometry: Geometry, tables: Tables, staged: torch.Tensor) -> None:
    """Seal every tile that the step completes, with its sinks; dense policy: write the new tokens to their slots.

    `staged` as `stage` returns it. Older tokens of a tile are read from the tail, so `store_tail` comes later.
    """
    if geometry.dense:
        _launch_slots(geometry, tables, staged, tables.max_query_len)
        return
    check_device(cells=tables.cells, staged=staged, block_table=tables.batch.block_table)
    tiles = triton.cdiv(tables.max_query_len, geometry.tile_tokens)
    warps = 8 if geometry.head_dim * geometry.tile_tokens > 64 * 64 else 4
    seal_kernel[(tables.batch.num_reqs, geometry.num_kv_heads, tiles)](
        *tables.arguments, staged, storage_geometry(geometry), num_warps=warps
    )


def store_tail(geometry: Geometry, tables: Tables, staged: torch.Tensor) -> None:
    """Write the new tokens of each request's unfinished tile to its tail slots; dense policy: nothing."""
    if not geometry.dense:
        _launch_slots(geometry, tables, staged, min(tables.max_query_len, geometry.tail_slots - 1))


def _launch_slots(geometry: Geometry, tables: Tables, staged: torch.Tensor, most_tokens: int) -> None:
    check_device(cells=tables.cells, staged=staged, block_table=tables.batch.block_table)
    grid = (triton.cdiv(most_tokens, SLOT_TOKENS), tables.batch.num_reqs, geometry.num_kv_heads)
    slots_kernel[grid](*tables.arguments, staged, SLOT_TOKENS, storage_geometry(geometry))
