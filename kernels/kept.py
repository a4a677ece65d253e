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
    formats_of,
    on_device,
    storage_geometry,
    strips_of,
)
from kvserve.kernels.pages import dense_row, kept_tile_at, slot_of, tile_page_at
from kvserve.kernels.sealed import sealed_rows
from kvserve.pages.kept import HEADER_BYTES, Header, Run

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
    cells, block_stride, head_stride, strip_offset, strip_pages, blocks, heads, codec_tables, key, value, log_mass,
    CHUNK: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """Program (chunk of kept tokens, kv_head): kept tokens to rows; `heads` as in `write_kept_kernel`."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    first_row, first_page = tl.load(heads + 3 * head), tl.load(heads + 3 * head + 1)
    num_tokens = tl.load(heads + 3 * head + 2)
    if chunk * CHUNK < num_tokens:
        t, d = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, G.block_dim)
        tile, place = chunk // G.chunks_per_tile, first_page
        page = cells + kept_tile_at(blocks, place, tile, True, block_stride, head_stride, strip_offset, strip_pages, G)
        column0 = chunk % G.chunks_per_tile * CHUNK
        at = ((first_row + t).to(tl.int64) * G.head_dim)[:, None] + d[None, :]
        both = (t < num_tokens)[:, None] & (d < G.head_dim)[None, :]
        tl.store(key + at, sealed_rows(page, column0, 0, head, codec_tables, 0, CHUNK, G), mask=both)
        tl.store(value + at, sealed_rows(page, column0, 0, head, codec_tables, 1, CHUNK, G), mask=both)
        if G.mass:
            masses = (page + G.mass).to(tl.pointer_type(tl.float32)) + column0 + tl.arange(0, CHUNK)
            tl.store(log_mass + first_row + t, tl.load(masses), mask=t < num_tokens)


@triton.jit
def write_kept_kernel(
    cells, block_stride, head_stride, strip_offset, strip_pages, blocks, heads, codec_tables, key, value, log_mass,
    G: tl.constexpr
):  # fmt: skip
    """Program (tile, kv_head): a tile of the head's run. A last tile is filled with its last token.

    heads: int32 [num_kv_heads, 3], (first row of key and value, first page, tokens) of each head's run.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    first_row, first_page = tl.load(heads + 3 * head), tl.load(heads + 3 * head + 1)
    num_tokens = tl.load(heads + 3 * head + 2)
    if tile * G.tile_tokens < num_tokens:
        t = tile * G.tile_tokens + tl.arange(0, G.tile_tokens)
        row = first_row + tl.minimum(t, num_tokens - 1)
        d = tl.arange(0, G.block_dim)
        at, mask = row.to(tl.int64)[:, None] * G.head_dim + d[None, :], (d < G.head_dim)[None, :] & (row >= 0)[:, None]
        k, v = tl.load(key + at, mask=mask, other=0.0), tl.load(value + at, mask=mask, other=0.0)
        to = kept_tile_at(
            blocks, first_page, tile, tile >= 0, block_stride, head_stride, strip_offset, strip_pages, G
        )  # fmt: skip
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
    total = sum(header.num_tokens for header in headers)
    key = torch.empty(total, geometry.head_dim, dtype=torch.float32, device=cells.device)
    value, log_mass = torch.empty_like(key), torch.empty_like(key[:, 0]) if geometry.mass else None
    for run, of_format in enumerate(formats_of(geometry)):
        if most := _most_tokens(headers, run):
            read_kept_kernel[(triton.cdiv(most, CHUNK_TOKENS), geometry.num_kv_heads)](
                *_kept_arguments(geometry, cells, blocks, headers, run), codec_tables if run == 0 else NO_TABLES, key,
                value, log_mass, CHUNK_TOKENS, storage_geometry(of_format), num_warps=READ_WARPS,
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
    numbers = on_device([header.numbers for header in headers], cells.device).view(torch.uint8)
    cells.flatten(2)[state_block, :, :HEADER_BYTES] = numbers
    key, value = key.contiguous(), value.contiguous()
    for run, of_format in enumerate(formats_of(geometry)):
        if most := _most_tokens(headers, run):
            write_kept_kernel[(triton.cdiv(most, geometry.tile_tokens), geometry.num_kv_heads)](
                *_kept_arguments(geometry, cells, blocks, headers, run), codec_tables if run == 0 else NO_TABLES, key,
                value, log_mass, storage_geometry(of_format), num_warps=8,
            )  # fmt: skip


def _most_tokens(headers: Sequence[Header], run: int) -> int:
    """Of any head's run of this number."""
    return max(header.runs[run].num_tokens if run < len(header.runs) else 0 for header in headers)


def _kept_arguments(
    geometry: Geometry, cells: torch.Tensor, blocks: Sequence[int], headers: Sequence[Header], run: int
) -> tuple[Any, ...]:
    """The arguments the kernels of kept pages start with, for the heads' runs of this number."""
    check_device(cells=cells)
    check_alignment(cells)
    rows, first_row = [], 0
    for header in headers:
        before = first_row + sum(earlier.num_tokens for earlier in header.runs[:run])
        own = header.runs[run] if run < len(header.runs) else Run(run, 0, 0)
        rows.append((before, own.first_page, own.num_tokens))
        first_row += header.num_tokens
    block_ids, heads = (on_device(numbers, cells.device) for numbers in (blocks, rows))
    strips = strips_of(cells, geometry.kept_page_bytes)
    return cells, cells.stride(0), cells.stride(1), *strips, block_ids, heads
