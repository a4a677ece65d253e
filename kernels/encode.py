"""Writing one sealed page, and dense slots: the device functions of `encode_page` (kvserve/codecs/format.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from kvserve.kernels.codecs.chain import encode_rows


@triton.jit
def store_slots(cells, slots, mask, key, value, G: tl.constexpr):
    """Write K and V [N, block_dim] to the dense slots at the offsets [N]."""
    d = tl.arange(0, G.block_dim)
    at = (cells + slots[:, None]).to(tl.pointer_type(G.slot_dtype)) + d[None, :]
    both = mask[:, None] & (d < G.head_dim)[None, :]
    tl.store(at, key.to(G.slot_dtype), mask=both)
    tl.store(at + G.head_dim, value.to(G.slot_dtype), mask=both)


@triton.jit
def encode_page(page, key, value, masses, first_counted, first_position, head, codec_tables, G: tl.constexpr):
    """Seal one tile: key and value float32 [tile_tokens, block_dim], the value rotated where the policy rotates.

    Tokens before first_counted define no ranges that tokens share. What lies between the sections becomes zero.

    Args:
        masses: float32 [tile_tokens], log-masses of the tokens; None: 0 for all. Only where pages have them.
        first_position: position in the sequence of the tile's first token.
        codec_tables: CodecTables.
    """
    if G.dense_pages:
        slots = tl.arange(0, G.tile_tokens) * G.slot_bytes
        store_slots(page, slots, slots >= 0, key, value, G)
    else:
        encode_rows(page, key, first_counted, first_position, head, codec_tables.key, G.key, G)
        encode_rows(page, value, first_counted, first_position, head, codec_tables.value, G.value, G)
        if G.mass:
            at = (page + G.mass).to(tl.pointer_type(tl.float32)) + tl.arange(0, G.tile_tokens)
            tl.store(at, tl.zeros([G.tile_tokens], tl.float32) if masses is None else masses)
        GAPS: tl.constexpr = G.num_gaps
        pad = tl.arange(0, 256)
        for i in tl.static_range(GAPS):
            tl.store(page + G.gaps[i][0] + pad, tl.zeros([256], tl.uint8), mask=pad < G.gaps[i][1])
