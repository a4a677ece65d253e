"""What a GPU run finds on a machine: the GPU, versions, tools and packages, and what each missing one costs.

python -m benchmarks.gpu_machine [--result FILE] [--dry-run]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REQUIRED = ("torch", "triton")
WITHOUT = {  # by distribution: its import, and what is left out without it
    "numpy": ("numpy", "a dry run, which interprets, is not possible"),
    "pydantic": ("pydantic", "`make test-gpu` and serving need it; nothing else of this run does"),
    "pyyaml": ("yaml", "serving needs it; nothing else of this run does"),
    "rich": ("rich", "serving needs it; nothing else of this run does"),
    "pytest": ("pytest", "`make test-gpu` needs it; nothing of this run does"),
    "vllm": ("vllm", "nothing is served, and its kernels are no baselines"),
    "flashinfer-python": ("flashinfer", "it is no baseline"),
    "flash-attn": ("flash_attn", "it is no baseline"),
}
TOOLS = {
    "nvcc": "the CUDA kernels are left out, unless a library of these sources is there (`make cuda`)",
    "cc": "Triton cannot build what launches its kernels: set CC to a C compiler",
    "compute-sanitizer": "nothing runs under it",
    "nvidia-smi": "the driver's version is not recorded",
}


def found_version(name: str) -> str | None:
    """Of a distribution; None: it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def find_tool(name: str) -> str | None:
    """Path of a tool, where scripts look for it."""
    given = os.environ.get({"nvcc": "NVCC", "cc": "CC", "compute-sanitizer": "COMPUTE_SANITIZER"}.get(name, ""))
    names = ("cc", "gcc", "clang") if name == "cc" else (name,)
    return given or next((path for n in names if (path := _which(n))), None)


def _which(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def examine(dry: bool) -> dict[str, Any]:
    """Everything; `problem` names what makes a run impossible."""
    packages = {name: found_version(name) for name in (*REQUIRED, *WITHOUT)}
    tools = {name: find_tool(name) for name in TOOLS}
    found: dict[str, Any] = {
        "device": {"name": "dry-run"},
        "versions": {"python": platform.python_version(), **{k: v for k, v in packages.items() if v}},
        "tools": {name: path for name, path in tools.items() if path},
        "cores": len(os.sched_getaffinity(0)),
        "missing": _missing(packages, tools),
    }
    try:
        for name in REQUIRED:
            import_module(name)
    except Exception as error:  # of whatever kind a broken installation fails with
        return found | {"problem": f"{name} cannot be imported: {type(error).__name__}: {error}"}
    if not dry:
        found |= _device()
    return found


def _missing(packages: dict[str, str | None], tools: dict[str, str | None]) -> dict[str, str]:
    """What is not there, and what that means."""
    missing = {name: words for name, (_, words) in WITHOUT.items() if packages[name] is None}
    missing |= {name: words for name, words in TOOLS.items() if tools[name] is None}
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        missing["Python.h"] = "Triton cannot build what launches its kernels: install Python's headers"
    if _at_least(packages["numpy"], 2, 4) and not _at_least(packages["triton"], 3, 7):
        missing["interpreter"] = "Triton before 3.7 does not interpret with numpy 2.4 or newer: no dry run"
    return missing


def _at_least(found: str | None, major: int, minor: int) -> bool:
    return found is not None and tuple(int(part) for part in found.split(".")[:2]) >= (major, minor)


def _device() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {"problem": f"torch {torch.__version__} sees no CUDA device; `--dry-run` runs without one"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": {
            "name": torch.cuda.get_device_name(0),
            "capability": list(torch.cuda.get_device_capability(0)),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "driver": driver_version(),
            "cuda": torch.version.cuda,
        }
    }


def driver_version() -> str | None:
    """Of the first GPU, from nvidia-smi."""
    tool = find_tool("nvidia-smi")
    if tool is None:
        return None
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 2 where a run is impossible."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--result", type=Path, help="JSON file (default: printed)")
    parser.add_argument("--dry-run", action="store_true", help="no GPU is asked for")
    options = parser.parse_args(arguments)
    found = examine(options.dry_run)
    text = json.dumps(found, indent=1)
    if options.result is None:
        print(text)
    else:
        options.result.write_text(text, encoding="utf-8")
    return 2 if "problem" in found else 0


if __name__ == "__main__":
    sys.exit(main())
