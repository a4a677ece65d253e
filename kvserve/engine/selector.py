"""The one name vLLM resolves to find its CPU attention backend: `kvserve.engine.selector.backend`.

It is computed on access (PEP 562), when the config being served is known: kvserve's backend bound to the configured
policy, or vLLM's own where no policy is set.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "backend":
        raise AttributeError(name)
    from vllm.config import get_current_vllm_config

    from kvserve.engine.settings import EngineSettings

    settings = EngineSettings.from_vllm_config(get_current_vllm_config())
    if settings is None:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        return CPUAttentionBackend
    from kvserve.engine.backend import backend_for

    return backend_for(settings)
