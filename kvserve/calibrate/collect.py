"""Reads a text with a model and keeps its keys and values: the one place that knows how rows come about."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from kvserve.calibrate.engine import HOST as ENGINE_HOST
from kvserve.calibrate.gradients import HOST as GRADIENT_HOST
from kvserve.calibration.artefact import Cache, CalibrationError
from kvserve.calibration.rows import Rows, bytes_needed, read_rotary
from kvserve.calibration.store import store_dir
from kvserve.measuring.children import Child
from kvserve.measuring.engines import ENVIRONMENT, Engine, EngineConfig
from kvserve.measuring.shape import ModelShape

Importance = Literal["gradient", "none"]
_PREFIX = ".rows-"  # and the process id


@dataclass(frozen=True)
class Reading:
    """A model and the parts of a text that it reads.

    Attributes:
        model: a Hugging Face folder or name.
        parts: of equal length, token ids.
        importance: "gradient" reads with transformers, forwards and backwards; "none" with vLLM.
    """

    model: str
    shape: ModelShape
    parts: Sequence[list[int]]
    importance: Importance
    dtype: str
    seed: int = 0

    @property
    def cache(self) -> Cache:
        return Cache(self.shape.num_layers, self.shape.num_kv_heads, self.shape.head_dim)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.parts))


@contextmanager
def collected(reading: Reading, on_part: Callable[[], None]) -> Iterator[Rows]:
    """The rows of a reading, in files that are gone afterwards.

    Args:
        on_part: called when a part has been read.

    Raises:
        CalibrationError: no room for the files, or not every layer showed every token.
        ChildError: the model could not be loaded or run.
    """
    with _scratch(reading) as folder:
        with _reader(reading) as reader:
            reader.call("start", folder=str(folder), num_tokens=reading.num_tokens)
            for part in reading.parts:
                reader.call("read", tokens=part)
                on_part()
            segment = len(reading.parts[0])
            found = reader.call("finish", folder=str(folder), segment=segment)
        if found["seen"] != [reading.num_tokens]:
            raise CalibrationError(
                f"layers have seen {', '.join(map(str, found['seen']))} of {reading.num_tokens} tokens, so not all of "
                "them keep what they are given; this model cannot be calibrated"
            )
        yield Rows(
            folder, reading.cache, reading.num_tokens, segment, read_rotary(folder), no_rotary=found["no_rotary"]
        )  # fmt: skip


def _reader(reading: Reading) -> Child:
    if reading.importance == "gradient":
        kwargs = {"model": reading.model, "dtype": reading.dtype}
        return Child("gradients", GRADIENT_HOST, kwargs, ENVIRONMENT)
    length = len(reading.parts[0])
    config = EngineConfig(
        reading.model, reading.shape, reading.dtype, length + 1, reading.seed,
        scheduler_options={"max_num_seqs": 1, "max_num_batched_tokens": length + 1},
    )  # fmt: skip
    return Engine("none", config, ENGINE_HOST)


@contextmanager
def _scratch(reading: Reading) -> Iterator[Path]:
    """A folder for the rows, where there is room for them."""
    element_bytes = getattr(torch, reading.dtype).itemsize
    needed = bytes_needed(reading.cache, reading.num_tokens, element_bytes, reading.importance == "gradient")
    folder = store_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        if (free := shutil.disk_usage(folder).free) < needed:
            raise CalibrationError(
                f"the rows of {reading.num_tokens} tokens take {needed / 2**30:.1f} GiB and {folder} has "
                f"{free / 2**30:.1f} GiB left; lower --tokens, or set KVSERVE_CACHE to a larger disk"
            )
        scratch = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=folder))
    except OSError as error:
        raise CalibrationError(
            f"cannot write to {folder}: {error.strerror}; set KVSERVE_CACHE to a folder that can be written"
        ) from None
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """What calibrations that were killed have left."""
    for left in folder.glob(f"{_PREFIX}*"):
        pid = left.name.removeprefix(_PREFIX).partition("-")[0]
        if not Path("/proc", pid).exists():
            shutil.rmtree(left, ignore_errors=True)
