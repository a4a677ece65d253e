"""Which layers a model has, by its config.json: how many keep a KV cache, and which see the last tokens only.

Layers at the end of a model may read the cache of an earlier one instead of keeping their own (num_kv_shared_layers of
Gemma 3n): each that of the last layer of its kind before them. Wherever layers are counted, those are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvserve.pages.windows import Hybrid

_WINDOW_OFF = ("qwen", "smollm3")  # models that have a window only with use_sliding_window: true
_KINDS_FILLED_IN = ("gemma", "cohere2", "exaone4", "olmo3")  # whose layer_types transformers knows without config.json


def num_layers_of(config: Mapping[str, Any]) -> int | None:
    """Layers of the language model that have a KV cache of their own, or None where the config does not say."""
    keys = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    total = next((int(config[key]) for key in keys if config.get(key)), None)
    return None if total is None else total - num_sharing_of(config)


def num_sharing_of(config: Mapping[str, Any]) -> int:
    """Layers at the end of the language model that read the KV cache of earlier ones."""
    return int(config.get("num_kv_shared_layers") or 0)


def head_dim_of(config: Mapping[str, Any]) -> int | None:
    """head_dim as vLLM derives it, or None where the config does not say."""
    if head_dim := config.get("head_dim"):
        return int(head_dim)
    hidden = config.get("hidden_size") or config.get("n_embd") or config.get("d_model")
    heads = config.get("num_attention_heads") or config.get("n_head") or config.get("n_heads")
    return int(hidden) // int(heads) if hidden and heads else None


def window_of(config: Mapping[str, Any]) -> int | None:
    """Tokens that window layers see, or None where the config has none for sure.

    As vLLM: without layer_types a window is that of all layers. A config.json may leave out what transformers fills in
    (Qwen2 turns its window off, Gemma 3 has it in five of six layers); this only knows those that do.
    """
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    if not isinstance(window, int) or window <= 0:
        return None
    if isinstance(kinds, list):
        return window if "sliding_attention" in kinds else None
    if needs_layer_types(config):
        return None
    is_on = not str(config.get("model_type", "")).startswith(_WINDOW_OFF)
    if not config.get("use_sliding_window", is_on):
        return None
    first, num_layers = config.get("max_window_layers"), num_layers_of(config)
    return None if isinstance(first, int) and num_layers and first >= num_layers else window


def needs_layer_types(config: Mapping[str, Any]) -> bool:
    """Whether a config.json has a window and leaves it to transformers to say in which layers."""
    by_type = "sliding_window_pattern" in config or str(config.get("model_type", "")).startswith(_KINDS_FILLED_IN)
    return bool(config.get("sliding_window")) and not isinstance(config.get("layer_types"), list) and by_type


def hybrid_of(config: Mapping[str, Any], max_model_len: int) -> Hybrid | None:
    """The cached layers of a model that has full ones and window layers; None: all are of one kind, or it does not say.

    Args:
        config: of the language model.
        max_model_len: tokens of the longest request; a window that none exceeds is no window.
    """
    window, kinds = window_of(config), config.get("layer_types")
    if not window or window >= max_model_len or not isinstance(kinds, list):
        return None
    kinds = kinds[: len(kinds) - num_sharing_of(config)]
    num_windows = kinds.count("sliding_attention")
    num_full = len(kinds) - num_windows
    return Hybrid(num_full, num_windows, window, num_sharing_of(config) > 0) if num_full else None
