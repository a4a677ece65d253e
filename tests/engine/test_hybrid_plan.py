"""What vLLM plans for models with window layers among full ones is what the report says; what cannot be is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3nTextConfig, Gemma3TextConfig, Olmo3Config, PretrainedConfig
from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity, resolve_kv_cache_block_sizes
from vllm.v1.kv_cache_interface import SlidingWindowSpec, UniformTypeKVCacheSpecs, create_kv_cache_views

from kvserve.checks import check_windows
from kvserve.engine.backend import backend_for
from kvserve.engine.spec import PageSpec
from kvserve.errors import UnsupportedError
from kvserve.layer_kinds import hybrid_of, window_of
from kvserve.pages.kept import in_strips, num_layers_of
from kvserve.pages.windows import Hybrid
from kvserve.policies.loading import load_policy
from tests.cases.hybrid_cases import layer_specs, planned, report_of, settings_of
from tests.cases.layer_cases import engine_config
from tests.cases.tiny_models import FULL, HYBRIDS, WINDOW

GIB = 2**30
SMALL: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 256, "max_position_embeddings": 8192,
}  # fmt: skip
SHAPES: dict[str, PretrainedConfig] = {
    **HYBRIDS,
    "gemma3-1b": Gemma3TextConfig(
        **SMALL, num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=512
    ),
    "gemma3-27b": Gemma3TextConfig(
        **SMALL, num_hidden_layers=62, num_attention_heads=32, num_key_value_heads=16, head_dim=128,
        sliding_window=1024,
    ),
    "gemma3n-e4b": Gemma3nTextConfig(
        **{**SMALL, "intermediate_size": [256] * 35}, num_hidden_layers=35, num_attention_heads=8,
        num_key_value_heads=2, head_dim=256, sliding_window=512, num_kv_shared_layers=15,
        layer_types=([WINDOW] * 4 + [FULL]) * 7, vocab_size_per_layer_input=512,
    ),
    "olmo3-7b": Olmo3Config(
        **{**SMALL, "hidden_size": 4096}, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
        sliding_window=4096, pad_token_id=0,
    ),
}  # fmt: skip


def config_of(folder: Path, shape: str, policy: str, **options: Any) -> VllmConfig:
    family = next(name for name in ("Olmo3", "Gemma3n", "Gemma4", "Gemma3") if shape.startswith(name.lower()))
    SHAPES[shape].architectures = [f"{family}ForCausalLM"]
    SHAPES[shape].save_pretrained(folder)
    return engine_config(folder, policy, **options)


def first_spec(group: Any) -> Any:
    """Of a group's layers, which are alike."""
    return next(iter(getattr(group.kv_cache_spec, "kv_cache_specs", {"": group.kv_cache_spec}).values()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("policy", ["kivi-2bit", "int8", "kv-compress-2bit", "dense"])
def test_groups_blocks_and_capacity_are_those_of_the_arithmetic(tmp_path: Path, shape: str, policy: str) -> None:
    config = config_of(tmp_path, shape, policy, max_model_len=1024 if shape in HYBRIDS else 8192)
    plan = planned(config, 8 * GIB)
    report = report_of(config, plan.num_blocks)
    shared = getattr(SHAPES[shape], "num_kv_shared_layers", 0)
    windows, kinds = report.windows, SHAPES[shape].layer_types[: len(SHAPES[shape].layer_types) - shared]
    counts = (kinds.count(FULL), kinds.count(WINDOW))
    assert windows.hybrid == Hybrid(*counts, SHAPES[shape].sliding_window, is_shared=shared > 0)
    specs = [first_spec(group) for group in plan.kv_cache_groups]
    # vLLM has no spec for a layer that reads another's cache in groups of the first kind.
    assert {isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs) for group in plan.kv_cache_groups} == {not shared}
    pages = [group for group, spec in zip(plan.kv_cache_groups, specs, strict=True) if isinstance(spec, PageSpec)]
    assert [len(group.layer_names) for group in pages] == [windows.hybrid.num_full]
    assert [type(spec) for spec in specs].count(SlidingWindowSpec) == windows.num_groups == len(specs) - 1
    assert plan.num_blocks == 8 * GIB // report.block_bytes
    assert resolve_kv_cache_block_sizes(plan, config) == (64, windows.block_size)
    if not report.layout.policy.eviction:
        assert get_kv_cache_capacity(config, plan)[0] == report.effective_capacity_tokens


@pytest.mark.parametrize("shape", ["gemma3-5-to-1", "gemma3n-shared"])
def test_every_byte_of_a_block_is_one_layers_in_each_group(tmp_path: Path, shape: str) -> None:
    config = config_of(tmp_path, shape, "kivi-2bit")
    plan = planned(config, 2**23)
    (layout,) = backend_for(settings_of(config)).supported_kv_cache_layouts()
    layouts, pool = settings_of(config).layout(64), torch.zeros(plan.kv_cache_tensors[0].size, dtype=torch.int8)
    for group in plan.kv_cache_groups:
        pool.zero_()
        for tensor in plan.kv_cache_tensors:
            if tensor.layers[0] not in group.layer_names:
                continue
            spec = first_spec(group)
            for place, view in enumerate(create_kv_cache_views(pool, spec, plan.num_blocks, layout, tensor)):
                cells = view.view(torch.uint8)
                if isinstance(spec, PageSpec):
                    cells = in_strips(cells, 2)
                    assert num_layers_of(cells, layouts) == (2, place)
                cells += 1
        pool_bytes = len(group.layer_names) * plan.num_blocks * spec.unpadded_page_size_bytes
        assert pool.max() == 1 and int(pool.sum(dtype=torch.int64)) == pool_bytes


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager lets window layers keep"),
        ({"pipeline_parallel_size": 2, "enforce_eager": False}, "drop --pipeline-parallel-size"),
        ({"block_size": 128}, "take blocks of 64 tokens, got 128; drop --block-size"),
    ],
)
@pytest.mark.parametrize("policy", ["kivi-2bit", "kv-compress-2bit"])
def test_options_that_need_one_group_are_refused(tmp_path: Path, options: dict, reason: str, policy: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        settings_of(config_of(tmp_path, "gemma3-5-to-1", policy, **options))


def test_where_no_request_exceeds_the_window_all_layers_have_pages(tmp_path: Path) -> None:
    for policy in ("kivi-2bit", "kv-compress-2bit"):
        config = config_of(tmp_path, "gemma3-5-to-1", policy, max_model_len=96, disable_hybrid_kv_cache_manager=True)
        assert settings_of(config).hybrid is None and settings_of(config).num_layers == 12
        assert len({type(spec) for spec in layer_specs(config).values()}) == 1
        assert len(planned(config, 2**24).kv_cache_groups) == 1


@pytest.mark.parametrize(
    ("policy", "change"), [("snapkv", "eviction.spare_layers=[0]"), ("kivi-2bit", "layers={0: int8}")]
)
def test_policies_that_name_layers_are_refused(policy: str, change: str) -> None:
    config = SHAPES["gemma3-1b"].to_dict()
    with pytest.raises(UnsupportedError, match=r"names layers .*22 layers of it attend to the last 512 tokens only"):
        check_windows(config, load_policy(policy, [change]), 1000, "it")
    check_windows(config, load_policy(policy, [change]), 512, "it")
    check_windows(config, load_policy(policy), 1000, "it")


def test_a_config_without_kinds_of_layers_leaves_it_to_transformers() -> None:
    config = {"model_type": "gemma3_text", "sliding_window": 512, "num_hidden_layers": 26}
    assert window_of(config) is None and hybrid_of(config, 1000) is None
    assert hybrid_of(config | {"layer_types": SHAPES["gemma3-1b"].layer_types}, 1000) == Hybrid(4, 22, 512)
    assert hybrid_of(config | {"layer_types": SHAPES["gemma3-1b"].layer_types}, 512) is None


def test_blocks_of_another_size_than_the_layouts_are_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, "gemma3-5-to-1", "kivi-2bit")
    pages = next(spec for spec in layer_specs(config).values() if isinstance(spec, PageSpec))
    with pytest.raises(ValueError, match="blocks of 64 tokens, and vLLM makes them 128; set --block-size 64"):
        replace(pages, block_size=128)
