"""Packed codes and float16 numbers of a page (kvserve/codecs/packing.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from kvserve.kernels.pages import INTERPRETED


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
def chunk_codes(section, column0, CHUNK: tl.constexpr, BITS: tl.constexpr, OF_KEYS: tl.constexpr, G: tl.constexpr):
    """Codes of the tokens [column0, column0 + CHUNK) of a tile, int32 [CHUNK, block_dim]; any from head_dim on."""
    if BITS == 1:
        codes = _chunk_bits(section, column0, CHUNK, OF_KEYS, G)
    elif OF_KEYS:
        codes = tl.trans(load_codes(section, 0, column0, G.block_dim, CHUNK, G.head_dim, G.tile_tokens, BITS))
    else:
        codes = load_codes(section, column0, 0, CHUNK, G.block_dim, G.tile_tokens, G.head_dim, BITS)
    return codes.to(tl.uint8).to(tl.int32)  # a thread may need other codes than it has loaded: bytes are moved for less


@triton.jit
def _chunk_bits(section, column0, CHUNK: tl.constexpr, OF_KEYS: tl.constexpr, G: tl.constexpr):
    """`chunk_codes` of 1-bit codes: a chunk may be half a block, so each code is looked up by itself."""
    token, d = (column0 + tl.arange(0, CHUNK))[:, None], tl.arange(0, G.block_dim)[None, :]
    if OF_KEYS:
        bits = code_at(section, d, token, G.head_dim, G.tile_tokens, 1, d < G.head_dim)
    else:
        bits = code_at(section, token, d, G.tile_tokens, G.head_dim, 1, d < G.head_dim)
    return bits


@triton.jit
def code_at(section, row, column, ALL_ROWS: tl.constexpr, ALL_COLUMNS: tl.constexpr, BITS: tl.constexpr, mask):
    """One code per element of row and column, which broadcast; int32, 0 outside the mask."""
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
def store_codes(section, codes, BITS: tl.constexpr, OF_KEYS: tl.constexpr, G: tl.constexpr):
    """Pack int32 codes [tile_tokens, block_dim] as `pack_tile` does."""
    if OF_KEYS:
        _store_key_codes(section, codes, BITS, G)
    else:
        _store_value_codes(section, tl.where((tl.arange(0, G.block_dim) < G.head_dim)[None, :], codes, 0), BITS, G)


@triton.jit
def _store_key_codes(section, codes, BITS: tl.constexpr, G: tl.constexpr):
    """Channels are rows, tokens are columns."""
    PLANES: tl.constexpr = 8 // BITS
    if G.tile_tokens % (16 * PLANES):
        codes = tl.reshape(tl.permute(tl.join(codes, tl.zeros_like(codes)), (2, 0, 1)), [16 * PLANES, G.block_dim])
    BLOCKS: tl.constexpr = codes.shape[0] // (16 * PLANES)
    row_shift, plane_shift = 8 * tl.arange(0, 4), BITS * tl.arange(0, PLANES)
    block, lane = tl.arange(0, BLOCKS)[:, None, None], tl.arange(0, 16)[None, :, None]
    quad = tl.arange(0, G.block_dim // 4)[None, None, :]
    split = tl.reshape(codes, [BLOCKS, PLANES, 16, G.block_dim // 4, 4])
    words = tl.sum(tl.sum(split << row_shift[None, None, None, None, :], 4) << plane_shift[None, :, None, None], 1)
    at = block * (G.head_dim * 4) + quad * 16 + lane
    exist = quad < G.head_dim // 4
    if G.tile_tokens % (16 * PLANES):
        # The only block is half empty: the lower channels go into its right half.
        lower = tl.minimum(quad + G.head_dim // 8, G.block_dim // 4 - 1)
        words |= tl.gather(words, tl.broadcast_to(lower, [1, 16, G.block_dim // 4]), 2) << 4
        exist = quad < G.head_dim // 8
    tl.store(section.to(tl.pointer_type(tl.int32)) + at, words, mask=exist)


@triton.jit
def _store_value_codes(section, codes, BITS: tl.constexpr, G: tl.constexpr):
    """Tokens are rows, channels are columns; codes are 0 from head_dim on."""
    PLANES: tl.constexpr = 8 // BITS
    WIDTH: tl.constexpr = 16 * PLANES
    if G.block_dim < WIDTH:
        codes = tl.reshape(tl.permute(tl.join(codes, tl.zeros_like(codes)), (0, 2, 1)), [G.tile_tokens, WIDTH])
    BLOCKS: tl.constexpr = codes.shape[1] // WIDTH
    QUADS: tl.constexpr = G.tile_tokens // 4
    row_shift, plane_shift = 8 * tl.arange(0, 4), BITS * tl.arange(0, PLANES)
    split = tl.reshape(codes, [QUADS, 4, BLOCKS, PLANES, 16])
    words = tl.sum(tl.sum(split << plane_shift[None, None, None, :, None], 3) << row_shift[None, :, None, None], 1)
    quad, lane = tl.arange(0, QUADS)[:, None, None], tl.arange(0, 16)[None, None, :]
    block = tl.arange(0, BLOCKS)[None, :, None]
    to = section.to(tl.pointer_type(tl.int32))
    exist = block < G.head_dim // WIDTH
    tl.store(to + block * (QUADS * 16) + quad * 16 + lane, words, mask=exist)
    if G.head_dim % WIDTH:
        last: tl.constexpr = G.head_dim // WIDTH
        halves = tl.reshape(tl.sum(tl.where(block == last, words, 0), 1), [2, QUADS // 2, 16])
        folded = tl.sum(halves << (4 * tl.arange(0, 2))[:, None, None], 0)
        quad = tl.arange(0, QUADS // 2)[:, None]
        tl.store(to + last * (QUADS * 16) + quad * 16 + tl.arange(0, 16)[None, :], folded)
