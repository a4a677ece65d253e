"""Where things lie in the arena and how a page is read: the device functions that all kernels share.

Byte layout: kvserve/pages/layout.py (arena, rows of blocks), pages/reference.py (codes inside a page), pages/kept.py
(kept pages). `G` is a Geometry. Offsets into the arena are int64 bytes from `cells`, the layer's first cell.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter computes with the bits of bfloat16 as if they were integers: there, dots run in float32 on the rounded
# operands, and codes become float32 first.
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b):
    """a @ b, accumulated in float32; float32 operands are multiplied as such."""
    if INTERPRETED:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        result = tl.dot(a, b, input_precision="ieee")
    return result


@triton.jit
def request_of(r, query_start_loc, seq_lens):
    """First query row, tokens stored before this step, and tokens with it, of request r."""
    first_row = tl.load(query_start_loc + r)
    seq_len = tl.load(seq_lens + r)
    return first_row, seq_len - (tl.load(query_start_loc + r + 1) - first_row), seq_len


@triton.jit
def kept_of(r, table, kept_ends, kept_starts, kept_blocks):
    """(end, address of its first kept block id) of request r (KeptTable); end 0 where it was not evicted."""
    if kept_ends is None:
        return 0, table
    else:
        return tl.load(kept_ends + r), kept_blocks + tl.load(kept_starts + r)


@triton.jit
def kept_header(cells, table, head, block_stride, head_stride, end):
    """(first kept page, kept tokens) of one KV head; none where end is 0 (row[0] may then be no block at all)."""
    block = tl.load(table, mask=end > 0, other=0).to(tl.int64)
    header = (cells + block * block_stride + head * head_stride).to(tl.pointer_type(tl.int32))
    first_page = tl.load(header + 1, mask=end > 0, other=0)
    return first_page, tl.load(header + 3, mask=end > 0, other=0)


@triton.jit
def tile_index(tile, G: tl.constexpr):
    """Index in a request's row of the block of a sealed tile."""
    block = tile // G.tiles_per_block
    return G.first_tile_row + block + tl.where(block > 0, G.sink_blocks, 0)


@triton.jit
def tile_page_at(table, tile, head, mask, block_stride, head_stride, G: tl.constexpr):
    """Offset of the page of a sealed tile."""
    block = tl.load(table + tile_index(tile, G), mask=mask, other=0).to(tl.int64)
    offset = block * block_stride + head * head_stride + tile % G.tiles_per_block * G.page_bytes
    return tl.multiple_of(offset, 16)


@triton.jit
def kept_place(page, head_stride, layer, num_layers, G: tl.constexpr):
    """(index of its block among the kept blocks, offset in that block from this layer's first cell) of a kept page."""
    cell = page // G.tiles_per_block
    layer_cells = G.num_kv_heads * num_layers
    in_block = cell % layer_cells
    offset = (in_block % G.num_kv_heads).to(tl.int64) * head_stride
    offset += (in_block // G.num_kv_heads - layer) * G.cell_bytes + page % G.tiles_per_block * G.page_bytes
    return cell // layer_cells, offset


@triton.jit
def kept_page_at(blocks, page, mask, block_stride, head_stride, layer, num_layers, G: tl.constexpr):
    """Offset of kept page number `page` of the request whose kept block ids are at `blocks`."""
    index, offset = kept_place(page, head_stride, layer, num_layers, G)
    return tl.multiple_of(tl.load(blocks + index, mask=mask, other=0).to(tl.int64) * block_stride + offset, 16)


@triton.jit
def page_of_chunk(
    table, blocks, chunk, kept_chunks, first_tile, first_page, head, block_stride, head_stride, layer, num_layers,
    G: tl.constexpr
):  # fmt: skip
    """Offset of the page that holds a chunk: first a head's kept chunks, then those of the tiles from first_tile on."""
    is_kept = chunk < kept_chunks
    tile = first_tile + (chunk - kept_chunks) // G.chunks_per_tile
    index, kept_offset = kept_place(first_page + chunk // G.chunks_per_tile, head_stride, layer, num_layers, G)
    block = tl.load(tl.where(is_kept, blocks + index, table + tile_index(tile, G))).to(tl.int64)
    tile_offset = head.to(tl.int64) * head_stride + tile % G.tiles_per_block * G.page_bytes
    return tl.multiple_of(block * block_stride + tl.where(is_kept, kept_offset, tile_offset), 16)


@triton.jit
def slot_of(table, t, is_sink, head, mask, block_stride, head_stride, G: tl.constexpr):
    """Offsets of the dense slots of tokens t [N] (K row, then V row): in the sink blocks where is_sink, else the tail.

    Dense policy: the slot of token t. Tokens outside `mask` have offset 0.
    """
    if G.dense:
        index = t // G.block_size
        slot = t % G.block_size
    else:
        slot_in_part = tl.where(is_sink, t, t % G.tile_tokens)
        index = tl.where(is_sink, G.first_tile_row + 1, G.state_blocks) + slot_in_part // G.slots_per_cell
        slot = slot_in_part % G.slots_per_cell
    block = tl.load(table + index, mask=mask, other=0).to(tl.int64)
    return tl.multiple_of(tl.where(mask, block * block_stride + head * head_stride + slot * G.slot_bytes, 0), 16)


@triton.jit
def load_codes(
    section, row0, column0, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALL_ROWS: tl.constexpr,
    ALL_COLUMNS: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """Codes [row0.. + ROWS, column0.. + COLUMNS] of a matrix of ALL_ROWS x ALL_COLUMNS, int32 [ROWS, COLUMNS].

    A 32-bit word holds four rows of 8 / BITS columns that lie 16 apart (`pack_codes`); column0 starts a block of
    128 / BITS columns. Outside the matrix rows are 0, and columns any code.
    """
    PLANES: tl.constexpr = 8 // BITS
    BLOCKS: tl.constexpr = COLUMNS // (16 * PLANES)
    quad = (row0 // 4 + tl.arange(0, ROWS // 4))[:, None, None]
    block = (column0 // (16 * PLANES) + tl.arange(0, BLOCKS))[None, :, None]
    lane = tl.arange(0, 16)[None, None, :]
    at = section.to(tl.pointer_type(tl.int32)) + block * (ALL_ROWS * 4) + quad * 16 + lane
    if (ROWS <= ALL_ROWS) & (COLUMNS <= ALL_COLUMNS):
        words = tl.load(at)
    else:
        inside = (quad < ALL_ROWS // 4) & (block * (16 * PLANES) < ALL_COLUMNS)
        if ALL_COLUMNS % (16 * PLANES):
            lower = (block == ALL_COLUMNS // (16 * PLANES)) & (quad >= ALL_ROWS // 8)
            words = tl.load(at - tl.where(lower, ALL_ROWS * 2, 0), mask=inside, other=0)
            words = tl.where(lower, words >> 4, words)  # a folded block has the lower rows in its right half
        else:
            words = tl.load(at, mask=inside, other=0)
    shift = 8 * tl.arange(0, 4)[:, None] + BITS * tl.arange(0, PLANES)[None, :]
    codes = (words[:, None, :, None, :] >> shift[None, :, None, :, None]) & ((1 << BITS) - 1)
    return tl.reshape(codes, [ROWS, COLUMNS])


@triton.jit
def as_float(codes, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Codes as floating-point numbers, exactly.

    A code in the low mantissa bits of a power of two is that power plus the code: an OR and a subtraction, where a GPU
    converts integers at a quarter of that rate or less.
    """
    if DTYPE == tl.float16:
        result = (codes | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1024.0
    elif DTYPE == tl.bfloat16 and BITS < 8 and not INTERPRETED:
        result = (codes | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True) - 128.0
    else:
        result = ((codes | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0).to(DTYPE)
    return result


@triton.jit
def halves(page, offset, index):
    """Float16 numbers at `offset` of a page, as float32."""
    return tl.load((page + offset).to(tl.pointer_type(tl.float16)) + index).to(tl.float32)


@triton.jit
def channel_halves(page, offset, d, G: tl.constexpr):
    """Float16 numbers of the channels d [block_dim] at `offset` of a page, as float32; 0 from head_dim on."""
    at = (page + offset).to(tl.pointer_type(tl.float16)) + d
    if G.block_dim == G.head_dim:
        result = tl.load(at).to(tl.float32)
    else:
        result = tl.load(at, mask=d < G.head_dim, other=0.0).to(tl.float32)
    return result


@triton.jit
def sealed_scores(query, query_rows, row_mask, page, column0, CHUNK: tl.constexpr, G: tl.constexpr):
    """query [M, block_dim] times the keys of one chunk, float32 [M, CHUNK]."""
    if G.dense_pages:
        slots = (column0 + tl.arange(0, CHUNK)) * G.slot_bytes
        key = dense_row(page, slots, slots >= 0, None, slots, slots >= 0, 0, True, G)
        scores = dot(query, key.to(query.dtype))
    else:
        scores = _coded_scores(query, query_rows, row_mask, page, column0, CHUNK, G)
    return scores


@triton.jit
def _coded_scores(query, query_rows, row_mask, page, column0, CHUNK: tl.constexpr, G: tl.constexpr):
    """`sealed_scores` of coded keys.

    The scale of each channel goes into the query, so that codes enter the dot as integers; query_rows [M] are the
    addresses of the rows, from which boosted channels are gathered again.
    """
    D: tl.constexpr = G.head_dim
    DTYPE: tl.constexpr = query.dtype
    GROUPS: tl.constexpr = (CHUNK + G.key_group - 1) // G.key_group
    d = tl.arange(0, G.block_dim)
    codes = load_codes(page + G.key_codes, 0, column0, G.block_dim, CHUNK, D, G.tile_tokens, G.key_bits)
    codes = as_float(codes, G.key_bits, DTYPE)
    wide = query.to(tl.float32)
    scores = tl.zeros([query.shape[0], CHUNK], tl.float32)
    for g in tl.static_range(GROUPS):
        first = (column0 // G.key_group + g) * 2 * D
        scale = channel_halves(page, G.key_scales + first * 2, d, G)
        low = channel_halves(page, G.key_scales + (first + D) * 2, d, G)
        peak = tl.max(scale, 0) if tl.float16 == DTYPE else 1.0  # float16 has no room for query times scale
        part = peak * dot((wide * (scale / peak)[None, :]).to(DTYPE), codes)
        part += tl.sum(wide * low[None, :], 1)[:, None]
        if G.boost_channels:
            part += _boost_scores(query_rows, row_mask, page, column0, first, peak, CHUNK, DTYPE, G)
        scores = tl.where((tl.arange(0, CHUNK) // G.key_group == g)[None, :], part, scores) if GROUPS > 1 else part
    return scores


@triton.jit
def _boost_scores(
    query_rows, row_mask, page, column0, first, peak, CHUNK: tl.constexpr, DTYPE: tl.constexpr, G: tl.constexpr
):
    """What the two upper bits of the boosted channels add to the scores."""
    i = tl.arange(0, G.block_boost)
    boosted = row_mask[:, None]
    if G.block_boost == G.boost_channels:
        index = tl.load(page + G.key_boost_index + i).to(tl.int32)
    else:
        index = tl.load(page + G.key_boost_index + i, mask=i < G.boost_channels, other=0).to(tl.int32)
        boosted &= (i < G.boost_channels)[None, :]
    query = tl.load(query_rows[:, None] + index[None, :], mask=boosted, other=0.0).to(tl.float32)
    scale = halves(page, G.key_scales, first + index) / peak
    codes = load_codes(
        page + G.key_boost_codes, 0, column0, G.block_boost, CHUNK, G.boost_channels, G.tile_tokens, 2
    )  # fmt: skip
    return 4.0 * peak * dot((query * scale[None, :]).to(DTYPE), as_float(codes, 2, DTYPE))


@triton.jit
def sealed_values(weights, used, page, row0, CHUNK: tl.constexpr, DTYPE: tl.constexpr, G: tl.constexpr):
    """weights [M, CHUNK] times the values of one chunk, float32 [M, block_dim]; rotated values stay so.

    Columns from head_dim on are finite, otherwise anything: `store_rows` leaves them out, rotations do not mix them in.
    Only the columns in `used` [CHUNK] exist: what a page holds in the others never enters.
    """
    if G.dense_pages:
        slots = (row0 + tl.arange(0, CHUNK)) * G.slot_bytes
        value = dense_row(page, slots, used, None, slots, used, 1, False, G)
        result = dot(weights.to(DTYPE), value.to(DTYPE))
    else:
        result = _coded_values(weights, used, page, row0, CHUNK, DTYPE, G)
    return result


@triton.jit
def _coded_values(weights, used, page, row0, CHUNK: tl.constexpr, DTYPE: tl.constexpr, G: tl.constexpr):
    """`sealed_values` of coded values; the scale of each token goes into its weight where a token has one scale."""
    D: tl.constexpr = G.block_dim
    T: tl.constexpr = G.tile_tokens
    token = row0 + tl.arange(0, CHUNK)
    codes = load_codes(page + G.value_codes, row0, 0, CHUNK, D, T, G.head_dim, G.value_bits)
    if G.value_group < G.head_dim:
        NUM_GROUPS: tl.constexpr = D // G.value_group
        group = tl.arange(0, NUM_GROUPS)[None, :]
        at = (page + G.value_scales).to(tl.pointer_type(tl.float16)) + group * (2 * T) + token[:, None]
        exist = group < G.head_dim // G.value_group
        scales = tl.where(used[:, None], tl.load(at, mask=exist, other=0.0).to(tl.float32), 0.0)
        lows = tl.where(used[:, None], tl.load(at + T, mask=exist, other=0.0).to(tl.float32), 0.0)
        grouped = tl.reshape(as_float(codes, G.value_bits, tl.float32), [CHUNK, NUM_GROUPS, G.value_group])
        value = tl.reshape(grouped * scales[:, :, None] + lows[:, :, None], [CHUNK, D])
        result = dot(weights.to(DTYPE), value.to(DTYPE))
    else:
        scale = tl.where(used, halves(page, G.value_scales, token), 0.0)
        peak = tl.maximum(tl.max(scale, 0), 1e-30) if tl.float16 == DTYPE else 1.0
        scaled = (weights * (scale / peak)[None, :]).to(DTYPE)
        result = dot(scaled, as_float(codes, G.value_bits, DTYPE))
        if G.rotated:
            result = peak * (result - 0.5 * ((1 << G.value_bits) - 1) * tl.sum(scaled.to(tl.float32), 1)[:, None])
        else:
            low = tl.where(used, halves(page, G.value_scales, T + token), 0.0)
            result = peak * result + tl.sum(weights * low[None, :], 1)[:, None]
    return result


@triton.jit
def dense_row(
    cells, slots, stored, staged, staged_rows, new, part: tl.constexpr, BY_COLUMN: tl.constexpr, G: tl.constexpr
):
    """K (part 0) or V (part 1) of N tokens, [N, block_dim], or [block_dim, N] BY_COLUMN; zero where neither.

    Float32, or the dtype of the slots where no row is staged (staged None, or dense policy).

    Args:
        slots: offsets [N] of the slots, read where `stored`.
        staged: float32 [num_tokens, num_kv_heads, 2, head_dim], or None.
        staged_rows: rows [N] of it (token * num_kv_heads + head), read where `new`.
    """
    d = tl.arange(0, G.block_dim)
    if BY_COLUMN:
        d, slots, staged_rows = d[:, None], slots[None, :], staged_rows[None, :]
        stored, new = stored[None, :] & (d < G.head_dim), new[None, :] & (d < G.head_dim)
    else:
        d, slots, staged_rows = d[None, :], slots[:, None], staged_rows[:, None]
        stored, new = stored[:, None] & (d < G.head_dim), new[:, None] & (d < G.head_dim)
    at = (cells + slots).to(tl.pointer_type(G.slot_dtype)) + (part * G.head_dim + d)
    old = tl.load(at, mask=stored, other=0.0)
    if (not G.dense) and (staged is not None):
        old = old.to(tl.float32)
        old += tl.load(staged + (staged_rows * 2 + part).to(tl.int64) * G.head_dim + d, mask=new, other=0.0)
    return old


@triton.jit
def rotated_columns(rows, first, COLUMNS: tl.constexpr, EXACT: tl.constexpr, G: tl.constexpr):
    """Columns [first, first + COLUMNS) of rows [M, block_dim] times the rotation (`hadamard`), float32 [M, COLUMNS].

    16-bit rows, and the two bfloat16 halves of float32 rows, run on tensor cores; float32 rows are only multiplied as
    such where EXACT.
    """
    d, column = tl.arange(0, G.block_dim)[:, None], (first + tl.arange(0, COLUMNS))[None, :]
    x = d & column & (G.rotation_dim - 1)
    x ^= x >> 4
    x ^= x >> 2
    x ^= x >> 1
    signs = (1 - 2 * (x & 1)).to(tl.float32)
    if G.rotation_dim < G.block_dim:
        signs = tl.where(d // G.rotation_dim == column // G.rotation_dim, signs, 0.0)
    if rows.dtype != tl.float32:
        sums = dot(rows, signs.to(rows.dtype))
    elif EXACT:
        sums = dot(rows, signs)
    else:
        upper = rows.to(tl.bfloat16)
        lower = (rows - upper.to(tl.float32)).to(tl.bfloat16)
        sums = dot(upper, signs.to(tl.bfloat16)) + dot(lower, signs.to(tl.bfloat16))
    return sums * (G.rotation_dim**-0.5)
