"""What every kernel knows about a layer at compile time, and what a launch needs to know about its arena and batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

from kvserve.codecs.format import MASS_BYTES, TileFormat
from kvserve.codecs.layer_tables import LayerTables, table_specs
from kvserve.codecs.tile import Half
from kvserve.kernels.codecs.chain import FIELDS, NO_TABLES, CodecTables, HalfFormat, HalfTables
from kvserve.pages.head_dims import rotation_dim
from kvserve.pages.kept import strip_offset
from kvserve.pages.layout import PageLayout

if TYPE_CHECKING:
    from kvserve.attention.base import Batch, LayerSpec

CHUNK_TOKENS = 64  # tokens of one step of an attention loop; every tile is a whole number of them
MIN_DOT_ROWS = 16  # least M of tl.dot
ALIGNMENT_BYTES = 16
LOG2_E = 1.4426950408889634
TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Geometry(NamedTuple):
    """A PageLayout and a LayerSpec as compile-time constants; a field that the policy does not have is 0, or None.

    Kernels take it as one `tl.constexpr`. `dense` marks the dense policy: cells hold slots only, and of the fields
    after `slot_bytes` none is used. `dense_pages` marks pages that are slots: of the fields after `page_bytes` none is
    used.
    """

    head_dim: int
    block_dim: int  # head_dim, rounded up to a power of two
    rotation_dim: int  # channels that a rotation mixes
    num_kv_heads: int
    group: int
    group_rows: int  # rows of a dot that takes the query heads of one KV head: group, rounded up
    sliding_window: int
    soft_cap: float | None  # of logits in base 2
    dense: bool
    block_size: int
    slot_dtype: Any  # tl.dtype of dense slots
    slot_bytes: int
    tile_tokens: int = 0
    chunks_per_tile: int = 0
    tiles_per_block: int = 0
    slots_per_cell: int = 0
    state_blocks: int = 0
    tail_slots: int = 0
    draft_tokens: int = 0
    first_tile_row: int = 0
    sink_blocks: int = 0
    sink_tokens: int = 0
    dense_pages: bool = False
    page_bytes: int = 0  # of a tile
    kept_page_bytes: int = 0
    tiles_per_page: int = 1  # of a kept page
    key: HalfFormat | None = None
    value: HalfFormat | None = None
    integer: bool = True  # no half of a page is decoded to rows, which takes more room
    rotated: bool = False
    saturates: bool = False  # float16 numbers are stored, so that rows may lie beyond its range
    mass: int = 0  # offset in a page of its log-masses, float32 [tile_tokens]; 0: it has none
    gaps: tuple[tuple[int, int], ...] = ()  # (offset, bytes) of what lies between the sections of a page
    num_gaps: int = 0
    other: Geometry | None = None  # of kept tiles in format 1, where they have a format beside this one


def formats_of(geometry: Geometry) -> tuple[Geometry, ...]:
    """The geometry of kept tiles in each format."""
    return (geometry,) if geometry.other is None else (geometry, geometry.other)


def storage_geometry(geometry: Geometry) -> Geometry:
    """The constants of kernels that see no query: the same, and so compiled once, for every group, window and cap."""
    return geometry._replace(group=1, group_rows=MIN_DOT_ROWS, sliding_window=0, soft_cap=None, other=None)


def geometry_of(layout: PageLayout, spec: LayerSpec) -> Geometry:
    """The constants of one attention layer.

    Raises:
        ValueError: a size that the kernels do not cover.
    """
    group_rows = max(MIN_DOT_ROWS, triton.next_power_of_2(spec.group))
    common = Geometry(
        head_dim=layout.head_dim,
        block_dim=triton.next_power_of_2(layout.head_dim),
        rotation_dim=rotation_dim(layout.head_dim),
        num_kv_heads=spec.num_kv_heads,
        group=spec.group,
        group_rows=group_rows,
        sliding_window=spec.sliding_window or 0,
        soft_cap=None if spec.soft_cap is None else spec.soft_cap * LOG2_E,
        dense=not layout.has_pages,
        block_size=layout.block_size,
        slot_dtype=TRITON_DTYPES[layout.dense_dtype],
        slot_bytes=layout.slot_bytes,
        saturates=layout.saturates,
    )
    tile_format = layout.tile_format
    if not layout.has_pages:
        return common
    if layout.tile_tokens % CHUNK_TOKENS:
        raise ValueError(f"tile_tokens must be a multiple of {CHUNK_TOKENS}, got {layout.tile_tokens}")
    names = (
        "tile_tokens",
        "tiles_per_block",
        "slots_per_cell",
        "state_blocks",
        "tail_slots",
        "draft_tokens",
        "sink_blocks",
    )
    paged = common._replace(
        **{name: getattr(layout, name) for name in names},
        chunks_per_tile=layout.tile_tokens // CHUNK_TOKENS,
        first_tile_row=layout.tile_row(0),
        sink_tokens=layout.policy.sink_tokens,
        dense_pages=layout.policy.dense_pages,
        page_bytes=tile_format.tile_bytes,
        kept_page_bytes=layout.kept_page_bytes,
        tiles_per_page=layout.tiles_per_page(),
    )
    if tile_format.key is None:
        return paged
    if layout.state_blocks and tile_format.key.needs_positions:
        raise ValueError(
            f"keys of {tile_format.key.name} are read with their positions, which the pages of evicted requests do not "
            "keep; leave out eviction, or choose another codec"
        )
    if len(layout.formats) > 2:
        raise ValueError(f"the GPU kernels read kept tokens in two formats, the policy has {len(layout.formats)}")
    first, *others = (_of_format(paged, layout, number) for number in range(len(layout.formats)))
    return first._replace(other=others[0] if others else None)


def _of_format(paged: Geometry, layout: PageLayout, number: int) -> Geometry:
    """The constants of coded tiles of format `number`."""
    tile_format = layout.formats[number]
    key, value = (HalfFormat.of(tile_format, half) for half in Half)
    gaps = gaps_of(tile_format)
    return paged._replace(
        page_bytes=tile_format.tile_bytes, tiles_per_page=layout.tiles_per_page(number), key=key, value=value,
        integer=key.integer and value.integer, rotated=tile_format.half(Half.VALUE)[0].rotates,
        mass=tile_format.mass or 0, gaps=gaps,
        num_gaps=len(gaps),
    )  # fmt: skip


def codec_tables_of(layout: PageLayout, tables: LayerTables) -> CodecTables:
    """The tables that kernels read of a layer; those have been checked, and are contiguous."""
    tile_format = layout.tile_format
    if tile_format.key is None:
        return NO_TABLES
    halves: dict[str, dict[str, Any]] = {half: {} for half in Half}
    for name in table_specs(tile_format):
        half, _, word = name.split(".")
        halves[half][FIELDS[word]] = tables[name]
        if word == "rotary":
            halves[half]["positions"] = tables[name].shape[-1]
    return CodecTables(HalfTables(**halves[Half.KEY]), HalfTables(**halves[Half.VALUE]))


def gaps_of(tile_format: TileFormat) -> tuple[tuple[int, int], ...]:
    """(offset, bytes) of what lies between the sections of a tile, its log-masses among them, and behind them."""
    parts = [(offset, section.size_bytes) for section, offset in (*tile_format.keys, *tile_format.values)]
    if tile_format.mass is not None:
        parts.append((tile_format.mass, MASS_BYTES * tile_format.tokens))
    gaps, end = [], 0
    for offset, size_bytes in sorted(parts):
        if offset > end:
            gaps.append((end, offset - end))
        end = offset + size_bytes
    if tile_format.tile_bytes > end:
        gaps.append((end, tile_format.tile_bytes - end))
    return tuple(gaps)


@dataclass(frozen=True)
class Tables:
    """The device tensors of one launch, checked: arena, block table, lengths.

    Attributes:
        cells: uint8 [num_blocks, num_kv_heads, ...], one layer's cells (PagedAttention).
        batch: its tensors lie on the device of `cells`.
        max_query_len: at least the longest query of the batch; grids depend on it and on shapes, never on data.
        codec_tables: what the codecs of the pages read beside them.
        sink_logits: float32 [num_heads], the layer's learned sinks, or None.
    """

    cells: torch.Tensor
    batch: Batch
    max_query_len: int
    strip_offset: int
    strip_pages: int
    codec_tables: CodecTables = NO_TABLES
    sink_logits: torch.Tensor | None = None

    @classmethod
    def of(
        cls, layout: PageLayout, cells: torch.Tensor, batch: Batch, max_query_len: int,
        codec_tables: CodecTables = NO_TABLES, sink_logits: torch.Tensor | None = None,
    ) -> Tables:  # fmt: skip
        check_alignment(cells)
        strips = strips_of(cells, layout.kept_page_bytes)
        return cls(cells, batch, max_query_len, *strips, codec_tables, sink_logits)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments every kernel of pages starts with; see `pages.py`."""
        batch = self.batch
        return (
            *(self.cells, self.cells.stride(0), self.cells.stride(1), self.strip_offset, self.strip_pages),
            *(batch.query_start_loc, batch.seq_lens, batch.block_table, batch.block_table.stride(0), self.codec_tables),
        )

    @property
    def kept_arguments(self) -> tuple[Any, ...]:
        """The fields of the batch's KeptTable, for the kernels that attend."""
        return (None, None, None) if self.batch.kept is None else tuple(self.batch.kept)


def strips_of(cells: torch.Tensor, kept_page_bytes: int) -> tuple[int, int]:
    """(bytes from a strip's start to the layer's cell in it, kept pages of a strip)."""
    return strip_offset(cells), cells.stride(1) // kept_page_bytes if kept_page_bytes else 0


def check_device(**tensors: torch.Tensor | None) -> None:
    """Reject tensors that are not all where the kernels run: one CUDA device, or any device in the interpreter.

    Raises:
        ValueError: the message names the tensor.
    """
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(present))
    for name, tensor in present.items():
        if tensor.device != present[first].device:
            raise ValueError(f"{name} is on {tensor.device}, but {first} on {present[first].device}; move one of them")
    if present[first].device.type != "cuda" and not interpreted():
        raise ValueError(
            f"{first} is on {present[first].device}: the Triton kernels need CUDA tensors, "
            "or TRITON_INTERPRET=1 in the environment before Python starts"
        )


def check_alignment(cells: torch.Tensor) -> None:
    """Reject an arena whose cells do not start at multiples of 16 bytes: the kernels load 16 bytes at once."""
    if cells.data_ptr() % ALIGNMENT_BYTES or any(stride % ALIGNMENT_BYTES for stride in cells.stride()[:2]):
        raise ValueError(
            f"cells must start at multiples of {ALIGNMENT_BYTES} bytes, got address {cells.data_ptr():#x} and strides "
            f"{cells.stride()[:2]}; allocate the arena as its own tensor"
        )


def on_device(numbers: Sequence[Any], device: torch.device) -> torch.Tensor:
    """Numbers of the host as an int32 tensor, without waiting for what the device is doing."""
    return torch.tensor(numbers, dtype=torch.int32).to(device, non_blocking=True)


def interpreted() -> bool:
    """Whether the kernels were imported under Triton's interpreter."""
    from kvserve.kernels.pages import INTERPRETED

    return bool(INTERPRETED.value)
