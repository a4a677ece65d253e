"""PyTorch reference of the sealed page: the definition that every kernel is tested against.

How its parts are written is said by its codecs (kvserve/codecs), where they lie by its TileFormat. A dense page is its
tokens' dense slots one after the other, [tile_tokens][K row, V row][head_dim] of the model's dtype.
"""

from __future__ import annotations

import torch

from kvserve.codecs.base import FLOAT16_MAX
from kvserve.codecs.tile import Tables, Tile
from kvserve.pages.head_dims import rotation_dim
from kvserve.pages.layout import PageLayout


def beyond_range(rows: torch.Tensor) -> torch.Tensor:
    """How many rows [..., head_dim] float16 has no room for: any number beyond +-FLOAT16_MAX, but not NaN. int64 [].

    Such a row is stored as the nearest that there is room for. What it then answers is finite and wrong, so kernels
    count rows as they are staged, the values rotated, wherever pages have scales or slots are float16.
    """
    return (rows.abs() > FLOAT16_MAX).any(-1).sum()


def hadamard(head_dim: int) -> torch.Tensor:
    """Orthonormal rotation of a head, float32 [head_dim, head_dim]; symmetric, its own inverse.

    Sylvester's matrix; where head_dim is no power of two, of the largest one that divides it, in equal blocks along the
    diagonal.
    """
    size = rotation_dim(head_dim)
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.block_diag(*[matrix / size**0.5] * (head_dim // size))


def encode_page(
    key: torch.Tensor, value: torch.Tensor, layout: PageLayout, first_counted: int = 0, first_position: int = 0,
    tables: Tables | None = None,
) -> torch.Tensor:  # fmt: skip
    """Seal one tile of one KV head.

    Args:
        key, value: float32 [tile_tokens, head_dim]; `value` is already rotated where the layout rotates.
        first_counted: tokens before it (dense sinks) do not define ranges that tokens share.
        first_position: of the first token, in its sequence.
        tables: what the KV head has of the layer's tables (codecs.layer_tables.tables_of_head).

    Returns:
        uint8 [layout.tile_format.tile_bytes]; padding is zero.
    """
    keys, values = (Tile.of(rows, first_counted, first_position) for rows in (key, value))
    return layout.tile_format.encode_tile(keys, values, tables)


def decode_page(
    page: torch.Tensor, layout: PageLayout, first_position: int = 0, tables: Tables | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read one sealed page back: (key, value), float32 [tile_tokens, head_dim]; value stays rotated."""
    positions = first_position + torch.arange(layout.tile_tokens)
    return layout.tile_format.decode_tile(page, positions, tables)
