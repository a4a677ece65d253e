"""What vLLM is told by its environment, and what it finds on this CPU. Nothing here imports vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

PLUGIN_NAME = "kvserve"
# Naming this one in VLLM_PLUGINS allows it to download adapters; that stays the user's decision.
_OPT_IN_PLUGINS = frozenset({"lora_hf_hub_resolver"})


def allowed_plugins(current: str | None, discovered: Iterable[str]) -> str:
    """VLLM_PLUGINS with kvserve in it and nothing lost.

    vLLM loads an endpoint plugin only if this variable names it. Once the variable is set, a plugin of any other kind
    that it does not name is left out too.
    """
    if current is None:
        names = sorted(set(discovered) - _OPT_IN_PLUGINS - {PLUGIN_NAME})
    else:
        names = [name for name in current.split(",") if name and name != PLUGIN_NAME]
    return ",".join([*names, PLUGIN_NAME])


def cpu_has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether bfloat16 matrix products run natively; True where that cannot be told (not x86)."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return True
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), None)
    return flags is None or "avx512_bf16" in flags or "amx_bf16" in flags
