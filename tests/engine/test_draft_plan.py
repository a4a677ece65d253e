"""What vLLM plans for a model and its draft model is what the report says; what cannot share a pool is refused."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity, resolve_kv_cache_block_sizes
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec, iter_layer_specs

from kvserve.engine.backend import backend_for
from kvserve.engine.drafts import check_draft_model
from kvserve.engine.settings import EngineSettings
from kvserve.engine.spec import PageSpec
from kvserve.errors import UnsupportedError
from kvserve.pages.drafts import DraftGroup, DraftLayers
from kvserve.policies.loading import load_policy
from tests.cases.hybrid_cases import report_of, settings_of
from tests.cases.layer_cases import engine_config
from tests.cases.planning import get_kv_cache_configs
from tests.cases.tiny_models import FAMILIES, HYBRIDS

MIB, DRAFTS = 2**20, 3
ARCHITECTURES = {"qwen3-qk-norm": "Qwen3ForCausalLM", "gemma3-5-to-1": "Gemma3ForCausalLM"}


def save(folder: Path, family: str) -> Path:
    config = (FAMILIES | HYBRIDS)[family]
    config.architectures = [ARCHITECTURES.get(family, "LlamaForCausalLM")]
    config.save_pretrained(folder / family)
    return folder / family


def config_of(
    folder: Path, policy: str, target: str = "llama-gqa-64", draft: str = "qwen3-qk-norm",
    speculation: dict[str, Any] | None = None, **options: Any,
) -> VllmConfig:  # fmt: skip
    asked = {"method": "draft_model", "model": str(save(folder, draft)), "num_speculative_tokens": DRAFTS}
    return engine_config(save(folder, target), policy, speculative_config=asked | (speculation or {}), **options)


def draft_config_of(config: VllmConfig) -> VllmConfig:
    """The configuration that vLLM builds the draft model with."""
    own = copy(config)
    own.model_config = config.speculative_config.draft_model_config
    own.parallel_config = config.speculative_config.draft_parallel_config
    return own


def dense_spec(config: VllmConfig, model: Any) -> FullAttentionSpec:
    return FullAttentionSpec(
        block_size=config.cache_config.block_size, num_kv_heads=model.get_total_num_kv_heads(),
        head_size=model.get_head_size(), dtype=model.dtype,
    )  # fmt: skip


def layer_specs(config: VllmConfig) -> dict[str, KVCacheSpec]:
    """What every layer of both models asks vLLM for, the draft model's last."""
    specs: dict[str, KVCacheSpec] = {}
    for name, own in (("model", config), ("draft_model", draft_config_of(config))):
        backend, model = backend_for(settings_of(own)), own.model_config
        spec = backend.customize_spec(dense_spec(config, model))
        specs |= {f"{name}.layers.{index}": spec for index in range(model.get_total_num_hidden_layers())}
    return specs


@pytest.mark.parametrize("policy", ["int8", "kivi-2bit", "kv-compress-2bit", "none"])
def test_groups_blocks_and_capacity_are_those_of_the_arithmetic(tmp_path: Path, policy: str) -> None:
    config = config_of(tmp_path, policy)
    settings = settings_of(config)
    (layout,) = backend_for(settings).supported_kv_cache_layouts()
    config.cache_config.kv_cache_layout = layout.name
    (plan,) = get_kv_cache_configs(config, [layer_specs(config)], [64 * MIB])
    report = report_of(config, plan.num_blocks)
    assert plan.num_blocks == 64 * MIB // report.block_bytes
    if settings.drafts is None:  # the dense policy: all layers have the same tokens in the same blocks
        assert [len(group.layer_names) for group in plan.kv_cache_groups] == [4]
        return
    groups = [list(iter_layer_specs(group.kv_cache_spec)) for group in plan.kv_cache_groups]
    assert [type(specs[0]) for specs in groups] == [type(layer_specs(config)["model.layers.0"]), FullAttentionSpec]
    assert [len(group.layer_names) for group in plan.kv_cache_groups] == [2, 2]
    assert resolve_kv_cache_block_sizes(plan, config) == (64, settings.drafts.block_size)
    if not report.layout.policy.eviction:
        lookahead = DRAFTS / settings.drafts.block_size  # which vLLM counts no blocks for
        assert get_kv_cache_capacity(config, plan)[0] == pytest.approx(report.effective_capacity_tokens, rel=lookahead)


def test_the_first_groups_table_is_as_wide_as_the_draft_models(tmp_path: Path) -> None:
    config = config_of(tmp_path, "kivi-2bit")
    specs = layer_specs(config)
    pages, dense = specs["model.layers.0"], specs["draft_model.layers.0"]
    assert isinstance(pages, PageSpec) and dense.block_size < pages.block_size
    assert pages.max_num_blocks_per_req(config, 1000) >= -(-1000 // dense.block_size)


def test_a_draft_models_window_keeps_every_token(tmp_path: Path) -> None:
    config = config_of(tmp_path, "int8")
    backend, given = backend_for(settings_of(draft_config_of(config))), {"num_kv_heads": 2, "head_size": 128}
    window = SlidingWindowSpec(block_size=64, dtype=torch.float32, sliding_window=96, **given)
    spec = backend.customize_spec(window)
    assert type(spec) is FullAttentionSpec and spec.sliding_window == 96
    assert backend.customize_spec(replace(window, block_size=1)).block_size == 1


def test_settings_of_the_draft_models_configuration_are_the_engines(tmp_path: Path) -> None:
    config = config_of(tmp_path, "snapkv")
    settings, own = settings_of(config), settings_of(draft_config_of(config))
    assert own.is_draft and not settings.is_draft and replace(own, is_draft=False) == settings
    assert settings.drafter == DraftLayers(num_layers=2, num_kv_heads=2, head_dim=128)
    assert own.draft_layout().head_dim == 128 and own.layout(64) == settings.layout(64)


@pytest.mark.parametrize(
    ("speculation", "options", "reason"),
    [
        ({}, {"disable_hybrid_kv_cache_manager": True}, "no blocks of their own; drop the option"),
        ({}, {"pipeline_parallel_size": 2, "enforce_eager": False}, "drop --pipeline-parallel-size"),
        ({}, {"block_size": 128}, "take blocks of 64 tokens, got 128; drop --block-size"),
    ],
)
def test_options_that_leave_no_blocks_of_their_own_are_refused(
    tmp_path: Path, speculation: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        EngineSettings.from_vllm_config(config_of(tmp_path, "int8", speculation=speculation, **options))


def test_a_model_with_windows_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"some of this one's have a sliding window; .*--spec-method ngram"):
        EngineSettings.from_vllm_config(config_of(tmp_path, "int8", target="gemma3-5-to-1"))


def test_layers_that_share_a_cache_are_refused_on_either_side(tmp_path: Path) -> None:
    config = config_of(tmp_path, "int8")
    for model in (config.model_config, config.speculative_config.draft_model_config):
        model.hf_config.num_kv_shared_layers = 1
        with pytest.raises(UnsupportedError, match=r"layers that share a KV cache .*; drop the draft model"):
            check_draft_model(config, load_policy("int8"), None)
        model.hf_config.num_kv_shared_layers = 0


@pytest.mark.parametrize("num_layers", [1, 4, 30, 400])
@pytest.mark.parametrize("full_page_bytes", [45_056, 90_000, 262_144])
def test_blocks_are_the_largest_that_the_model_needs_anyway(num_layers: int, full_page_bytes: int) -> None:
    layers = DraftLayers(num_layers, 8, 64)
    group = DraftGroup.choose(layers, full_page_bytes, 32, 64, 2, DRAFTS)
    assert 64 % group.block_size == 0 and group.block_size < 64 and group.page_bytes != full_page_bytes
    assert group.block_bytes == group.full_bytes or group.block_size == 1
    larger = replace(group, block_size=2 * group.block_size)
    assert larger.used_bytes > group.full_bytes or larger.block_size == 64 or larger.page_bytes == full_page_bytes


def test_a_request_holds_blocks_for_what_is_drafted_but_never_beyond_the_longest() -> None:
    group = DraftGroup(DraftLayers(2, 2, 64), 2**20, 256, 16, draft_tokens=3)
    assert [group.blocks_for(tokens, 100) for tokens in (1, 13, 14, 96, 100)] == [1, 1, 2, 7, 7]
