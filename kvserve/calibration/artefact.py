"""The file of a calibration: one safetensors file for each model and recipe.

Tensors are called "layers.<index>.<half>.<codec>.<table>", those of heads "layers.<index>.heads.<table>". The metadata,
JSON under the one key "kvserve" so that equal content makes equal files, says what made them, and has a hash of all
tensors, so that a damaged file is known before anything reads a table.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kvserve.calibration.methods.base import AnyMethod, Table
from kvserve.calibration.methods.registry import method_of
from kvserve.calibration.tables import TableError, check_table
from kvserve.codecs.layer_tables import KV_HEADS
from kvserve.codecs.tile import Half
from kvserve.errors import UnsupportedError
from kvserve.text_files import one_line

FORMAT = 1  # raised with every change to what the file holds or means
SUFFIX = ".safetensors"
MAX_BYTES = 8 * 2**30
_KEY = "kvserve"  # of the metadata
_KINDS: dict[str, type] = {"str": str, "int": int, "dict[str, Any]": dict}  # of fields, by their annotations


class CalibrationError(UnsupportedError):
    """A calibration that is missing or must not be used; the message names the command that makes the right one."""


@dataclass(frozen=True)
class Cache:
    """The KV cache that tables are for: that of a whole model, not of a rank."""

    num_layers: int
    num_kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.num_layers} layers x {self.num_kv_heads} KV heads x head_dim {self.head_dim}"


@dataclass(frozen=True)
class Origin:
    """What made a calibration.

    Attributes:
        recipe: the name under which policies find it.
        parameters: of the method, its name included.
        fingerprint: of the model (kvserve/calibration/fingerprint.py).
        corpus, corpus_sha256: the text's name and hash.
        num_tokens: of it that were read.
        importance: "gradient" (squared gradients weigh errors) or "none".
        version: of kvserve.
    """

    recipe: str
    parameters: dict[str, Any]
    fingerprint: str
    corpus: str
    corpus_sha256: str
    num_tokens: int
    importance: str
    version: str

    @property
    def method(self) -> AnyMethod:
        """The method with its parameters."""
        return method_of(self.parameters)

    def describe(self) -> str:
        """In a few words, for people."""
        return f"{self.recipe}, {self.num_tokens:,} tokens of {self.corpus}, importance: {self.importance}"


@dataclass(frozen=True, eq=False)
class Calibration:
    """A checked calibration.

    Attributes:
        sha256: of the file.
        tensors: all tables by the name that they have in the file.

    Two are equal where their files are.
    """

    path: Path
    sha256: str
    origin: Origin
    cache: Cache
    tensors: Mapping[str, torch.Tensor]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Calibration) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def describe(self) -> str:
        """In one line of the startup table."""
        return f"{self.origin.describe()}; sha256 {self.sha256[:16]}"

    def layer_tables(self, layer: int, first_head: int, num_heads: int) -> dict[str, torch.Tensor]:
        """The tables of one layer's rows by "half.codec.table"; of those with KV heads only the rank's own.

        Args:
            first_head, num_heads: the KV heads of the rank among those of the model.
        """
        heads = slice(first_head, first_head + num_heads)
        found = {}
        for table in self.origin.method.tables(self.cache.head_dim):
            if table.half is not None:
                tensor = self.tensors[tensor_name(layer, table)]
                found[table.full_name] = tensor[heads].contiguous() if KV_HEADS in table.axes else tensor
        return found

    def head_tables(self) -> dict[str, torch.Tensor]:
        """The tables of the whole model's heads, [layers, kv_heads], by "heads.table"."""
        tables = [table for table in self.origin.method.tables(self.cache.head_dim) if table.half is None]
        layers = range(self.cache.num_layers)
        return {
            table.full_name: torch.stack([self.tensors[tensor_name(layer, table)] for layer in layers])
            for table in tables
        }


def tensor_name(layer: int, table: Table) -> str:
    """What a table is called in the file."""
    return f"layers.{layer}.{table.full_name}"


def expected(method: AnyMethod, cache: Cache) -> Iterator[tuple[str, Table]]:
    """All tensors of a file, by layer and half."""
    tables = method.tables(cache.head_dim)
    for layer in range(cache.num_layers):
        for half in (*Half, None):
            yield from ((tensor_name(layer, table), table) for table in tables if table.half is half)


def write(path: Path, origin: Origin, cache: Cache, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a calibration; a reader sees the whole file or the one before.

    Raises:
        TableError: a table is not what its method says.
        OSError: the file cannot be written.
    """
    for name, table in expected(origin.method, cache):
        check_table(name, tensors[name], table, cache.num_kv_heads)
    content = {"format": FORMAT, **asdict(origin), **asdict(cache)}
    metadata = {_KEY: json.dumps(content | {"content_sha256": _digest(content, tensors)}, sort_keys=True)}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
        partial.chmod(0o666 & ~_umask())  # safetensors' is its owner's only
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path, fingerprint: str, cache: Cache, command: str, sha256: str | None = None) -> Calibration:
    """Read and check a calibration.

    Args:
        fingerprint, cache: of the model that is to be served.
        command: makes the right file, for the messages.
        sha256: what the file must be; None: anything that fits.

    Raises:
        CalibrationError: it is missing, damaged, or of another model, shape or format.
    """
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CalibrationError(f"cannot read the calibration {path}: {reason}; make it with `{command}`") from None
    if sha256 is not None and found != sha256:
        raise CalibrationError(
            f"the calibration {path} has changed since the server chose it; start the server again, or make the file "
            f"anew with `{command}`"
        )
    try:
        origin, own, tensors = _parse(path)
        _check(origin, own, fingerprint, cache)
        _check_tables(origin, own, tensors)
    except (TableError, SafetensorError, UnsupportedError) as error:
        raise CalibrationError(
            f"the calibration {path} cannot be used: {one_line(str(error))}; make it anew with `{command}`"
        ) from None
    return Calibration(path, found, origin, own, tensors)


def _parse(path: Path) -> tuple[Origin, Cache, dict[str, torch.Tensor]]:
    if path.stat().st_size > MAX_BYTES:
        raise TableError("it is far too long")
    with safe_open(path, "pt") as file:
        content = _content_of(file.metadata())
        # Copies: what lies in the file may be written over while it is used.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
    if content.pop("content_sha256", None) != _digest(content, tensors):
        raise TableError("it is damaged")
    kinds = {field.name: _KINDS[str(field.type)] for field in (*fields(Origin), *fields(Cache))}
    wrong = [name for name, kind in kinds.items() if type(content.get(name)) is not kind]
    if wrong:
        raise TableError(f"its metadata are not those of a calibration ({wrong[0]})")
    origin = Origin(**{name: content[name] for name in _names(Origin)})
    return origin, Cache(**{name: content[name] for name in _names(Cache)}), tensors


def _content_of(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """What the metadata say, of a format that is read here."""
    try:
        content = json.loads((metadata or {}).get(_KEY, "{}"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise TableError("its metadata are not those of a calibration")
    if content.get("format") != FORMAT:
        raise TableError(f"its format is {content.get('format')!r:.40}, this kvserve reads {FORMAT}")
    return content


def _check(origin: Origin, own: Cache, fingerprint: str, cache: Cache) -> None:
    if own != cache:
        raise TableError(f"it is for {own}, the model has {cache}")
    if origin.fingerprint != fingerprint:
        raise TableError("it is of another model with the same shape, or of the same model with other weights")


def _check_tables(origin: Origin, cache: Cache, tensors: Mapping[str, torch.Tensor]) -> None:
    try:
        wanted = dict(expected(origin.method, cache))
    except ValueError as error:
        raise TableError(str(error)) from None
    missing, more = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or more:
        raise TableError(f"{missing[0]} is missing" if missing else f"{more[0]} is not one of its tables")
    for name, table in wanted.items():
        check_table(name, tensors[name], table, cache.num_kv_heads)


def _digest(content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """A hash of the metadata and of the tensors' names, dtypes, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _names(kind: Any) -> list[str]:
    return [field.name for field in fields(kind)]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
