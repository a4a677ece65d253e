"""Models that no policy can serve, by what their config.json says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kvserve.layer_kinds import head_dim_of

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "attention", "dense", "moe"}
_STATE_MODELS = {
    *("mamba", "mamba2", "falcon_mamba", "falcon_h1", "jamba", "bamba", "zamba", "zamba2", "nemotron_h", "plamo2"),
    *("rwkv", "rwkv6", "rwkv7", "recurrent_gemma", "lfm2", "lfm2_moe", "qwen3_next", "qwen3_5", "qwen3_5_moe"),
    *("kimi_linear", "minimax", "minimax_m1", "bailing_moe_linear", "phi4flash"),
}  # fmt: skip
_ENCODERS = {
    *("bert", "roberta", "xlm-roberta", "camembert", "modernbert", "distilbert", "electra", "albert", "mpnet"),
    *("deberta", "deberta-v2", "nomic_bert", "new", "gte", "snowflake-arctic-embed", "clip", "siglip"),
}  # fmt: skip
_POOLING_SUFFIXES = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForRewardModel")


def _is_mla(config: Mapping[str, Any]) -> bool:
    return bool(config.get("kv_lora_rank"))


def _is_encoder_decoder(config: Mapping[str, Any]) -> bool:
    return bool(config.get("is_encoder_decoder"))


def _is_encoder_only(config: Mapping[str, Any]) -> bool:
    architectures = config.get("architectures") or []
    pooling = bool(architectures) and all(str(a).endswith(_POOLING_SUFFIXES) for a in architectures)
    # A decoder-only mode of BERT exists (is_decoder), but no such checkpoint is served for generation.
    return pooling or (config.get("model_type") in _ENCODERS and "text_config" not in config)


def _keeps_state(config: Mapping[str, Any]) -> bool:
    layers = config.get("layer_types") or config.get("layers_block_type")
    if isinstance(layers, list):
        return any(isinstance(kind, str) and kind not in _ATTENTION_LAYERS | {"chunked_attention"} for kind in layers)
    return config.get("model_type") in _STATE_MODELS or any(
        config.get(key) for key in ("hybrid_override_pattern", "attn_layer_period", "linear_attn_config", "ssm_cfg")
    )


def _is_chunked(config: Mapping[str, Any]) -> bool:
    return bool(config.get("attention_chunk_size") or config.get("dual_chunk_attention_config"))


def _has_alibi(config: Mapping[str, Any]) -> bool:
    nested = config.get("attn_config")
    return (
        bool(config.get("alibi"))
        or config.get("model_type") == "bloom"
        or str(config.get("position_embedding_type", "")).lower() == "alibi"
        or (isinstance(nested, Mapping) and bool(nested.get("alibi")))
    )


def _brings_backend(config: Mapping[str, Any]) -> bool:
    return str(config.get("model_type", "")).startswith(_OWN_BACKEND) or bool(config.get("v_channels"))


# Models that name a backend for their layers; openPangu, too (v_channels). Others are found once they are built.
_OWN_BACKEND = ("deepseek_v4", "inkling", "minimax_m3", "qwen4_exp")


def _has_mixed_rows(config: Mapping[str, Any]) -> bool:
    return _differs(config.get("v_head_dim"), head_dim_of(config))


def _has_mixed_layers(config: Mapping[str, Any]) -> bool:
    by_layer = config.get("per_layer_config")  # transformers' form of Gemma 4
    layers = by_layer.values() if isinstance(by_layer, Mapping) else ()
    head_dims = [config.get("global_head_dim"), *_each(layers, "head_dim")]
    kv_heads = [config.get("num_global_key_value_heads"), *_each(layers, "num_key_value_heads")]
    usual_dim, usual_heads = head_dim_of(config), config.get("num_key_value_heads")
    return any(_differs(dim, usual_dim) for dim in head_dims) or any(_differs(n, usual_heads) for n in kv_heads)


def _each(layers: Iterable[Any], name: str) -> list[Any]:
    return [layer.get(name) for layer in layers if isinstance(layer, Mapping)]


def _differs(one: Any, usual: Any) -> bool:
    """Whether both are there, and not the same."""
    return bool(one and usual) and one != usual


# The order matters only where two apply: the more telling reason comes first.
REFUSED: tuple[tuple[str, Callable[[Mapping[str, Any]], bool]], ...] = (
    ("uses multi-head latent attention (kv_lora_rank), whose cache has another shape", _is_mla),
    ("is an encoder-decoder model, kvserve caches decoder self-attention only", _is_encoder_decoder),
    ("is an encoder or pooling model, it keeps no KV cache between steps", _is_encoder_only),
    ("brings an attention backend of its own, so that no policy would apply to its layers", _brings_backend),
    ("has layers that keep a state instead of a KV cache (mamba, linear attention, convolution)", _keeps_state),
    ("uses chunked local attention, which kvserve's kernels do not implement", _is_chunked),
    ("uses ALiBi position biases, which kvserve's kernels do not implement", _has_alibi),
    ("has keys and values of different head_dim, which kvserve does not support", _has_mixed_rows),
    (
        "has layers of different shape (head_dim 256 and 512 in Gemma 4): kvserve's pages have one head_dim, up to 256",
        _has_mixed_layers,
    ),
)
