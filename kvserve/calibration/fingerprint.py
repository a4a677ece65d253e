"""Which model a calibration belongs to: a hash of its shape and of a sample of its weights; nothing is loaded."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from kvserve.checks import text_config
from kvserve.errors import UnsupportedError

SAMPLED_TENSORS = 256
SAMPLED_BYTES = 256  # of each of them, and of each place in a file of another format
_PLACES = 32  # in such a file
_LARGEST_HEADER = 100 * 2**20  # of a safetensors file, the format's own limit
_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.gguf")
# What decides about keys and values beside the weights. Names that a config does not have are left out.
_SHAPE_FIELDS = (
    *("model_type", "architectures", "hidden_size", "n_embd", "d_model", "intermediate_size", "vocab_size"),
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_attention_heads", "n_head", "n_heads"),
    *("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
    *("sliding_window", "layer_types", "rms_norm_eps", "layer_norm_eps", "tie_word_embeddings", "hidden_act"),
)


class _Stored(NamedTuple):
    """Where the bytes of a tensor lie."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def fingerprint(model: Path) -> str:
    """The fingerprint of a Hugging Face folder, or of a weight file that carries its own configuration (GGUF).

    Copies of a folder, and the same tensors in other files, have the same fingerprint: names of files and the folder's
    place do not count. Reads the config, the headers of the weight files and at most 64 KiB of the weights.

    Returns:
        64 hexadecimal digits.

    Raises:
        UnsupportedError: there are no weights, or they cannot be read.
    """
    return _fingerprint(model, _stamp(model))


def _stamp(model: Path) -> tuple[tuple[str, int, int], ...]:
    """What shows that files have changed since the last time."""
    try:
        states = [(path.name, path.stat()) for path in (sorted(model.iterdir()) if model.is_dir() else [model])]
    except OSError as error:
        raise UnsupportedError(f"cannot read the model {model}: {error.strerror}") from None
    return tuple((name, state.st_mtime_ns, state.st_size) for name, state in states)


@cache
def _fingerprint(model: Path, _stamp: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    try:
        if model.is_file():
            _add_samples_of(digest, model)
            return digest.hexdigest()
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        digest.update(_shape_of(config).encode())
        files = sorted(model.glob("*.safetensors"))
        if files:
            _add_tensors(digest, files)
            return digest.hexdigest()
        files = next((found for kind in _OTHER_FORMATS if (found := sorted(model.glob(kind)))), [])
        for path in files:
            _add_samples_of(digest, path)
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise UnsupportedError(
            f"cannot read the weights of {model} to recognise the model: {error}; download it again"
        ) from None
    if not files:
        raise UnsupportedError(f"{model} has no weights (*.safetensors) to recognise the model by")
    return digest.hexdigest()


def _shape_of(config: Mapping[str, Any]) -> str:
    text = text_config(config)
    fields = {name: text.get(name, config.get(name)) for name in _SHAPE_FIELDS}
    return json.dumps({name: value for name, value in fields.items() if value is not None}, sort_keys=True)


def _add_tensors(digest: Any, files: list[Path]) -> None:
    """Every tensor's name, dtype and shape, and bytes from the middle of some of them."""
    tensors: dict[str, _Stored] = {}
    for path in files:
        tensors |= dict(_tensors_of(path))
    names = sorted(tensors)
    for name in names:
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}\n".encode())
    step = max(len(names) / SAMPLED_TENSORS, 1)
    for index in range(min(len(names), SAMPLED_TENSORS)):
        stored = tensors[names[int(index * step)]]
        with stored.path.open("rb") as file:
            size = stored.end - stored.start
            file.seek(stored.start + max(size - SAMPLED_BYTES, 0) // 2)
            digest.update(file.read(min(SAMPLED_BYTES, size)))


def _tensors_of(path: Path) -> Iterator[tuple[str, _Stored]]:
    """Tensors of a safetensors file: eight bytes with the header's length, the header in JSON, the data."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _LARGEST_HEADER:
            raise ValueError(f"{path.name} is no safetensors file")
        header = json.loads(file.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield name, _Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + start, 8 + length + end)


def _add_samples_of(digest: Any, path: Path) -> None:
    """The size of a file and bytes from evenly spread places of it."""
    size = path.stat().st_size
    digest.update(f"{size}\n".encode())
    with path.open("rb") as file:
        for place in range(_PLACES):
            file.seek(max(size - SAMPLED_BYTES, 0) * place // (_PLACES - 1))
            digest.update(file.read(SAMPLED_BYTES))
