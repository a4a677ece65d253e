"""One test per vLLM symbol that kvserve relies on. A failure here names the seam that a vLLM upgrade moved."""

from __future__ import annotations

import inspect

import pytest


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_cpu_backend_path_can_be_overridden() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from kvserve.engine.plugin import BACKEND_PATH, register

    register()
    register()
    assert AttentionBackendEnum.CPU_ATTN.get_path() == BACKEND_PATH


def test_cpu_platform_takes_the_overridable_path() -> None:
    from vllm.platforms.cpu import CpuPlatform

    assert "AttentionBackendEnum.CPU_ATTN.get_path()" in inspect.getsource(CpuPlatform.get_attn_backend_cls)


def test_backend_classes_are_resolved_by_attribute_access() -> None:
    from vllm.v1.attention import selector

    assert "resolve_obj_by_qualname" in inspect.getsource(selector._cached_get_attn_backend)


def test_backend_may_swap_the_spec_class() -> None:
    from vllm.v1.worker.utils import customize_attention_spec

    assert "backend.customize_spec(spec)" in inspect.getsource(customize_attention_spec)


def test_spec_fields_that_size_a_block() -> None:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, replace_as

    spec = FullAttentionSpec(block_size=64, num_kv_heads=3, head_size=64, dtype=torch.uint8, state_content_bytes=43)
    assert spec.page_size_bytes == 3 * 64 * 43
    assert replace_as(spec, FullAttentionSpec) == spec


def test_layout_with_one_page_per_head_and_layer_exists() -> None:
    from vllm.v1.kv_cache_interface import KVCacheLayout

    assert [axis for axis in KVCacheLayout.BHLNC.name] == list("BHLNC")


def test_spec_registry_takes_a_manager_class() -> None:
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

    assert parameters(register_kv_cache_spec) == ["manager_class", "uniform_type_base_spec"]
    assert "vllm_config" in parameters(KVCacheSpecRegistry._ensure_registered)


@pytest.mark.parametrize(
    ("method", "first_parameters"),
    [
        ("get_num_blocks_to_allocate", ["self", "request_id", "num_tokens", "new_computed_blocks"]),
        ("allocate_new_blocks", ["self", "request_id", "num_tokens", "num_tokens_main_model"]),
        ("add_local_computed_blocks", ["self", "request_id", "new_computed_blocks", "num_local_computed_tokens",
                                       "num_external_computed_tokens"]),
        ("cache_blocks", ["self", "request", "num_tokens"]),
        ("pop_blocks_for_free", ["self", "request_id"]),
    ],
)  # fmt: skip
def test_manager_method_keeps_its_parameters(method: str, first_parameters: list[str]) -> None:
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

    assert parameters(getattr(FullAttentionManager, method))[: len(first_parameters)] == first_parameters


def test_prefix_hit_lookup_keeps_its_parameters() -> None:
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

    expected = ["block_hashes", "max_length", "kv_cache_group_ids", "block_pool", "kv_cache_spec"]
    assert parameters(FullAttentionManager.find_longest_cache_hit)[:5] == expected


def test_block_pool_keeps_what_the_sinks_use() -> None:
    """A block with a hash that is not in vLLM's map waits in the order of its last use, and loses it in silence."""
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

    assert make_block_hash_with_group_id(b"hash", 1)[:-4] == b"hash"
    pool = BlockPool(4, enable_caching=True, hash_block_size=64, enable_kv_cache_events=True)
    blocks = pool.get_new_blocks(3)
    assert all(pool.blocks[block.block_id] is block for block in blocks)
    blocks[1].set_block_hash(make_block_hash_with_group_id(b"sinks", 0), num_tokens=4)
    pool.free_blocks(blocks)
    assert pool.get_new_blocks(3)[-1] is blocks[1], "it goes last"
    assert blocks[1].block_hash is None and pool.take_events() == []
    blocks[0].set_block_hash(make_block_hash_with_group_id(b"sinks", 0), num_tokens=4)
    pool.free_blocks(blocks)
    assert pool.reset_prefix_cache() and blocks[0].block_hash is None


def test_builder_gets_lengths_and_rows() -> None:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    needed = {
        "query_start_loc",
        "seq_lens",
        "num_reqs",
        "num_actual_tokens",
        "max_query_len",
        "block_table_tensor",
        "causal",
    }
    assert needed <= set(CommonAttentionMetadata.__dataclass_fields__)


def test_implementation_gets_the_layer_parameters() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    from kvserve.engine.backend import KvserveImpl

    assert parameters(KvserveImpl.__init__) == parameters(CPUAttentionBackendImpl.__init__)
    assert parameters(KvserveImpl.forward) == parameters(CPUAttentionBackendImpl.forward)


def test_a_layer_is_registered_in_order_and_after_its_implementation_was_made() -> None:
    from vllm.model_executor.layers.attention import Attention

    source = inspect.getsource(Attention.__init__)
    made, registered = "impl_cls(", "compilation_config.static_forward_context[prefix] = self"
    assert 0 < source.index(made) < source.index(registered)


def test_layers_lie_in_the_arena_in_the_order_in_which_they_were_registered() -> None:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout
    from vllm.v1.worker import gpu_model_runner

    from tests.cases.planning import get_kv_cache_config_from_groups, get_kv_cache_groups

    config = VllmConfig()
    config.cache_config.kv_cache_layout = KVCacheLayout.BHLNC.name
    spec = FullAttentionSpec(block_size=64, num_kv_heads=3, head_size=64, dtype=torch.uint8, state_content_bytes=43)
    names = [f"model.layers.{index}.self_attn.attn" for index in range(12)]
    groups = get_kv_cache_groups(config, dict.fromkeys(names, spec))
    found = get_kv_cache_config_from_groups(config, groups, 100 * 12 * spec.page_size_bytes)
    (tensor,) = found.kv_cache_tensors
    assert [list(group.layer_names) for group in groups] == [names] and list(tensor.layers) == names
    assert (tensor.offset, tensor.layer_stride, tensor.block_stride) == (0, 64 * 43, 12 * spec.page_size_bytes)
    source = inspect.getsource(gpu_model_runner.GPUModelRunner.get_kv_cache_spec)
    assert "get_layers_from_vllm_config" in source


def test_a_logits_processor_that_does_nothing_suits_both_model_runners() -> None:
    from types import SimpleNamespace

    from kvserve.engine.request_check import RequestCheck

    config = SimpleNamespace(additional_config={})
    of_v1, of_v2 = RequestCheck(config, "cpu", False), RequestCheck(config, None)
    assert of_v1.is_argmax_invariant() and of_v1.update_state(None) is None and of_v1.apply("logits") == "logits"
    assert of_v2.add_request(0, None) is False and of_v2.apply("logits", "context") == "logits"


def test_generators_of_a_cpu_cannot_be_set_back_as_vllm_does_it() -> None:
    import torch
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_input_batch import InputBatch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    from kvserve.engine.cpu_worker import SeededCpuWorker
    from kvserve.engine.settings import CPU_WORKER_PATH

    with pytest.raises(RuntimeError):
        torch.Generator(device="cpu").get_offset()
    source = inspect.getsource(GPUModelRunner._bookkeeping_sync)
    assert "gen = self.input_batch.generators.get(int(i))" in source and "self.discard_request_mask.np" in source
    assert "generators=self.generators" in inspect.getsource(InputBatch._make_sampling_metadata)
    sampling = inspect.getsource(GPUModelRunner.sample_tokens)
    assert "self._sample(" in sampling and "self._bookkeeping_sync(" in sampling
    assert "self.model_runner.sample_tokens(" in inspect.getsource(Worker.sample_tokens)
    assert "sample_tokens" not in vars(CPUWorker)
    assert CPU_WORKER_PATH == f"{SeededCpuWorker.__module__}.{SeededCpuWorker.__qualname__}"


def test_config_carries_additional_config() -> None:
    from vllm.config import VllmConfig

    assert "additional_config" in VllmConfig.__dataclass_fields__


def test_the_scheduler_may_be_made_by_a_function() -> None:
    from vllm.config.scheduler import SchedulerConfig

    assert "resolve_obj_by_qualname(self.scheduler_cls)" in inspect.getsource(SchedulerConfig.get_scheduler_cls)


def test_the_scheduler_clips_steps_of_running_and_waiting_requests() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    assert parameters(Scheduler._mamba_block_aligned_split) == [
        "self", "request", "num_new_tokens", "num_new_local_computed_tokens", "num_external_computed_tokens",
    ]  # fmt: skip
    source = inspect.getsource(Scheduler.schedule)
    assert source.count("self._mamba_block_aligned_split(") == 2
    assert source.count("if self.need_mamba_block_aligned_split:") == 2


def test_the_connector_learns_of_requests_and_of_the_block_manager() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    assert "self.connector.on_new_request(request)" in inspect.getsource(Scheduler.add_request)
    assert "self.connector.bind_kv_cache_manager(self.kv_cache_manager)" in inspect.getsource(Scheduler.__init__)
    assert "self.connector.request_finished(" in inspect.getsource(Scheduler._connector_finished)


def test_model_runner_v1_hears_from_the_connector_before_it_builds_the_attention_metadata() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    source = inspect.getsource(GPUModelRunner.execute_model)
    assert source.index("handle_preemptions(") < source.index("_build_attention_metadata(")


def test_blocks_are_given_back_by_the_tokens_whose_steps_are_over() -> None:
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    source = inspect.getsource(KVCacheManager.allocate_slots)
    assert "total_computed_tokens - request.num_in_flight_tokens" in source
    assert source.index("remove_skipped_blocks(") < source.index("allocate_new_blocks(")


def test_a_workers_metadata_reaches_the_scheduler_with_each_step() -> None:
    from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata
    from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
    from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

    source = inspect.getsource(KVConnectorModelRunnerMixin._get_kv_connector_output)
    assert source.count("kv_connector.build_connector_worker_meta()") == 1
    assert "aggregated_kv_connector_worker_meta.aggregate(" in inspect.getsource(KVOutputAggregator.aggregate)
    assert parameters(KVConnectorWorkerMetadata.aggregate) == ["self", "other"]
    assert "kv_connector_worker_meta" in KVConnectorOutput.__dataclass_fields__
    assert "kv_connector_output" in ModelRunnerOutput.__dataclass_fields__


def test_the_scheduler_finishes_requests_inside_update_from_output() -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    assert parameters(Scheduler.update_from_output) == ["self", "scheduler_output", "model_runner_output"]
    assert "self._free_request(request)" in inspect.getsource(Scheduler.update_from_output)
    assert AsyncScheduler.update_from_output is Scheduler.update_from_output


def test_a_request_can_be_ended_with_an_error_and_a_reason_before_the_next_outputs() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
    from vllm.v1.request import Request, RequestStatus

    assert parameters(Scheduler.add_request) == ["self", "request"]
    assert parameters(Scheduler.finish_requests) == ["self", "request_ids", "finished_status"]
    assert RequestStatus.get_finished_reason(RequestStatus.FINISHED_ERROR) == FinishReason.ERROR
    assert "self.finished_req_ids.add(" in inspect.getsource(Scheduler._free_request)  # so another step follows
    assert "if self.finished_req_ids:" in inspect.getsource(Scheduler.has_finished_requests)
    last = EngineCoreOutput("name", [], finish_reason=FinishReason.ERROR, stop_reason="why", kv_transfer_params={})
    assert EngineCoreOutputs().outputs is not EngineCoreOutputs(outputs=[last]).outputs
    assert {"client_index", "take_events", "trace_headers", "resumable", "max_tokens"} <= set(
        dir(Request) + inspect.getsource(Request.__init__).replace("self.", " ").replace(":", " ").split()
    )
    source = inspect.getsource(Scheduler.schedule)
    refused, pending = source.index("if new_blocks is not None:"), source.index("has_pending_block_frees()")
    assert refused < pending < source.index("preempted_req = max(")
    assert parameters(KVConnectorBase_V1.has_pending_block_frees) == ["self"]


def test_what_bounds_a_step() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    source = inspect.getsource(Scheduler.schedule)
    assert "token_budget = self.max_num_scheduled_tokens" in source
    assert "input_budget = self.scheduler_config.max_num_batched_tokens" in source
    assert "not self.scheduler_config.enable_chunked_prefill" in source
    assert "self.max_num_active_reqs" in source and "long_prefill_token_threshold" in source


def test_a_step_without_tokens_hands_its_metadata_to_the_connector_too() -> None:
    from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    source = inspect.getsource(GPUModelRunner.execute_model)
    assert source.index("handle_preemptions(") < source.index("kv_connector_no_forward(")
    assert "self.pre_forward(" in inspect.getsource(ActiveKVConnector.no_forward)


def test_a_block_says_whether_it_is_the_null_block() -> None:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

    assert {"block_id", "is_null"} <= set(KVCacheBlock.__dataclass_fields__)


def test_a_request_tells_computed_tokens_from_those_under_way() -> None:
    from vllm.v1.request import Request

    source = inspect.getsource(Request.__init__)
    assert "self.num_computed_tokens = " in source and "self.num_in_flight_tokens = " in source


def test_a_models_rotary_embeddings_are_kept_by_vllm() -> None:
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
    from vllm.model_executor.layers.rotary_embedding.llama3_rope import Llama3RotaryEmbedding

    assert isinstance(_ROPE_DICT, dict)
    assert issubclass(Llama3RotaryEmbedding, RotaryEmbedding)
    assert parameters(RotaryEmbedding._compute_inv_freq) == ["self", "base"]
    assert {"base", "is_neox_style"} <= set(parameters(RotaryEmbedding.__init__))


def test_logits_processors_see_every_change_of_the_batch_and_growing_outputs() -> None:
    from vllm import LLM, SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

    assert "logits_processors" in parameters(LLM.__init__)
    assert "extra_args" in parameters(SamplingParams)
    assert parameters(process_dict_updates) == ["req_entries", "batch_update", "new_state"]
    assert LogitsProcessor.__abstractmethods__ == {"__init__", "apply", "is_argmax_invariant", "update_state"}
    assert list(BatchUpdate.__dataclass_fields__) == ["batch_size", "removed", "added", "moved"]


def test_custom_logits_processors_run_after_the_built_in_ones_and_before_penalties() -> None:
    from vllm.v1.sample import logits_processor
    from vllm.v1.sample.sampler import Sampler

    assert "itertools.chain(\n            BUILTIN_LOGITS_PROCESSORS, custom" in inspect.getsource(
        logits_processor.build_logitsprocs
    )
    source = inspect.getsource(Sampler.apply_logits_processors)
    assert source.index("non_argmax_invariant") < source.index("apply_penalties")


def test_a_connector_takes_a_core_from_each_worker_unless_told_otherwise():
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    source = inspect.getsource(OMPProcessManager.__init__)
    assert "if config.kv_transfer_config:" in source and "envs.VLLM_CPU_NUM_OF_RESERVED_CPU" in source


def test_a_worker_gets_the_methods_of_its_extension_class() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase

    from kvserve.engine.probe_worker import ProbeWorker
    from kvserve.engine.self_test import EXTENSION_PATH

    assert EXTENSION_PATH == f"{ProbeWorker.__module__}.{ProbeWorker.__qualname__}"
    assert "parallel_config.worker_extension_cls" in inspect.getsource(WorkerWrapperBase.init_worker)
    assert "self.vllm_config = " in inspect.getsource(WorkerBase.__init__)
    assert parameters(AsyncLLM.collective_rpc) == ["self", "method", "timeout", "args", "kwargs"]


def test_attention_layers_are_kept_by_name_with_their_implementation() -> None:
    from vllm.config import CompilationConfig
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.model_executor.models.utils import extract_layer_index

    assert "static_forward_context" in CompilationConfig.__dataclass_fields__
    assert "self.impl = " in inspect.getsource(Attention.__init__)
    assert extract_layer_index("model.layers.12.self_attn.attn") == 12


@pytest.mark.parametrize(("heads", "workers", "first"), [(8, 1, [0]), (8, 4, [0, 2, 4, 6]), (2, 4, [0, 0, 1, 1])])
def test_a_workers_heads_are_those_from_its_share_of_the_models_on(heads: int, workers: int, first: list[int]) -> None:
    from types import SimpleNamespace

    from vllm.config import ModelConfig
    from vllm.model_executor.layers.linear import QKVParallelLinear
    from vllm.v1.worker.worker_base import WorkerBase

    from kvserve.engine.backend import first_kv_head

    assert "self.parallel_config.rank = rank" in inspect.getsource(WorkerBase.__init__)
    assert parameters(ModelConfig.get_total_num_kv_heads) == ["self"]
    assert "self.tp_rank // self.num_kv_head_replicas" in inspect.getsource(QKVParallelLinear)
    model = SimpleNamespace(get_total_num_kv_heads=lambda: heads)
    parallel = [SimpleNamespace(rank=rank, tensor_parallel_size=workers) for rank in range(workers)]
    assert [first_kv_head(SimpleNamespace(model_config=model, parallel_config=each)) for each in parallel] == first


def test_drafts_enter_no_prefix_cache_and_are_taken_back_from_the_computed_tokens() -> None:
    """PageLayout.tail_slots: a step begins at most `num_speculative_tokens` before the last one ended."""
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    source = inspect.getsource(KVCacheManager.allocate_slots)
    assert "num_tokens_to_cache = min(" in source and "request.num_tokens,\n" in source
    assert "len(self._all_token_ids)" in inspect.getsource(Request.num_tokens.fget)
    source = inspect.getsource(Scheduler.update_from_output)
    assert "num_rejected = num_draft_tokens - num_accepted" in source
    assert "request.num_computed_tokens -= num_rejected" in source
    assert isinstance(VllmConfig.num_speculative_tokens, property)
