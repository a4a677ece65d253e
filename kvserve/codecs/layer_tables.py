"""The tensors of one layer that its codecs read: which there must be, and what one KV head has of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kvserve.codecs.lazy import torch
from kvserve.codecs.tile import Half, Tables, TableSpec

if TYPE_CHECKING:
    from kvserve.codecs.format import TileFormat

KV_HEADS, POSITIONS = "kv_heads", "positions"

# "half.codec name.table name" -> a tensor of the layer, with its axis of KV heads where the codec has one.
LayerTables = Mapping[str, "torch.Tensor"]


def table_specs(tile_format: TileFormat) -> dict[str, TableSpec]:
    """Every table that the codecs of a layer read, by its name in LayerTables."""
    specs: dict[str, TableSpec] = {}
    for half in Half if tile_format.dense_dtype is None else ():
        codec, _ = tile_format.half(half)
        specs |= {f"{half}.{name}": spec for name, spec in codec.tables(tile_format.shape(half)).items()}
    return specs


def check_tables(tables: LayerTables, tile_format: TileFormat, num_kv_heads: int) -> None:
    """Refuse tables that are missing, or that have another shape or dtype than the codecs read, or are not finite.

    Raises:
        ValueError: the message names the table.
    """
    for name, spec in table_specs(tile_format).items():
        if name not in tables:
            raise ValueError(f"the codecs need a table {name}, which is not there; calibrate the policy for this model")
        table = tables[name]
        sizes = {KV_HEADS: num_kv_heads, POSITIONS: table.shape[-1] if table.dim() else 0}
        shape = tuple(sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in spec.axes)
        if tuple(table.shape) != shape or table.dtype != spec.dtype:
            raise ValueError(
                f"the table {name} is {table.dtype} {tuple(table.shape)}, its codec reads {spec.dtype} {shape}; "
                "calibrate the policy for this model"
            )
        if not table.isfinite().all():
            raise ValueError(f"the table {name} has numbers that are not finite; calibrate the policy anew")


def tables_of_head(tables: LayerTables, tile_format: TileFormat, kv_head: int) -> Tables:
    """What one KV head has of a layer's tables."""
    specs = table_specs(tile_format)
    return {name: tables[name][kv_head] if KV_HEADS in spec.axes else tables[name] for name, spec in specs.items()}


def tables_of_half(tables: Tables | None, half: Half) -> Tables:
    """The tables of the keys' or the values' codec, without the word that says so in their names."""
    prefix = f"{half}."
    return {name.removeprefix(prefix): table for name, table in (tables or {}).items() if name.startswith(prefix)}
