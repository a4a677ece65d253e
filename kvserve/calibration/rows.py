"""Keys and values of a model on a text, in files: more than memory may hold, and written by several processes.

A file has one kind of row of one layer and some KV heads, as a plain array [kv_heads, tokens, head_dim]. Its name says
which: LAYER.KIND.FIRST_HEAD.NUM_HEADS.DTYPE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kvserve.calibration.artefact import Cache
from kvserve.calibration.methods.base import HalfRows
from kvserve.codecs.tile import Half
from kvserve.scorers.rotary import RotaryTable

_ROTARY = "rotary.safetensors"
_GRADIENT = "-gradient"  # what kinds of gradients end in


class RowsError(RuntimeError):
    """Rows that were not collected as they should be."""


class RowWriter:
    """Writes the rows of one layer's KV heads, tokens in the order of arrival.

    Args:
        num_tokens: that will come.
        first_head: index of the first of these heads in the model.
    """

    def __init__(self, folder: Path, layer: int, num_tokens: int, first_head: int = 0) -> None:
        self.folder, self.layer, self.num_tokens, self.first_head = folder, layer, num_tokens, first_head
        self._files: dict[str, torch.Tensor] = {}

    def put(self, kind: str, first: int, rows: torch.Tensor) -> None:
        """Write rows [tokens, kv_heads, head_dim] of the tokens from `first` on.

        Raises:
            RowsError: more tokens than were announced.
        """
        if first + len(rows) > self.num_tokens:
            raise RowsError(f"layer {self.layer} has seen {first + len(rows)} tokens, {self.num_tokens} were announced")
        rows = rows.detach().cpu()
        if kind not in self._files:
            self._files[kind] = self._create(kind, rows)
        self._files[kind][:, first : first + len(rows)] = rows.transpose(0, 1)

    def _create(self, kind: str, rows: torch.Tensor) -> torch.Tensor:
        heads, head_dim = rows.shape[1:]
        dtype = str(rows.dtype).removeprefix("torch.")
        name = f"{self.layer}.{kind}.{self.first_head}.{heads}.{dtype}"
        return _mapped(self.folder / name, (heads, self.num_tokens, head_dim), rows.dtype)


@dataclass(frozen=True, eq=False)
class Rows:
    """What was collected.

    Attributes:
        segment: the text came in parts of so many tokens, each at the positions from 0 on.
        rotary: of all layers, for the positions of a part; None: keys cannot be turned back, because of `no_rotary`.
    """

    folder: Path
    cache: Cache
    num_tokens: int
    segment: int
    rotary: RotaryTable | None
    no_rotary: str = ""

    def half(self, layer: int, half: Half, before_rope: bool, sinks: int) -> HalfRows:
        """Rows of a layer, without the first `sinks` tokens of each part.

        Args:
            before_rope: turn keys back to where they were before the rotary embedding.

        Raises:
            RowsError: a layer or heads are missing, or something is not finite.
        """
        positions = torch.arange(self.num_tokens) % self.segment
        is_counted = positions >= sinks
        rows, gradients = (self._read(layer, kind) for kind in (half, gradient_kind(half)))
        if rows is None:
            raise RowsError(f"the model showed no {half} rows of layer {layer}")
        rows, gradients = (part if part is None else part[:, is_counted].float() for part in (rows, gradients))
        if half is Half.KEY and before_rope:
            assert self.rotary is not None, "the caller has refused keys that cannot be turned back"
            rows = self.rotary.turn_back(rows, positions[is_counted])
            if gradients is not None:
                gradients = self.rotary.gradient_before(gradients, positions[is_counted])
        if not all(part.isfinite().all() for part in (rows, gradients) if part is not None):
            raise RowsError(f"layer {layer} has {half} rows that are not finite")
        return HalfRows(rows, None if gradients is None else gradients.square_())

    def _read(self, layer: int, kind: str) -> torch.Tensor | None:
        """All KV heads [kv_heads, tokens, head_dim]; None: there is no such kind."""
        parts: dict[int, torch.Tensor] = {}
        for path in self.folder.glob(f"{layer}.{kind}.*"):
            first, heads, dtype = path.name.removeprefix(f"{layer}.{kind}.").split(".")
            shape = (int(heads), self.num_tokens, self.cache.head_dim)
            parts[int(first)] = _mapped(path, shape, getattr(torch, dtype))
        if not parts:
            return None
        rows = torch.cat([parts[first] for first in sorted(parts)])
        if len(rows) != self.cache.num_kv_heads:
            raise RowsError(f"layer {layer} showed {len(rows)} KV heads, the model has {self.cache.num_kv_heads}")
        return rows


def write_rotary(folder: Path, table: RotaryTable) -> None:
    """Keep the embedding with the rows."""
    save_file({"interleaved" if table.interleaved else "halves": table.angles}, folder / _ROTARY)


def read_rotary(folder: Path) -> RotaryTable | None:
    """What `write_rotary` has kept; None: nothing."""
    if not (folder / _ROTARY).exists():
        return None
    ((name, angles),) = load_file(folder / _ROTARY).items()
    return RotaryTable(angles, interleaved=name == "interleaved")


def bytes_needed(cache: Cache, num_tokens: int, element_bytes: int, with_gradients: bool) -> int:
    """Of the files."""
    kinds = 4 if with_gradients else 2
    return kinds * cache.num_layers * cache.num_kv_heads * cache.head_dim * num_tokens * element_bytes


def gradient_kind(half: Half) -> str:
    """The kind of row that the gradients of a half are."""
    return half + _GRADIENT


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The file as a tensor; one that is not there is made, with zeros."""
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
