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

    from kvserve.connectors import is_wrapped
    from kvserve.engine.device import device_type
    from kvserve.engine.identity import check_storage
    from kvserve.engine.settings import EngineSettings
    from kvserve.errors import UnsupportedError

    config = get_current_vllm_config()
    settings = EngineSettings.from_vllm_config(config)
    if settings is not None:
        from kvserve.engine.backend import backend_for

        if is_wrapped(config.kv_transfer_config):  # once an engine, and before anything is loaded
            check_storage(config.kv_transfer_config, settings.identity(config.model_config))
        return backend_for(settings)
    if device_type() != "cpu":
        raise UnsupportedError(
            "the attention backend CUSTOM is kvserve's and needs a policy: give one in --additional-config, "
            'for example {"kvserve": {"policy": "kivi-2bit"}}, or drop --attention-backend'
        )
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return CPUAttentionBackend
