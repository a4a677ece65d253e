"""Who gives no --block-size gets blocks of one tile, with every vLLM of the tested range; who gives one gets that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import CacheConfig, set_current_vllm_config
from vllm.platforms import current_platform

from kvserve.engine.report import EngineReport
from kvserve.engine.settings import EngineSettings
from kvserve.errors import UnsupportedError
from tests.cases.engine_cases import engine, generate, prompt_logprobs, random_prompts, tokens
from tests.cases.layer_cases import attention_layer, engine_config
from tests.cases.tiny_models import make_tiny_model

LAYERS = ("model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn")


def built(model: Path, policy: str, **options: Any) -> tuple[Any, list[Any]]:
    """A configuration and its layers, after vLLM has asked their backends for a block size."""
    config = engine_config(model, policy, **options)
    with set_current_vllm_config(config):
        layers = [attention_layer(config, name) for name in LAYERS]
        current_platform.update_block_size_for_backend(config)
    return config, layers


@pytest.mark.parametrize("policy", ["none", "kivi-2bit", "snapkv"])
def test_without_a_block_size_pages_specs_and_vllm_agree_on_one_tile(tmp_path: Path, policy: str) -> None:
    config, layers = built(make_tiny_model("llama-gqa-64", tmp_path), policy, block_size=None)
    assert config.cache_config.block_size == 64 and not config.cache_config.user_specified_block_size
    settings = EngineSettings.from_vllm_config(config)
    assert settings is not None and (settings.block_size_asked, settings.block_size) == (None, 64)
    for layer in layers:
        spec = layer.get_attn_backend().customize_spec(layer.get_kv_cache_spec(config))
        assert spec.block_size == layer.impl.layout.block_size == 64


def test_a_block_size_that_was_asked_for_stays_and_is_reported(tmp_path: Path) -> None:
    config, layers = built(make_tiny_model("llama-gqa-64", tmp_path), "kivi-2bit", block_size=128)
    assert config.cache_config.block_size == layers[0].impl.layout.block_size == 128
    settings = EngineSettings.from_vllm_config(config)
    assert settings is not None
    assert "128 requested, 128 tokens in effect" in EngineReport.from_vllm_config(config, settings).table()


def test_the_startup_table_says_that_nobody_asked(tmp_path: Path) -> None:
    config = engine_config(make_tiny_model("llama-gqa-64", tmp_path), "kivi-2bit", block_size=None)
    settings = EngineSettings.from_vllm_config(config)
    assert settings is not None
    assert "auto requested, 64 tokens in effect" in EngineReport.from_vllm_config(config, settings).table()


def test_only_a_block_size_that_somebody_gave_is_refused(tmp_path: Path) -> None:
    model = make_tiny_model("llama-gqa-64", tmp_path)
    config = engine_config(model, "kivi-2bit", block_size=32)
    with pytest.raises(UnsupportedError, match=r"--block-size must be a multiple of .*64.*got 32"):
        EngineSettings.from_vllm_config(config)
    config = engine_config(model, "kivi-2bit", block_size=None)
    config.cache_config.block_size = CacheConfig.DEFAULT_BLOCK_SIZE  # vLLM's placeholder
    assert EngineSettings.from_vllm_config(config).block_size == 64  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["none", "kivi-2bit", "snapkv"])
def test_an_engine_without_a_block_size_serves_as_one_with_blocks_of_a_tile(tmp_path: Path, policy: str) -> None:
    model, prompts, found = make_tiny_model("llama-gqa-64", tmp_path), random_prompts([5, 64, 333]), {}
    for asked in (None, 64):
        with engine(model, policy, block_size=asked, skip_tokenizer_init=True) as llm:
            core = llm.llm_engine.engine_core.engine_core
            assert core.scheduler.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size == 64
            assert core.vllm_config.cache_config.block_size == 64
            found[asked] = generate(llm, prompts)
    for one, other in zip(found[None], found[64], strict=True):
        assert tokens(one) == tokens(other)
        assert torch.allclose(torch.tensor(prompt_logprobs(one)), torch.tensor(prompt_logprobs(other)), atol=1e-4)
    if policy == "snapkv":
        assert found[None][2].kv_transfer_params["kvserve"]["rate_effective"] > 1.5
