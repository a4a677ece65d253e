"""How vLLM divides memory into blocks: its own functions, which vLLM 0.33 has in a module of their own."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig

try:
    from vllm.v1.core import kv_cache_planning as planner
except ImportError:
    from vllm.v1.core import kv_cache_utils as planner  # type: ignore[no-redef]

get_kv_cache_config_from_groups = planner.get_kv_cache_config_from_groups
get_kv_cache_groups = planner.get_kv_cache_groups


def get_kv_cache_configs(config: VllmConfig, specs: list[dict[str, Any]], memory: list[int]) -> list[Any]:
    """Every worker's KVCacheConfig, of its layers' specs and its bytes; vLLM 0.33 wants the groups made before."""
    groups = getattr(planner, "get_global_kv_cache_groups", None)
    more = [groups(config, specs)] if groups else []
    return planner.get_kv_cache_configs(config, specs, memory, *more)
