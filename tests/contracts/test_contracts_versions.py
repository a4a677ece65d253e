"""What differs between the vLLM versions of the tested range, found in the one that is installed."""

from __future__ import annotations

import inspect

import pytest

from kvserve.compat import check_vllm_version, describe_range
from kvserve.engine.moved import PLACES, moved
from tests.contracts.test_contracts import parameters


def test_the_installed_vllm_is_in_the_tested_range() -> None:
    from vllm import __version__

    assert check_vllm_version().split("+")[0] == __version__.split("+")[0], "metadata and files are of one version"
    assert describe_range() == ">=0.32.0,<0.34"


@pytest.mark.parametrize("name", PLACES)
def test_a_name_that_moved_is_found(name: str) -> None:
    assert callable(moved(name)) and moved(name).__name__ == name


def test_a_servers_arguments_are_made_checked_and_given_to_the_environment_by_what_moved() -> None:
    assert parameters(moved("make_arg_parser")) == ["parser"]
    assert parameters(moved("validate_parsed_serve_args")) == ["args"]
    assert parameters(moved("cli_env_setup")) == []


def test_vllm_knows_whether_the_user_chose_the_block_size() -> None:
    from vllm.config import CacheConfig

    assert not CacheConfig().user_specified_block_size and CacheConfig().block_size is not None
    asked = CacheConfig(block_size=64)
    assert asked.user_specified_block_size and asked.block_size == 64


def test_a_backend_is_asked_for_a_block_size_where_the_user_gave_none() -> None:
    from vllm.platforms.interface import Platform
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.executor import uniproc_executor

    assert parameters(AttentionBackend.get_preferred_block_size) == ["default_block_size"]
    source = inspect.getsource(Platform._preferred_block_size_for_backends)
    assert "get_preferred_block_size(default_block_size)" in source
    source = inspect.getsource(uniproc_executor)
    assert source.index(".load_model()") < source.index("update_block_size_for_backend("), "after the layers are built"


def test_layers_read_the_block_size_after_they_were_loaded() -> None:
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.v1.engine.core import EngineCore

    assert "vllm_config.cache_config.block_size" in inspect.getsource(Attention.get_kv_cache_spec)
    source = inspect.getsource(EngineCore._initialize_kv_caches)
    assert "vllm_config.cache_config.block_size = min(" in source, "the scheduler follows the layers"


def test_a_request_has_hashes_of_blocks_as_the_pool_counts_them() -> None:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.request import Request

    assert BlockPool(4, enable_caching=True, hash_block_size=16).hash_block_size == 16
    assert "self._block_hashes" in inspect.getsource(Request) or "self.block_hashes" in inspect.getsource(Request)


def test_vllm_says_whether_images_are_seen_in_both_directions() -> None:
    from vllm.config import ModelConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention.attention import Attention

    assert "self.model_arch_config.is_mm_prefix_lm" in inspect.getsource(ModelConfig)
    assert hasattr(ModelConfig, "is_mm_prefix_lm")
    assert "model_config.is_mm_prefix_lm" in inspect.getsource(Attention.__init__)
    assert "language_model_only" in EngineArgs.__dataclass_fields__


def test_gemma_3_sees_images_in_both_directions_unless_it_gets_none() -> None:
    from transformers import Gemma3Config
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    config = Gemma3Config()
    convertor = ModelArchConfigConvertorBase(config, config.text_config)
    assert convertor.is_mm_prefix_lm(supports_multimodal=True)
    assert not convertor.is_mm_prefix_lm(supports_multimodal=False)


def test_how_vllm_divides_memory_is_asked_of_its_own_functions() -> None:
    from tests.cases import planning

    names = ("get_kv_cache_configs", "get_kv_cache_config_from_groups", "get_kv_cache_groups")
    assert all(callable(getattr(planning.planner, name)) for name in names)
