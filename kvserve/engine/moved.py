"""Names that vLLM moved from one module to another within the tested range (kvserve/compat.py).

Seam: the modules of `PLACES`, those of the newest vLLM first. tests/contracts/test_contracts_versions.py looks each up.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from kvserve.errors import UnsupportedError

PLACES: dict[str, tuple[str, ...]] = {
    "make_arg_parser": ("vllm.entrypoints.common.cli_args", "vllm.entrypoints.launchers.cli_args"),
    "validate_parsed_serve_args": ("vllm.entrypoints.common.cli_args", "vllm.entrypoints.launchers.cli_args"),
    "cli_env_setup": ("vllm.entrypoints.common.startup", "vllm.entrypoints.serve.utils.api_utils"),
}


def moved(name: str) -> Any:
    """What the installed vLLM calls `name`, a key of PLACES.

    Raises:
        UnsupportedError: none of the known modules has it.
    """
    for place in PLACES[name]:
        if _exists(place) and hasattr(module := import_module(place), name):
            return getattr(module, name)
    raise UnsupportedError(
        f"this vLLM has no {name} in {' or '.join(PLACES[name])}; `kvserve --version` shows the versions that do"
    )


def _exists(place: str) -> bool:
    """Whether there is such a module. What goes wrong while one that exists is imported is not hidden."""
    try:
        return find_spec(place) is not None
    except ModuleNotFoundError as error:
        if f"{place}.".startswith(f"{error.name}."):  # a package on the way to it
            return False
        raise
