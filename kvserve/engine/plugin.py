"""Entry point of the `vllm.general_plugins` group.

vLLM calls `register` without arguments in every process, possibly more than once, before any config exists. So it only
names a selector that decides once the config is known: for vLLM's CPU backend, which it takes in any case (without a
policy the selector hands vLLM its own backend back), and for the backend CUSTOM, which GPUs take when asked to.
"""

from __future__ import annotations

BACKEND_PATH = "kvserve.engine.selector.backend"


def register() -> None:
    """Seam: `vllm.v1.attention.backends.registry.register_backend`. Idempotent, and inert without a policy."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND_PATH)
    if not AttentionBackendEnum.CUSTOM.is_overridden():  # by another plugin, which stays in place
        register_backend(AttentionBackendEnum.CUSTOM, BACKEND_PATH)
