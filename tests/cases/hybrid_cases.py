"""vLLM's own plan of the groups of a model with window layers, under a policy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec, SlidingWindowSpec

from kvserve.engine.backend import backend_for
from kvserve.engine.layer_tables import cache_of
from kvserve.engine.report import EngineReport
from kvserve.engine.settings import EngineSettings
from tests.cases.planning import get_kv_cache_configs


def settings_of(config: VllmConfig) -> EngineSettings:
    settings = EngineSettings.from_vllm_config(config)
    assert settings is not None
    return settings


def layer_specs(config: VllmConfig) -> dict[str, KVCacheSpec]:
    """What every layer with a cache of its own asks vLLM for, in the model's order."""
    model, backend = config.model_config, backend_for(settings_of(config))
    common: dict[str, Any] = {
        "block_size": config.cache_config.block_size, "num_kv_heads": model.get_total_num_kv_heads(),
        "head_size": model.get_head_size(), "dtype": model.dtype,
    }  # fmt: skip
    window = SlidingWindowSpec(**common, sliding_window=model.hf_text_config.sliding_window)
    kinds = {"sliding_attention": window, "full_attention": FullAttentionSpec(**common)}
    with set_current_vllm_config(config):
        return {
            f"layers.{index}": backend.customize_spec(kinds[kind])
            for index, kind in enumerate(model.hf_text_config.layer_types[: cache_of(model).num_layers])
        }


def planned(config: VllmConfig, num_bytes: int) -> KVCacheConfig:
    """What vLLM makes of a pool of so many bytes."""
    (layout,) = backend_for(settings_of(config)).supported_kv_cache_layouts()
    config.cache_config.kv_cache_layout = layout.name
    (plan,) = get_kv_cache_configs(config, [layer_specs(config)], [num_bytes])
    return plan


def report_of(config: VllmConfig, num_blocks: int) -> EngineReport:
    return replace(EngineReport.from_vllm_config(config, settings_of(config)), num_blocks=num_blocks)
