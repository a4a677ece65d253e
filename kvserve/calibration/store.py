"""Where calibrations lie, and which one a policy means.

Beside the default model, in the folder calibration/<the model's fingerprint, shortened>/<recipe>.safetensors.
"""

from __future__ import annotations

import shlex
from functools import lru_cache
from pathlib import Path

from kvserve.arguments.model_folder import downloaded_folder, path_of
from kvserve.calibration.artefact import SUFFIX, Cache, Calibration, CalibrationError, read
from kvserve.calibration.fingerprint import fingerprint
from kvserve.calibration.methods.registry import RECIPES
from kvserve.default_model import cache_dir, default_model_path

_SHORT = 16  # digits of a fingerprint in names of folders


def store_dir() -> Path:
    """The folder of all calibrations."""
    return cache_dir() / "calibration"


def stored_path(recipe: str, model_fingerprint: str) -> Path:
    """Where the calibration of a recipe and a model lies, or will lie."""
    return store_dir() / model_fingerprint[:_SHORT] / f"{recipe}{SUFFIX}"


def names_file(name: str) -> bool:
    """Whether a policy's `calibration` is a path, and not the name of a recipe."""
    return "/" in name or name.endswith(SUFFIX)


def check_name(name: str) -> None:
    """Reject what is neither a recipe nor a path.

    Raises:
        ValueError: listing the recipes.
    """
    if not names_file(name) and name not in RECIPES:
        raise ValueError(
            f"calibration is {name!r:.60}, it must be one of {', '.join(RECIPES)}, or the path of a file that "
            "`kvserve calibrate` has written"
        )


def weights_of(model: str) -> Path:
    """The folder or file with the weights of a model that lies on this machine.

    Raises:
        CalibrationError: it does not.
    """
    path = path_of(model)
    if path.exists():
        return path
    folder = downloaded_folder(model)
    if folder is None:
        raise CalibrationError(f"{model} lies not on this machine; download it, or give the folder of a model")
    return folder


def locate(name: str, model: str) -> Path:
    """The file that `name`, a recipe or a path, means for a model; it may not be there."""
    return Path(name).expanduser() if names_file(name) else stored_path(name, fingerprint(weights_of(model)))


def command_for(name: str, model: str) -> str:
    """The command that makes the file that `name` means for a model."""
    words = ["kvserve", "calibrate", "--method", "METHOD" if names_file(name) else name]
    if path_of(model) != default_model_path():
        words += ["--model", model]
    if names_file(name):
        words += ["--out", name]
    return shlex.join(words)


def load(
    name: str, model: str, cache: Cache, sha256: str | None = None, named: str | None = None
) -> Calibration:  # fmt: skip
    """The calibration that `name` means for a model, checked; a file that has not changed is read once.

    Args:
        cache: of the whole model.
        sha256: of the file, where it was chosen before; None: anything that fits.
        named: what the policy names, for the message; None: `name`.

    Raises:
        UnsupportedError: see `kvserve.calibration.artefact.read`.
    """
    path, command = locate(name, model), command_for(named or name, model)
    state = path.stat() if path.exists() else None
    stamp = (state.st_mtime_ns, state.st_size, state.st_ino) if state else None
    return _read(path, stamp, fingerprint(weights_of(model)), cache, command, sha256)


@lru_cache(maxsize=2)
def _read(
    path: Path, _stamp: tuple[int, int, int] | None, model_fingerprint: str, cache: Cache, command: str,
    sha256: str | None,
) -> Calibration:  # fmt: skip
    return read(path, model_fingerprint, cache, command, sha256)
