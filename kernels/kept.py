"""Reading stored tokens back, and reading and writing what an evicted request keeps (kvserve/pages/kept.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from kvserve.kernels.codecs.chain import NO_TABLES, CodecTables
from kvserve.kernels.encode import encode_page
from kvserve.kernels.geometry import (
    CHUNK_TOKENS,
    Geometry,
    check_alignment,
    check_device,
    on_device,
    storage_geometry,
)
from kvserve.kernels.pages import dense_row, kept_page_at, slot_of, tile_page_at
from kvserve.kernels.sealed import sealed_rows
from kvserve.pages.kept import Header

READ_WARPS = 8


@triton.jit
def read_kernel(
    cells, block_stride, head_stride, table, codec_tables, stored, first, last, key, value, CHUNK: tl.constexpr,
    G: tl.constexpr
):  # fmt: skip
    """Program (chunk of the sequence, from the one that holds token `first` on, kv_head)."""
    head = tl.program_id(1)
    start = (first // CHUNK + tl.program_id(0)) * CHUNK
    t = start + tl.arange(0, CHUNK)
    mask = (t >= first) & (t < last)
    sealed = stored // G.tile_tokens * G.tile_tokens
    in_tail = t >= sealed
    is_sink = (t < G.sink_tokens) & (in_tail == 0)
    in_slot = mask & (in_tail | is_sink)
    slots = slot_of(table, t, is_sink, head, in_slot, block_stride, head_stride, G)
    key_rows = dense_row(cells, slots, in_slot, None, slots, in_slot, 0, False, G).to(tl.float32)
    value_rows = key_rows
    if value is not None:
        value_rows = dense_row(cells, slots, in_slot, None, slots, in_slot, 1, False, G).to(tl.float32)
    if start < sealed:
        page = cells + tile_page_at(table, start // G.tile_tokens, head, True, block_stride, head_stride, G)
        column0 = start % G.tile_tokens
        coded = sealed_rows(page, column0, start, head, codec_tables, 0, CHUNK, G)
        key_rows = tl.where(in_slot[:, None], key_rows, coded)
        if value is not None:
            coded = sealed_rows(page, column0, start, head, codec_tables, 1, CHUNK, G)
            value_rows = tl.where(in_slot[:, None], value_rows, coded)
    d = tl.arange(0, G.block_dim)
    at = ((head.to(tl.int64) * (last - first) + t - first) * G.head_dim)[:, None] + d[None, :]
    both = mask[:, None] & (d < G.head_dim)[None, :]
    tl.store(key + at, key_rows, mask=both)
    if value is not None:
        tl.store(value + at, value_rows, mask=both)


@triton.jit
def read_kept_kernel(
    cells, block_stride, head_stride, layer, num_layers, blocks, heads, codec_tables, key, value, log_mass,
    CHUNK: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """Program (chunk of kept tokens, kv_head): kept tokens to rows; `heads` as in `write_kept_kernel`."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    first_row, first_page = tl.load(heads + 3 * head), tl.load(heads + 3 * head + 1)
    num_tokens = tl.load(heads + 3 * head + 2)
    if chunk * CHUNK < num_tokens:
        t, d = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, G.block_dim)
        page = first_page + chunk // G.chunks_per_tile
        page = cells + kept_page_at(blocks, page, True, block_stride, head_stride, layer, num_layers, G)
        column0 = chunk % G.chunks_per_tile * CHUNK
        at = ((first_row + t).to(tl.int64) * G.head_dim)[:, None] + d[None, :]
        both = (t < num_tokens)[:, None] & (d < G.head_dim)[None, :]
        tl.store(key + at, sealed_rows(page, column0, 0, head, codec_tables, 0, CHUNK, G), mask=both)
        tl.store(value + at, sealed_rows(page, column0, 0, head, codec_tables, 1, CHUNK, G), mask=both)
        if G.mass:
            masses = (page + G.mass).to(tl.pointer_type(tl.float32)) + column0 + tl.arange(0, CHUNK)
            tl.store(log_mass + first_row + t, tl.load(masses), mask=t < num_tokens)


@triton.jit
def _write_header(cells, state_block, head, end, first_page, num_tokens, block_stride, head_stride, G: tl.constexpr):
    at = state_block.to(tl.int64) * block_stride + head * head_stride
    header = (cells + at).to(tl.pointer_type(tl.int32))
    tl.store(header, end)
    tl.store(header + 1, first_page)
    tl.store(header + 2, (num_tokens + G.tile_tokens - 1) // G.tile_tokens)
    tl.store(header + 3, num_tokens)


@triton.jit(do_not_specialize=["state_block", "end"])
def write_kept_kernel(
    cells, block_stride, head_stride, layer, num_layers, blocks, heads, codec_tables, state_block, end, key, value,
    log_mass, G: tl.constexpr
):  # fmt: skip
    """Program (page, kv_head): the head's kept page, and its header. A last page is filled with its last token.

    heads: int32 [num_kv_heads, 3], (first row of key and value, first page, tokens) of each head.
    """
    page, head = tl.program_id(0), tl.program_id(1)
    first_row, first_page = tl.load(heads + 3 * head), tl.load(heads + 3 * head + 1)
    num_tokens = tl.load(heads + 3 * head + 2)
    if page == 0:
        _write_header(cells, state_block, head, end, first_page, num_tokens, block_stride, head_stride, G)
    if page * G.tile_tokens < num_tokens:
        t = page * G.tile_tokens + tl.arange(0, G.tile_tokens)
        row = first_row + tl.minimum(t, num_tokens - 1)
        d = tl.arange(0, G.block_dim)
        at, mask = row.to(tl.int64)[:, None] * G.head_dim + d[None, :], (d < G.head_dim)[None, :] & (row >= 0)[:, None]
        k, v = tl.load(key + at, mask=mask, other=0.0), tl.load(value + at, mask=mask, other=0.0)
        to = kept_page_at(blocks, first_page + page, page >= 0, block_stride, head_stride, layer, num_layers, G)
        masses = None
        if log_mass is not None:
            masses = tl.load(log_mass + row, mask=t < num_tokens, other=0.0)
        encode_page(cells + to, k, v, masses, 0, 0, head, codec_tables, G)


def read(
    geometry: Geometry, cells: torch.Tensor, table: torch.Tensor, first: int, last: int, stored: int,
    with_values: bool = True, codec_tables: CodecTables = NO_TABLES
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Tokens [first, last) of one request as stored, float32 [num_kv_heads, last - first, head_dim]; V stays rotated.

    Args:
        cells: uint8, one layer's cells. table: int32, the request's row of blocks.
        stored: tokens stored of the request.
        with_values: False: no values are read, and None is returned in their place.
    """
    check_device(cells=cells, block_table_row=table)
    check_alignment(cells)
    shape = (geometry.num_kv_heads, last - first, geometry.head_dim)
    key = torch.empty(shape, dtype=torch.float32, device=cells.device)
    value = torch.empty_like(key) if with_values else None
    if last > first:
        chunks = triton.cdiv(last, CHUNK_TOKENS) - first // CHUNK_TOKENS
        read_kernel[(chunks, geometry.num_kv_heads)](
            cells, cells.stride(0), cells.stride(1), table, codec_tables, stored, first, last, key, value, CHUNK_TOKENS,
            storage_geometry(geometry), num_warps=READ_WARPS,
        )  # fmt: skip
    return key, value


def read_kept(
    geometry: Geometry, cells: torch.Tensor, blocks: Sequence[int], headers: Sequence[Header],
    codec_tables: CodecTables = NO_TABLES
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Kept tokens of one request, float32 [all heads' tokens, head_dim] in the order of the heads; V stays rotated.

    The last is their log-masses, float32 [all heads' tokens]; None where pages have none.

    Args:
        cells: uint8, one layer's cells. blocks: ids of the request's kept blocks. headers: of each KV head.
    """
    counts = [header.num_tokens for header in headers]
    key = torch.empty(sum(counts), geometry.head_dim, dtype=torch.float32, device=cells.device)
    value, log_mass = torch.empty_like(key), torch.empty_like(key[:, 0]) if geometry.mass else None
    if max(counts):
        read_kept_kernel[(triton.cdiv(max(counts), CHUNK_TOKENS), geometry.num_kv_heads)](
            *_kept_arguments(geometry, cells, blocks, headers), codec_tables, key, value, log_mass, CHUNK_TOKENS,
            storage_geometry(geometry), num_warps=READ_WARPS,
        )  # fmt: skip
    return key, value, log_mass


def write_kept(
    geometry: Geometry, cells: torch.Tensor, state_block: int, blocks: Sequence[int], headers: Sequence[Header],
    key: torch.Tensor, value: torch.Tensor, log_mass: torch.Tensor | None, codec_tables: CodecTables = NO_TABLES
) -> None:  # fmt: skip
    """Write kept pages and headers from rows, float32 [all heads' tokens, head_dim] in the order of the heads.

    The value is rotated where the policy rotates.

    Args:
        log_mass: float32 [all heads' tokens]; None: 0 for all of them. Only where pages have log-masses.
        state_block: id of the first block of the request's row. blocks: ids of its kept blocks.
    """
    check_device(cells=cells, key=key, value=value, log_mass=log_mass)
    pages = max(1, *(header.num_pages for header in headers))
    write_kept_kernel[(pages, geometry.num_kv_heads)](
        *_kept_arguments(geometry, cells, blocks, headers), codec_tables, state_block, headers[0].end,
        key.contiguous(), value.contiguous(), log_mass, storage_geometry(geometry), num_warps=8,
    )  # fmt: skip


def _kept_arguments(
    geometry: Geometry, cells: torch.Tensor, blocks: Sequence[int], headers: Sequence[Header]
) -> tuple[Any, ...]:
    """The arguments the kernels of kept pages start with."""
    check_device(cells=cells)
    check_alignment(cells)
    rows, first_row = [], 0
    for header in headers:
        rows.append((first_row, header.first_page, header.num_tokens))
        first_row += header.num_tokens
    num_layers = cells.stride(1) // geometry.cell_bytes
    layer = cells.storage_offset() % cells.stride(1) // geometry.cell_bytes
    block_ids, heads = (on_device(numbers, cells.device) for numbers in (blocks, rows))
    return cells, cells.stride(0), cells.stride(1), layer, num_layers, block_ids, heads
