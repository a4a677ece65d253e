"""The transforms of one attention layer, around its kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvserve.codecs.layer_tables import KV_HEADS, LayerTables, tables_of_half
from kvserve.codecs.lazy import torch
from kvserve.codecs.tile import Half, Tables
from kvserve.transforms.base import Transform


@dataclass(frozen=True)
class Transforms:
    """Which transforms keys and values go through, the first one first."""

    key: tuple[Transform, ...] = ()
    value: tuple[Transform, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.key or self.value)

    def of(self, half: Half) -> tuple[Transform, ...]:
        """Those of one half."""
        return self.key if half is Half.KEY else self.value


@dataclass(eq=False)
class LayerTransforms:
    """Transforms with one layer's tables.

    Args:
        tables: by "half.transform.table"; their first axis has `num_kv_heads` entries.

    Raises:
        ValueError: a table is missing, or has another shape or dtype.
    """

    transforms: Transforms
    tables: LayerTables
    num_kv_heads: int
    head_dim: int
    _halves: dict[Half, Tables] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for half in Half:
            for transform in self.transforms.of(half):
                for name, spec in transform.tables(self.head_dim).items():
                    sizes = [self.num_kv_heads if axis == KV_HEADS else axis for axis in spec.axes]
                    table = self.tables.get(f"{half}.{name}")
                    if table is None or list(table.shape) != sizes or table.dtype != spec.dtype:
                        found = "is not there" if table is None else f"is {table.dtype} {list(table.shape)}"
                        raise ValueError(f"the table {half}.{name} {found}; its transform reads {spec.dtype} {sizes}")
        self._halves = {half: tables_of_half(self.tables, half) for half in Half}

    def keys(self, key: torch.Tensor) -> torch.Tensor:
        """Keys as the cache has them; [tokens, kv_heads, head_dim], dtypes stay."""
        return self._mapped(key, Half.KEY, "apply")

    def queries(self, query: torch.Tensor) -> torch.Tensor:
        """Queries for such keys; [tokens, heads, head_dim]."""
        return self._mapped(query, Half.KEY, "oppose")

    def values(self, value: torch.Tensor) -> torch.Tensor:
        """Values as the cache has them; [tokens, kv_heads, head_dim]."""
        return self._mapped(value, Half.VALUE, "apply")

    def outputs(self, output: torch.Tensor) -> torch.Tensor:
        """What the layer answers, from an answer of such values; [tokens, heads, head_dim]."""
        return self._mapped(output, Half.VALUE, "undo")

    def _mapped(self, rows: torch.Tensor, half: Half, direction: str) -> torch.Tensor:
        chosen: Sequence[Transform] = self.transforms.of(half)
        if not chosen:
            return rows
        mapped, tables = rows.unflatten(1, (self.num_kv_heads, -1)).float(), self._halves[half]
        for transform in reversed(chosen) if direction == "undo" else chosen:
            mapped = getattr(transform, direction)(mapped, tables)
        return mapped.flatten(1, 2).to(rows.dtype)
