"""Reading stored tokens back, and writing what an evicted request keeps (kvserve/pages/kept.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kvserve.kernels.encode import encode_page
from kvserve.kernels.geometry import Geometry, check_alignment, check_device, storage_geometry
from kvserve.kernels.pages import dense_row, slot_of, tile_index
from kvserve.pages.kept import Header, Kept

READ_TOKENS = 32


@triton.jit
def _code_at(section, row, column, ALL_ROWS: tl.constexpr, BITS: tl.constexpr, mask):
    """One code per element of row and column, which broadcast; section [N, 1] are addresses (load_codes in bytes)."""
    in_block = column % (128 // BITS)
    at = column // (128 // BITS) * (ALL_ROWS * 16) + row // 4 * 64 + in_block % 16 * 4 + row % 4
    byte = tl.load(section + at, mask=mask, other=0).to(tl.int32)
    return (byte >> (in_block // 16 * BITS)) & ((1 << BITS) - 1)


@triton.jit
def _page_key(pages, column, mask, G: tl.constexpr):
    """Keys of tokens in column [N, 1] of the pages at the addresses [N, 1], float32 [N, head_dim]."""
    d = tl.arange(0, G.head_dim)[None, :]
    code = _code_at(pages + G.key_codes, d, column, G.head_dim, G.key_bits, mask)
    for i in range(G.boost_channels):
        channel = tl.load(pages + G.key_boost_index + i, mask=mask, other=0).to(tl.int32)
        upper = _code_at(pages + G.key_boost_codes, i, column, G.boost_channels, 2, mask)
        code += tl.where(channel == d, 4 * upper, 0)
    at = column // G.key_group * (2 * G.head_dim) + d
    scales = (pages + G.key_scales).to(tl.pointer_type(tl.float16))
    scale, low = tl.load(scales + at, mask=mask, other=0.0), tl.load(scales + at + G.head_dim, mask=mask, other=0.0)
    return code.to(tl.float32) * scale.to(tl.float32) + low.to(tl.float32)


@triton.jit
def _page_value(pages, column, mask, G: tl.constexpr):
    """Values of tokens in column [N, 1] of the pages at the addresses [N, 1], float32 [N, head_dim]; still rotated."""
    d = tl.arange(0, G.head_dim)[None, :]
    code = _code_at(pages + G.value_codes, column, d, G.tile_tokens, G.value_bits, mask).to(tl.float32)
    scales = (pages + G.value_scales).to(tl.pointer_type(tl.float16))
    if G.rotated:
        value = (code - 0.5 * ((1 << G.value_bits) - 1)) * tl.load(scales + column, mask=mask, other=0.0).to(tl.float32)
    else:
        at = d // G.value_group * (2 * G.tile_tokens) + column
        low = tl.load(scales + at + G.tile_tokens, mask=mask, other=0.0).to(tl.float32)
        value = code * tl.load(scales + at, mask=mask, other=0.0).to(tl.float32) + low
    return value


@triton.jit
def _stored_rows(
    cells, table, head, t, mask, stored, end, kept_row, kept_blocks, block_stride, head_stride, G: tl.constexpr
):
    """K and V of the tokens t [N] of a request with `stored` tokens, as stored, float32 [N, head_dim]."""
    in_tail = t >= stored // G.tile_tokens * G.tile_tokens
    is_sink = (t < G.sink_tokens) & (in_tail == 0)
    is_dense = in_tail | is_sink
    slots = slot_of(table, t, is_sink, head, mask & is_dense, block_stride, head_stride, G)
    in_page = mask & (is_dense == 0)
    tile = t // G.tile_tokens
    index = tile_index(tile, end, kept_row, kept_blocks, G)
    block = tl.load(table + index, mask=in_page, other=0).to(tl.int64)
    offset = block * block_stride + head * head_stride + tile % G.tiles_per_block * G.page_bytes
    pages, column, both = (cells + offset)[:, None], (t % G.tile_tokens)[:, None], in_page[:, None]
    key = dense_row(cells, slots, mask & is_dense, None, t, mask, 0, False, G) + _page_key(pages, column, both, G)
    value = dense_row(cells, slots, mask & is_dense, None, t, mask, 1, False, G) + _page_value(pages, column, both, G)
    return key, value


@triton.jit
def read_kernel(
    cells, block_stride, head_stride, table, stored, first, last, end, kept_row, kept_blocks, key, value,
    TOKENS: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """Program (token tile, kv_head)."""
    head = tl.program_id(1)
    t = first + tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    mask = t < last
    k, v = _stored_rows(
        cells, table, head, t, mask, stored, end, kept_row, kept_blocks, block_stride, head_stride, G
    )  # fmt: skip
    row = (head.to(tl.int64) * (last - first) + t - first) * G.head_dim
    at = row[:, None] + tl.arange(0, G.head_dim)[None, :]
    tl.store(key + at, k, mask=mask[:, None])
    tl.store(value + at, v, mask=mask[:, None])


@triton.jit
def _write_page(
    cells, table, number, kept_row, key, value, block_stride, head_stride, layer, num_layers, G: tl.constexpr
):
    """Encode kept page `number` of the request."""
    cell = number // G.tiles_per_block
    layer_cells = G.num_kv_heads * num_layers
    block = tl.load(table + kept_row + cell // layer_cells).to(tl.int64)
    in_layer = cell % layer_cells
    offset = block * block_stride + in_layer % G.num_kv_heads * head_stride
    offset += (in_layer // G.num_kv_heads - layer) * G.cell_bytes + number % G.tiles_per_block * G.page_bytes
    encode_page(cells + tl.multiple_of(offset, 16), key, value, 0, G)


@triton.jit
def _write_header(cells, table, head, end, first_page, num_tokens, block_stride, head_stride, G: tl.constexpr):
    block = tl.load(table).to(tl.int64)
    header = (cells + block * block_stride + head * head_stride).to(tl.pointer_type(tl.int32))
    tl.store(header, end)
    tl.store(header + 1, first_page)
    tl.store(header + 2, (num_tokens + G.tile_tokens - 1) // G.tile_tokens)
    tl.store(header + 3, num_tokens)


@triton.jit
def kept_kernel(
    cells, block_stride, head_stride, layer, num_layers, table, kept_row, end, heads, key, value, positions,
    G: tl.constexpr
):  # fmt: skip
    """Program (page, kv_head): the head's kept page, from rows given or, with `positions`, from the stored tokens.

    heads: int32 [num_kv_heads, 3], (first row, first page, tokens) of each head. A last page is filled with its last
    token.
    """
    page, head = tl.program_id(0), tl.program_id(1)
    first_row, first_page = tl.load(heads + 3 * head), tl.load(heads + 3 * head + 1)
    num_tokens = tl.load(heads + 3 * head + 2)
    if page == 0:
        _write_header(cells, table, head, end, first_page, num_tokens, block_stride, head_stride, G)
    if page * G.tile_tokens < num_tokens:
        row = first_row + tl.minimum(page * G.tile_tokens + tl.arange(0, G.tile_tokens), num_tokens - 1)
        if positions is not None:
            t = tl.load(positions + row).to(tl.int32)
            # Tiles up to `end` still lie where they lay before the eviction.
            k, v = _stored_rows(cells, table, head, t, row >= 0, end, 0, 0, 0, block_stride, head_stride, G)
        else:
            at = row.to(tl.int64)[:, None] * G.head_dim + tl.arange(0, G.head_dim)[None, :]
            k, v = tl.load(key + at), tl.load(value + at)
        _write_page(
            cells, table, first_page + page, kept_row, k, v, block_stride, head_stride, layer, num_layers, G
        )  # fmt: skip


def read(
    geometry: Geometry, cells: torch.Tensor, table: torch.Tensor, first: int, last: int, stored: int, kept: Kept
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [first, last) of one request as stored, float32 [num_kv_heads, last - first, head_dim]; V stays rotated.

    Args:
        cells: uint8, one layer's cells. table: int32, the request's row of blocks.
        stored: tokens stored of the request.
    """
    check_device(cells=cells, block_table_row=table)
    check_alignment(cells)
    shape = (geometry.num_kv_heads, last - first, geometry.head_dim)
    key = torch.empty(shape, dtype=torch.float32, device=cells.device)
    value = torch.empty_like(key)
    if last > first:
        grid = (triton.cdiv(last - first, READ_TOKENS), geometry.num_kv_heads)
        read_kernel[grid](
            cells, cells.stride(0), cells.stride(1), table, stored, first, last, *kept, key, value, READ_TOKENS,
            storage_geometry(geometry),
        )  # fmt: skip
    return key, value


def write(
    geometry: Geometry, cells: torch.Tensor, table: torch.Tensor, kept: Kept, headers: Sequence[Header],
    key: torch.Tensor, value: torch.Tensor
) -> None:  # fmt: skip
    """Write kept pages and headers from rows, float32 [all heads' tokens, head_dim] in the order of the heads.

    The value is rotated where the policy rotates.
    """
    _launch(geometry, cells, table, kept, headers, key.contiguous(), value.contiguous(), None)


def compact(
    geometry: Geometry, cells: torch.Tensor, table: torch.Tensor, kept: Kept, headers: Sequence[Header],
    positions: torch.Tensor
) -> None:  # fmt: skip
    """Write kept pages and headers from the stored tokens at `positions`, int64 [all heads' tokens], all below `end`.

    The row of blocks still shows the tiles that the kept pages replace; the kept blocks are others, since the tiles are
    read while the pages are written.
    """
    _launch(geometry, cells, table, kept, headers, None, None, positions)


def _launch(
    geometry: Geometry, cells: torch.Tensor, table: torch.Tensor, kept: Kept, headers: Sequence[Header],
    key: torch.Tensor | None, value: torch.Tensor | None, positions: torch.Tensor | None
) -> None:  # fmt: skip
    check_device(cells=cells, block_table_row=table, key=key, value=value, positions=positions)
    check_alignment(cells)
    rows, first_row = [], 0
    for header in headers:
        rows.append((first_row, header.first_page, header.num_tokens))
        first_row += header.num_tokens
    heads = torch.tensor(rows, dtype=torch.int32).to(cells.device)
    num_layers = cells.stride(1) // geometry.cell_bytes
    layer = cells.storage_offset() % cells.stride(1) // geometry.cell_bytes
    pages = max(1, *(header.num_pages for header in headers))
    kept_kernel[(pages, geometry.num_kv_heads)](
        cells, cells.stride(0), cells.stride(1), layer, num_layers, table, kept.row, kept.end, heads, key, value,
        positions, storage_geometry(geometry), num_warps=8,
    )  # fmt: skip
