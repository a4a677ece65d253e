"""How vLLM divides memory into blocks: its own functions, which vLLM 0.33 has in a module of their own."""

from __future__ import annotations

try:
    from vllm.v1.core.kv_cache_planning import (
        get_kv_cache_config_from_groups,
        get_kv_cache_configs,
        get_kv_cache_groups,
    )
except ModuleNotFoundError:
    from vllm.v1.core.kv_cache_utils import (  # type: ignore[no-redef]
        get_kv_cache_config_from_groups,
        get_kv_cache_configs,
        get_kv_cache_groups,
    )

__all__ = ["get_kv_cache_config_from_groups", "get_kv_cache_configs", "get_kv_cache_groups"]
