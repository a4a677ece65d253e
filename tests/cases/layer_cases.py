"""vLLM's configuration of a model, and attention layers as its models build them, without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.selector import _cached_get_attn_backend

from kvserve.engine import plugin
from kvserve.engine.settings import scheduler_options
from kvserve.policies.loading import load_policy


def engine_config(model: Path, policy: str, **options: Any) -> VllmConfig:
    """What an engine of `model` with `policy` would run with."""
    plugin.register()
    _cached_get_attn_backend.cache_clear()  # its key does not know the policy
    settings: dict[str, Any] = {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "block_size": 64, "skip_tokenizer_init": True,
        "additional_config": {"kvserve": {"policy": policy}}, "max_num_seqs": 8, "max_num_batched_tokens": 128,
    }  # fmt: skip
    if load_policy(policy).eviction:
        settings |= scheduler_options()
    return EngineArgs(model=str(model), **(settings | options)).create_engine_config()


def attention_layer(config: VllmConfig, name: str, **options: Any) -> Attention:
    """A layer of 4 query and 2 KV heads of 64 channels, registered under `name`; `config` is the current one."""
    return Attention(4, 64, 0.125, num_kv_heads=2, cache_config=config.cache_config, prefix=name, **options)
