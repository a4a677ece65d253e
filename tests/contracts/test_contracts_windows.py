"""What window layers beside the policy's pages rely on in vLLM, one test per seam."""

from __future__ import annotations

import inspect

import torch
from vllm.v1.attention.backend import AttentionImpl
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, KVCacheLayout, SlidingWindowSpec, UniformTypeKVCacheSpecs

from tests.cases.planning import planner


def window_spec(block_size: int = 16) -> SlidingWindowSpec:
    return SlidingWindowSpec(
        block_size=block_size, num_kv_heads=2, head_size=64, dtype=torch.float32, sliding_window=100
    )


def test_a_layout_packs_layers_side_by_side_in_a_block() -> None:
    assert list(KVCacheLayout.BLHNC.name) == list("BLHNC")
    assert KVCacheLayout.BLHNC.is_block_outermost and KVCacheLayout.BLHNC.is_block_compact
    assert not KVCacheLayout.BHLNC.is_block_compact


def test_a_window_spec_says_how_many_blocks_a_request_may_come_to_hold() -> None:
    assert window_spec().max_admission_blocks_per_request(max_in_flight_tokens=128, max_model_len=1000) == 15 + 1
    assert window_spec().max_admission_blocks_per_request(max_in_flight_tokens=128, max_model_len=90) == 6 + 1


def test_window_layers_ask_the_backend_with_blocks_of_one_token() -> None:
    from vllm.model_executor.layers.attention import Attention

    source = inspect.getsource(Attention.get_kv_cache_spec)
    assert "attn_backend.customize_spec(" in source and "block_size=1," in source


def test_the_window_manager_leaves_null_blocks_in_front() -> None:
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager, SlidingWindowManager

    assert SlidingWindowManager.remove_skipped_blocks is SingleTypeKVCacheManager.remove_skipped_blocks
    assert "blocks[i] = self._null_block" in inspect.getsource(SingleTypeKVCacheManager._remove_blocks_in_range)


def test_a_layer_that_shares_a_cache_joins_the_group_of_its_target_and_has_no_spec() -> None:
    from vllm.v1.worker.utils import add_kv_sharing_layers_to_kv_cache_groups

    group = KVCacheGroupSpec(["layers.0"], window_spec())
    add_kv_sharing_layers_to_kv_cache_groups({"layers.1": "layers.0"}, [group])
    assert group.layer_names == ["layers.0", "layers.1"]
    # Why window pages are as large as the others then: a group of several specs would have none for the second layer.
    specs = UniformTypeKVCacheSpecs.from_specs({"layers.0": window_spec()})
    group = KVCacheGroupSpec(["layers.0"], specs)
    add_kv_sharing_layers_to_kv_cache_groups({"layers.1": "layers.0"}, [group])
    assert "layers.1" not in group.kv_cache_spec.kv_cache_specs


def test_a_layer_hands_its_target_to_the_implementation_and_runs_without_keys() -> None:
    from vllm.model_executor.layers.attention import Attention

    assert list(inspect.signature(AttentionImpl.__init__).parameters)[10] == "kv_sharing_target_layer_name"
    source = inspect.getsource(Attention.forward)
    assert "if key is not None:" in source and "if value is not None:" in source


def test_groups_of_equally_large_pages_have_as_many_layers_as_the_smaller_kind() -> None:
    assert "max_num_layers < min_num_layers * 1.5" in inspect.getsource(planner._get_kv_cache_groups_uniform_page_size)


def test_all_groups_enter_blocks_into_the_prefix_cache_in_one_place() -> None:
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    assert list(inspect.signature(KVCacheCoordinator.cache_blocks).parameters) == [
        "self", "request", "num_computed_tokens",
    ]  # fmt: skip
    assert "self.coordinator.cache_blocks(" in inspect.getsource(KVCacheManager)
    source = inspect.getsource(KVCacheCoordinator.cache_blocks)
    for part in ("retention_interval=self.retention_interval", "replay_boundaries=", "get_num_cacheable_tokens("):
        assert part in source


def test_hits_of_all_groups_are_touched_before_any_block_is_taken() -> None:
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    source = inspect.getsource(KVCacheManager.allocate_slots)
    assert source.index("coordinator.allocate_new_computed_blocks(") < source.index("coordinator.allocate_new_blocks(")


def test_a_connector_that_knows_of_several_groups_leaves_them_on() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import SupportsHMA, supports_hma

    from kvserve.engine.connector import KvserveConnector

    assert SupportsHMA.__abstractmethods__ == {"request_finished_all_groups"}
    assert supports_hma(KvserveConnector)
