"""The one name vLLM resolves to find kvserve's attention backend: `kvserve.engine.selector.backend`.

It is computed on access (PEP 562), when the config being served is known: kvserve's backend bound to the configured
policy, or vLLM's own on a CPU where no policy is set.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "backend":
        raise AttributeError(name)
    from vllm.config import get_current_vllm_config

    from kvserve.engine.device import device_type
    from kvserve.engine.settings import EngineSettings
    from kvserve.errors import UnsupportedError

    settings = EngineSettings.from_vllm_config(get_current_vllm_config())
    if settings is not None:
        from kvserve.engine.backend import backend_for

        return backend_for(settings)
    if device_type() != "cpu":
        raise UnsupportedError(
            "the attention backend CUSTOM is kvserve's and needs a policy: give one in --additional-config, "
            'for example {"kvserve": {"policy": "kivi-2bit"}}, or drop --attention-backend'
        )
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return CPUAttentionBackend
