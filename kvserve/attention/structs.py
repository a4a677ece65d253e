"""The structs of csrc/kvserve.h, and how they are filled: the arguments of every kernel called through ctypes."""

from __future__ import annotations

import ctypes

import torch

from kvserve.attention.base import Batch, LayerSpec, Received, check_rows
from kvserve.codecs.base import MAX_PARAMS, MAX_STAGES
from kvserve.codecs.format import TileFormat
from kvserve.codecs.layer_tables import KV_HEADS, POSITIONS, LayerTables, table_specs
from kvserve.codecs.tile import Half
from kvserve.pages.kept import MAX_RUNS, Header, strip_offset
from kvserve.pages.layout import PageLayout

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

int32, int64, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class KvsCodec(ctypes.Structure):
    _fields_ = [
        ("kind", int32),
        ("params", int32 * MAX_PARAMS),
        ("at", int64 * 6),
        ("tables", pointer * 2),
        ("table_strides", int64 * 2),
    ]


class KvsHalf(ctypes.Structure):
    _fields_ = [("stages", int32), ("stage", KvsCodec * MAX_STAGES)]


class KvsLayout(ctypes.Structure):
    _fields_ = [
        *((name, int32) for name in ("num_heads", "num_kv_heads", "head_dim", "block_size", "dense_dtype")),
        ("sliding_window", int32),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("sink_logits", pointer),
        *((name, int32) for name in ("tile_tokens", "tiles_per_block", "slots_per_cell", "state_blocks")),
        *((name, int32) for name in ("tail_blocks", "tail_slots", "draft_tokens", "sink_blocks")),
        *((name, int32) for name in ("sink_tokens", "value_rotated")),
        ("page_bytes", int64),
        ("key", KvsHalf),
        ("value", KvsHalf),
        ("mass", int64),
        ("kept_page_bytes", int64),
        ("tiles_per_page", int32),
        ("num_formats", int32),
        ("others", pointer),
    ]


class KvsArena(ctypes.Structure):
    _fields_ = [
        ("base", pointer),
        *((name, int64) for name in ("block_stride", "head_stride", "strip_offset")),
        ("pages_per_strip", int32),
    ]


class KvsRun(ctypes.Structure):
    _fields_ = [(name, int32) for name in ("format", "first_page", "num_tokens")]


class KvsKept(ctypes.Structure):
    _fields_ = [("end", int32), ("num_runs", int32), ("runs", KvsRun * MAX_RUNS)]


class KvsBatch(ctypes.Structure):
    _fields_ = [
        ("num_reqs", int32),
        ("query_start_loc", pointer),
        ("seq_lens", pointer),
        ("block_table", pointer),
        ("block_table_stride", int64),
        *((name, pointer) for name in ("kept_ends", "kept_starts", "kept_blocks")),
    ]


class KvsRows(ctypes.Structure):
    _fields_ = [("data", pointer), ("token_stride", int64), ("head_stride", int64), ("dtype", int32)]


class KvsReceived(ctypes.Structure):
    _fields_ = [("power", int32), ("sums", pointer), ("columns", pointer)]


def kvs_layout(layout: PageLayout, spec: LayerSpec, tables: LayerTables | None = None) -> KvsLayout:
    """A pool's geometry and a layer's attention; fields that the policy does not have are 0.

    Args:
        spec, tables: of the layer, checked; their tensors must outlive what is returned.
    """
    struct = KvsLayout(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=layout.head_dim,
        block_size=layout.block_size,
        dense_dtype=DTYPE_CODES[layout.dense_dtype],
        sliding_window=spec.sliding_window or 0,
        scale=spec.scale,
        soft_cap=spec.soft_cap or 0,
        sink_logits=None if spec.sink_logits is None else spec.sink_logits.data_ptr(),
    )
    if not layout.has_pages:
        return struct
    numbers = ("tile_tokens", "tiles_per_block", "slots_per_cell", "state_blocks", "sink_blocks")
    for name in (*numbers, "tail_blocks", "tail_slots", "draft_tokens"):
        setattr(struct, name, getattr(layout, name))
    struct.sink_tokens, struct.kept_page_bytes = layout.policy.sink_tokens, layout.kept_page_bytes
    struct.value_rotated = layout.rotates
    _set_format(struct, layout, 0, tables or {})
    others = (KvsLayout * len(layout.other_formats))()
    for number, other in enumerate(others, 1):
        ctypes.pointer(other)[0] = struct
        _set_format(other, layout, number, {})
    struct.num_formats, struct.others = len(layout.formats), ctypes.addressof(others)
    struct.arrays = others  # type: ignore[attr-defined]  # they live as long
    return struct


def _set_format(struct: KvsLayout, layout: PageLayout, number: int, tables: LayerTables) -> None:
    """Make the struct that of tiles of format `number`."""
    tile_format = layout.formats[number]
    struct.page_bytes, struct.tiles_per_page = tile_format.tile_bytes, layout.tiles_per_page(number)
    if tile_format.dense_dtype is None:
        struct.key, struct.value = (kvs_half(tile_format, half, tables) for half in Half)
        struct.mass = tile_format.mass or 0


def kvs_half(tile_format: TileFormat, half: Half, tables: LayerTables) -> KvsHalf:
    """The codecs of one half of a tile, their sections and tables."""
    (codec, places), shape = tile_format.half(half), tile_format.shape(half)
    offsets = (offset for _, offset in places)
    chain = codec.chain()
    struct = KvsHalf(stages=len(chain))
    for stage, own in zip(struct.stage, chain, strict=False):
        params = list(own.params(shape))
        for i, spec in enumerate(own.own_tables(shape)):
            table = tables[name := f"{half}.{own.name}.{spec.name}"]
            if not table.is_contiguous():
                raise ValueError(f"the table {name} must be contiguous, got strides {table.stride()}")
            stage.tables[i] = table.data_ptr()
            stage.table_strides[i] = table.stride(0) * table.itemsize if KV_HEADS in spec.axes else 0
            params += [table.shape[-1]] * (POSITIONS in spec.axes)
        at = [next(offsets) for _ in own.own_sections(shape)]
        stage.kind, stage.params[: len(params)], stage.at[: len(at)] = own.kind, params, at
    return struct


def rotary_positions(tables: LayerTables, tile_format: TileFormat) -> int:
    """Positions that the layer's tables reach to; 0: they have none."""
    specs = table_specs(tile_format)
    return min((tables[name].shape[-1] for name, spec in specs.items() if POSITIONS in spec.axes), default=0)


def kvs_batch(batch: Batch) -> KvsBatch:
    """`batch` must have passed `check_batch`, and must outlive what is returned."""
    return KvsBatch(
        batch.num_reqs,
        batch.query_start_loc.data_ptr(),
        batch.seq_lens.data_ptr(),
        batch.block_table.data_ptr(),
        batch.block_table.stride(0),
        *((None,) * 3 if batch.kept is None else (table.data_ptr() for table in batch.kept)),
    )


def kvs_arena(cells: torch.Tensor, layout: PageLayout) -> KvsArena:
    """`cells` must have passed `check_cells`."""
    pages = cells.stride(1) // layout.kept_page_bytes if layout.kept_page_bytes else 0
    return KvsArena(cells.data_ptr(), cells.stride(0), cells.stride(1), strip_offset(cells), pages)


def kvs_kept(header: Header) -> KvsKept:
    """What one KV head keeps."""
    return KvsKept(header.end, len(header.runs), tuple(tuple(run) for run in header.runs))


def kvs_received(received: Received, num_reqs: int) -> KvsReceived:
    """Sums that must have passed `PagedAttention.check_received`."""
    sums, columns = (pointer * num_reqs)(), (int64 * num_reqs)()
    for request, table in received.sums.items():
        sums[request], columns[request] = table.data_ptr(), table.shape[1]
    struct = KvsReceived(received.power, ctypes.addressof(sums), ctypes.addressof(columns))
    struct.arrays = (sums, columns)  # type: ignore[attr-defined]  # they live as long
    return struct


def kvs_rows(name: str, rows: torch.Tensor, num_heads: int, head_dim: int) -> KvsRows:
    """Rows [tokens, num_heads, head_dim], checked; they must outlive what is returned."""
    check_rows(name, rows, num_heads, head_dim)
    return KvsRows(rows.data_ptr(), rows.stride(0), rows.stride(1), DTYPE_CODES[rows.dtype])
