"""Reading stored tokens back, and reading and writing what an evicted request keeps (kvserve/pages/kept.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from kvserve.kernels.encode import encode_page
from kvserve.kernels.geometry import Geometry, check_alignment, check_device, on_device, storage_geometry
from kvserve.kernels.pages import dense_row, kept_page_at, slot_of, tile_page_at
from kvserve.pages.kept import Header

READ_TOKENS = 32


@triton.jit
def _code_at(
    section, row, column, ALL_ROWS: tl.constexpr, ALL_COLUMNS: tl.constexpr, BITS: tl.constexpr, mask
):  # fmt: skip
    """One code per element of row and column, which broadcast; section [N, 1] are addresses (load_codes in bytes)."""
    WIDTH: tl.constexpr = 128 // BITS
    in_block = column % WIDTH
    if ALL_COLUMNS % WIDTH:
        lower = (column // WIDTH == ALL_COLUMNS // WIDTH) & (row >= ALL_ROWS // 2)
        row = row - tl.where(lower, ALL_ROWS // 2, 0)
        in_block += tl.where(lower, WIDTH // 2, 0)
    at = column // WIDTH * (ALL_ROWS * 16) + row // 4 * 64 + in_block % 16 * 4 + row % 4
    byte = tl.load(section + at, mask=mask, other=0).to(tl.int32)
    return (byte >> (in_block // 16 * BITS)) & ((1 << BITS) - 1)


@triton.jit
def _page_key(pages, column, mask, G: tl.constexpr):
    """Keys of tokens in column [N, 1] of the pages at the addresses [N, 1], float32 [N, block_dim]."""
    d = tl.arange(0, G.block_dim)[None, :]
    in_head = mask & (d < G.head_dim)
    code = _code_at(pages + G.key_codes, d, column, G.head_dim, G.tile_tokens, G.key_bits, in_head)
    for i in range(G.boost_channels):
        channel = tl.load(pages + G.key_boost_index + i, mask=mask, other=0).to(tl.int32)
        upper = _code_at(pages + G.key_boost_codes, i, column, G.boost_channels, G.tile_tokens, 2, mask)
        code += tl.where(channel == d, 4 * upper, 0)
    at = column // G.key_group * (2 * G.head_dim) + d
    scales = (pages + G.key_scales).to(tl.pointer_type(tl.float16))
    scale = tl.load(scales + at, mask=in_head, other=0.0)
    low = tl.load(scales + at + G.head_dim, mask=in_head, other=0.0)
    return code.to(tl.float32) * scale.to(tl.float32) + low.to(tl.float32)


@triton.jit
def _page_value(pages, column, mask, G: tl.constexpr):
    """Values of tokens in column [N, 1] of the pages at the addresses [N, 1], float32 [N, block_dim]; still rotated."""
    d = tl.arange(0, G.block_dim)[None, :]
    in_head = mask & (d < G.head_dim)
    code = _code_at(pages + G.value_codes, column, d, G.tile_tokens, G.head_dim, G.value_bits, in_head).to(tl.float32)
    scales = (pages + G.value_scales).to(tl.pointer_type(tl.float16))
    if G.rotated:
        value = (code - 0.5 * ((1 << G.value_bits) - 1)) * tl.load(scales + column, mask=mask, other=0.0).to(tl.float32)
    else:
        at = d // G.value_group * (2 * G.tile_tokens) + column
        low = tl.load(scales + at + G.tile_tokens, mask=in_head, other=0.0).to(tl.float32)
        value = code * tl.load(scales + at, mask=in_head, other=0.0).to(tl.float32) + low
    return value


@triton.jit
def _rows(cells, slots, in_slot, pages, column, in_page, part: tl.constexpr, G: tl.constexpr):
    """K (part 0) or V (part 1) of N tokens as stored, float32 [N, block_dim].

    Args:
        slots: offsets [N] of dense slots, read where in_slot.
        pages: offsets [N] of the pages, read in `column` [N] where in_page.
    """
    if G.dense_pages:
        at = tl.where(in_page, pages + column * G.slot_bytes, slots)
        rows = dense_row(cells, at, in_slot | in_page, None, at, in_page, part, False, G).to(tl.float32)
    else:
        rows = dense_row(cells, slots, in_slot, None, slots, in_slot, part, False, G).to(tl.float32)
        if part == 0:
            rows += _page_key((cells + pages)[:, None], column[:, None], in_page[:, None], G)
        else:
            rows += _page_value((cells + pages)[:, None], column[:, None], in_page[:, None], G)
    return rows


@triton.jit
def read_kernel(
    cells, block_stride, head_stride, table, stored, first, last, key, value, TOKENS: tl.constexpr, G: tl.constexpr
):
    """Program (token tile, kv_head)."""
    head = tl.program_id(1)
    t = first + tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    mask = t < last
    in_tail = t >= stored // G.tile_tokens * G.tile_tokens
    is_sink = (t < G.sink_tokens) & (in_tail == 0)
    in_slot = mask & (in_tail | is_sink)
    in_page = mask & (in_slot == 0)
    slots = slot_of(table, t, is_sink, head, in_slot, block_stride, head_stride, G)
    pages = tile_page_at(table, t // G.tile_tokens, head, in_page, block_stride, head_stride, G)
    d, column = tl.arange(0, G.block_dim), t % G.tile_tokens
    at = ((head.to(tl.int64) * (last - first) + t - first) * G.head_dim)[:, None] + d[None, :]
    both = mask[:, None] & (d < G.head_dim)[None, :]
    tl.store(key + at, _rows(cells, slots, in_slot, pages, column, in_page, 0, G), mask=both)
    if value is not None:
        tl.store(value + at, _rows(cells, slots, in_slot, pages, column, in_page, 1, G), mask=both)


@triton.jit
def read_kept_kernel(
    cells, block_stride, head_stride, layer, num_layers, blocks, heads, key, value,
    TOKENS: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """Program (token tile, kv_head): kept tokens to rows; `heads` as in `write_kept_kernel`."""
    head = tl.program_id(1)
    first_row, first_page = tl.load(heads + 3 * head), tl.load(heads + 3 * head + 1)
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    mask = t < tl.load(heads + 3 * head + 2)
    page = first_page + t // G.tile_tokens
    pages = kept_page_at(blocks, page, mask, block_stride, head_stride, layer, num_layers, G)
    d, column, nowhere = tl.arange(0, G.block_dim), t % G.tile_tokens, t < 0
    at = ((first_row + t).to(tl.int64) * G.head_dim)[:, None] + d[None, :]
    both = mask[:, None] & (d < G.head_dim)[None, :]
    tl.store(key + at, _rows(cells, pages, nowhere, pages, column, mask, 0, G), mask=both)
    tl.store(value + at, _rows(cells, pages, nowhere, pages, column, mask, 1, G), mask=both)


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
    cells, block_stride, head_stride, layer, num_layers, blocks, heads, state_block, end, key, value, G: tl.constexpr
):
    """Program (page, kv_head): the head's kept page, and its header. A last page is filled with its last token.

    heads: int32 [num_kv_heads, 3], (first row of key and value, first page, tokens) of each head.
    """
    page, head = tl.program_id(0), tl.program_id(1)
    first_row, first_page = tl.load(heads + 3 * head), tl.load(heads + 3 * head + 1)
    num_tokens = tl.load(heads + 3 * head + 2)
    if page == 0:
        _write_header(cells, state_block, head, end, first_page, num_tokens, block_stride, head_stride, G)
    if page * G.tile_tokens < num_tokens:
        row = first_row + tl.minimum(page * G.tile_tokens + tl.arange(0, G.tile_tokens), num_tokens - 1)
        d = tl.arange(0, G.block_dim)
        at, mask = row.to(tl.int64)[:, None] * G.head_dim + d[None, :], (d < G.head_dim)[None, :] & (row >= 0)[:, None]
        k, v = tl.load(key + at, mask=mask, other=0.0), tl.load(value + at, mask=mask, other=0.0)
        to = kept_page_at(blocks, first_page + page, page >= 0, block_stride, head_stride, layer, num_layers, G)
        encode_page(cells + to, k, v, 0, G)


def read(
    geometry: Geometry, cells: torch.Tensor, table: torch.Tensor, first: int, last: int, stored: int,
    with_values: bool = True
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
        grid = (triton.cdiv(last - first, READ_TOKENS), geometry.num_kv_heads)
        read_kernel[grid](
            cells, cells.stride(0), cells.stride(1), table, stored, first, last, key, value, READ_TOKENS,
            storage_geometry(geometry),
        )  # fmt: skip
    return key, value


def read_kept(
    geometry: Geometry, cells: torch.Tensor, blocks: Sequence[int], headers: Sequence[Header]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept tokens of one request, float32 [all heads' tokens, head_dim] in the order of the heads; V stays rotated.

    Args:
        cells: uint8, one layer's cells. blocks: ids of the request's kept blocks. headers: of each KV head.
    """
    counts = [header.num_tokens for header in headers]
    key = torch.empty(sum(counts), geometry.head_dim, dtype=torch.float32, device=cells.device)
    value = torch.empty_like(key)
    if max(counts):
        read_kept_kernel[(triton.cdiv(max(counts), READ_TOKENS), geometry.num_kv_heads)](
            *_kept_arguments(geometry, cells, blocks, headers), key, value, READ_TOKENS, storage_geometry(geometry)
        )
    return key, value


def write_kept(
    geometry: Geometry, cells: torch.Tensor, state_block: int, blocks: Sequence[int], headers: Sequence[Header],
    key: torch.Tensor, value: torch.Tensor
) -> None:  # fmt: skip
    """Write kept pages and headers from rows, float32 [all heads' tokens, head_dim] in the order of the heads.

    The value is rotated where the policy rotates.

    Args:
        state_block: id of the first block of the request's row. blocks: ids of its kept blocks.
    """
    check_device(cells=cells, key=key, value=value)
    pages = max(1, *(header.num_pages for header in headers))
    write_kept_kernel[(pages, geometry.num_kv_heads)](
        *_kept_arguments(geometry, cells, blocks, headers), state_block, headers[0].end, key.contiguous(),
        value.contiguous(), storage_geometry(geometry), num_warps=8,
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
