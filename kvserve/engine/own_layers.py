"""Whether every layer with a KV cache is kvserve's: a model may name another attention backend for some of its layers.

It is asked as soon as the weights are there, by the first layer that is kvserve's (KvserveImpl); where none is, by the
server before it answers (engine/endpoint.py), or at the first request of an `LLM(...)` (engine/request_check.py).

Seams: `CompilationConfig.static_forward_context`, where vLLM keeps the attention layers by name, and
`AttentionLayerBase.get_kv_cache_spec`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvserve.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def check_own_layers(config: VllmConfig, own: type) -> None:
    """Refuse a model with layers whose cache would stay as vLLM has it.

    Args:
        own: the class of kvserve's implementations of a layer.

    Raises:
        UnsupportedError: counting them.
    """
    context: dict[str, Any] = config.compilation_config.static_forward_context
    cached = {name: layer for name, layer in context.items() if _has_cache(layer, config, own)}
    others = {name: layer for name, layer in cached.items() if not isinstance(getattr(layer, "impl", None), own)}
    if others:
        first, layer = next(iter(others.items()))
        raise UnsupportedError(
            f"{len(others)} of the {len(cached)} layers with a KV cache bring their own attention backend "
            f"({first}: {_backend_name(layer)}), so the policy would not apply to them; serve this model with stock "
            "vLLM, without kvserve"
        )


def _has_cache(layer: Any, config: VllmConfig, own: type) -> bool:
    if isinstance(getattr(layer, "impl", None), own):
        return True
    return hasattr(layer, "get_kv_cache_spec") and layer.get_kv_cache_spec(config) is not None


def _backend_name(layer: Any) -> str:
    return str(layer.get_attn_backend().get_name()) if hasattr(layer, "get_attn_backend") else type(layer).__name__
