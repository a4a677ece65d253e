"""The query rows of the window before a request's next cut, remembered in its state blocks.

Decode steps bring one query each, but a scorer may need the last 32. The row of the token at `window_start + i` is
remembered as number i, at `PageLayout.query_place(i)` of every (state block, KV head) cell of every layer, in the dense
dtype: [query head of the group][head_dim].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from kvserve.attention.base import Batch
from kvserve.pages.layout import PageLayout


class Rows(NamedTuple):
    """Query rows of a batch and where they are remembered: int64 indices, made once for all layers of a step."""

    rows: torch.Tensor  # [n], into the batch
    blocks: torch.Tensor  # [n], block ids
    offsets: torch.Tensor  # [n], elements of the dense dtype inside the cell


def rows_to_remember(layout: PageLayout, batch: Batch, window_starts: Sequence[tuple[int, int]]) -> Rows | None:
    """The rows of this step that lie in a window; `window_starts`: (request, first token of the window)."""
    places: list[tuple[int, int, int]] = []
    if not window_starts:
        return None
    starts, lengths = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
    blocks = batch.block_table[:, : layout.state_blocks].tolist()
    for request, start in window_starts:
        (first, last), seq_len = starts[request : request + 2], lengths[request]
        for position in range(max(seq_len - (last - first), start), seq_len):
            block, offset = layout.query_place(position - start)
            itemsize = layout.dense_dtype.itemsize
            places.append((last - seq_len + position, blocks[request][block], offset // itemsize))
    return Rows(*torch.tensor(places).to(batch.block_table.device).unbind(1)) if places else None


def remember(layout: PageLayout, cells: torch.Tensor, rows: Rows, query: torch.Tensor) -> None:
    """Store query rows, [num_tokens, num_heads, head_dim], in one layer's `cells`."""
    num_kv_heads = cells.shape[1]
    grouped = query[rows.rows].unflatten(1, (num_kv_heads, -1)).flatten(2)  # [n, kv_heads, group * head_dim]
    flat, index = _flat(layout, cells), _index(layout, cells, rows.blocks, rows.offsets)
    flat[index.flatten()] = grouped.to(flat.dtype).flatten()


def recall(layout: PageLayout, cells: torch.Tensor, row: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` remembered rows of one request, float32 [count, num_heads, head_dim].

    Args:
        row: int32 [>= state blocks], the request's row of the block table.
    """
    places = torch.tensor([layout.query_place(i) for i in range(count)]).to(cells.device)
    index = _index(layout, cells, row[places[:, 0]].long(), places[:, 1] // layout.dense_dtype.itemsize)
    return _flat(layout, cells)[index].float().unflatten(2, (layout.query_group, layout.head_dim)).flatten(1, 2)


def _flat(layout: PageLayout, cells: torch.Tensor) -> torch.Tensor:
    """All elements from the layer's first cell on, of the dense dtype."""
    size = cells.stride(0) * (cells.shape[0] - 1) + cells.stride(1) * (cells.shape[1] - 1) + layout.cell_bytes
    return cells.as_strided((size,), (1,)).view(layout.dense_dtype)


def _index(layout: PageLayout, cells: torch.Tensor, blocks: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Elements of one remembered row of every place and KV head, [n, kv_heads, group * head_dim]."""
    itemsize = layout.dense_dtype.itemsize
    heads = torch.arange(cells.shape[1], device=cells.device) * (cells.stride(1) // itemsize)
    start = blocks * (cells.stride(0) // itemsize) + offsets
    elements = torch.arange(layout.query_group * layout.head_dim, device=cells.device)
    return start[:, None, None] + heads[:, None] + elements
