"""One test per vLLM symbol that kvserve relies on. A failure here names the seam that a vLLM upgrade moved."""

from __future__ import annotations

import importlib.util
import inspect
import math
from importlib.metadata import entry_points
from pathlib import Path

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
    from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_groups
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout
    from vllm.v1.worker import gpu_model_runner

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


def test_stat_logger_base_keeps_its_hooks() -> None:
    """One logger for all engines; its metrics have the labels of vLLM's."""
    from vllm.v1.metrics.loggers import AggregateStatLoggerBase, PrometheusStatLogger, StatLoggerManager
    from vllm.v1.metrics.stats import SchedulerStats

    from kvserve.engine.metrics import ENGINE_LABELS

    assert parameters(AggregateStatLoggerBase.__init__) == ["self", "vllm_config", "engine_indexes"]
    assert parameters(AggregateStatLoggerBase.record) == [
        "self", "scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx",
    ]  # fmt: skip
    assert "issubclass(\n                stat_logger_factory, AggregateStatLoggerBase" in inspect.getsource(
        StatLoggerManager
    )
    source = inspect.getsource(PrometheusStatLogger.__init__)
    assert f"labelnames = {list(ENGINE_LABELS)}".replace("'", '"') in source
    assert "model_name = vllm_config.model_config.served_model_name" in source and "[model_name, str(idx)]" in source
    assert {"num_running_reqs", "kv_cache_usage"} <= set(SchedulerStats.__dataclass_fields__)


def test_the_api_server_knows_the_blocks_of_all_its_engines_together() -> None:
    from vllm.v1.engine.core_client import MPClient

    assert "num_gpu_blocks += response.num_gpu_blocks" in inspect.getsource(MPClient._apply_ready_response)


def test_a_request_id_begins_with_the_one_that_was_given() -> None:
    from vllm.v1.engine.input_processor import InputProcessor

    assert 'request.request_id = f"{request.external_req_id}-' in inspect.getsource(InputProcessor.assign_request_id)


def test_ready_endpoint_satisfies_the_plugin_protocol() -> None:
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    from kvserve.engine.endpoint import ReadyEndpoint

    assert isinstance(ReadyEndpoint(), EndpointPlugin)


PLUGINS = ["general_plugins", "endpoint_plugins", "stat_logger_plugins", "logits_processors"]


@pytest.mark.parametrize("group", PLUGINS)
def test_entry_points_resolve(group: str) -> None:
    entries = [entry for entry in entry_points(group=f"vllm.{group}") if entry.name == "kvserve"]
    assert len(entries) == 1, "the installed metadata is older than pyproject.toml: install kvserve again"
    assert callable(entries[0].load())


def test_vllm_checks_the_params_of_every_request_with_the_classes_of_the_entry_points() -> None:
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.sample import logits_processor as v1
    from vllm.v1.worker.gpu.sample.logits_processor import loader as v2

    from kvserve.engine.request_check import RequestCheck

    assert v1.LOGITSPROCS_GROUP == v2.LOGITSPROCS_GROUP == "vllm.logits_processors"
    assert "self._validate_params(params, " in inspect.getsource(InputProcessor.process_inputs)
    assert "self.validate_logits_processors_params(params)" in inspect.getsource(InputProcessor._validate_params)
    assert issubclass(RequestCheck, v1.LogitsProcessor) and issubclass(RequestCheck, v2.LogitsProcessor)
    assert parameters(v1.LogitsProcessor.validate_params) == parameters(v2.LogitsProcessor.validate_params)
    # With speculative decoding workers refuse those of --logits-processors, and never ask for those of entry points.
    source = inspect.getsource(v1.build_logitsprocs)
    assert source.index("if vllm_config.speculative_config:") < source.index("_load_custom_logitsprocs(")


def test_a_logits_processor_that_does_nothing_suits_both_model_runners() -> None:
    from types import SimpleNamespace

    from kvserve.engine.request_check import RequestCheck

    config = SimpleNamespace(additional_config={})
    of_v1, of_v2 = RequestCheck(config, "cpu", False), RequestCheck(config, None)
    assert of_v1.is_argmax_invariant() and of_v1.update_state(None) is None and of_v1.apply("logits") == "logits"
    assert of_v2.add_request(0, None) is False and of_v2.apply("logits", "context") == "logits"


def test_every_post_route_that_generates_is_known() -> None:
    from fastapi.routing import APIRoute
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from kvserve.engine.request_limits import COMPLETION_ROUTES

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--enable-scale-out"])
    routes = build_app(args, ("generate",)).routes
    posts = {route.path for route in routes if isinstance(route, APIRoute) and "POST" in route.methods}
    others = {
        path for path in posts if path.endswith(("/render", "/derender", "/cancel", "/count_tokens", "elastic_ep"))
    }
    others |= {"/tokenize", "/detokenize", "/ping", "/inference/v1/abort_requests"}
    # Cohere's route needs Cohere's library, and VLLM_ENABLE_COHERE_API.
    assert posts - others == COMPLETION_ROUTES.keys() - {"/cohere/v2/chat"}


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


def test_vllm_renders_requests_to_token_ids_and_sampling_parameters() -> None:
    from vllm.entrypoints.launchers.api_server import app_state
    from vllm.entrypoints.scale_out import factories
    from vllm.entrypoints.scale_out.render.serving import ServingRender
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest

    from kvserve.engine.pool_check import RENDERED

    source = inspect.getsource(app_state)
    rendered, plugins = source.index("init_scale_out_state(state, args"), source.index("init_endpoint_plugins_state(")
    assert rendered < plugins and "state.serving_render = ServingRender(" in inspect.getsource(factories)
    for _, method in RENDERED.values():
        assert parameters(getattr(ServingRender, method))[:2] == ["self", "request"]
    assert {"token_ids", "sampling_params"} <= set(GenerateRequest.model_fields)


def test_what_bounds_a_step() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    source = inspect.getsource(Scheduler.schedule)
    assert "token_budget = self.max_num_scheduled_tokens" in source
    assert "input_budget = self.scheduler_config.max_num_batched_tokens" in source
    assert "not self.scheduler_config.enable_chunked_prefill" in source
    assert "self.max_num_active_reqs" in source and "long_prefill_token_threshold" in source


def test_the_schedulers_connector_stats_reach_the_stat_loggers_once_a_step() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.metrics.stats import SchedulerStats

    source = inspect.getsource(Scheduler.update_from_output)
    assert source.count("self.connector.get_kv_connector_stats()") == 1
    assert source.index("_free_request(") < source.index("get_kv_connector_stats()") < source.index("self.make_stats(")
    assert "kv_connector_stats.to_dict()" in inspect.getsource(Scheduler.make_stats)
    assert "kv_connector_stats" in SchedulerStats.__dataclass_fields__
    assert "self.connector_cls.build_kv_connector_stats(" in inspect.getsource(KVConnectorLogging.observe)


def test_queries_of_an_external_prefix_cache_reach_the_stat_loggers_in_the_schedulers_stats_only() -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.metrics import loggers
    from vllm.v1.metrics.stats import SchedulerStats

    assert SchedulerStats().connector_prefix_cache_stats is None
    assert AsyncScheduler.make_stats is Scheduler.make_stats
    assert "self.connector_prefix_cache_stats = PrefixCacheStats()" in inspect.getsource(Scheduler.make_stats)
    reads = inspect.getsource(loggers).count("scheduler_stats.connector_prefix_cache_stats")
    assert reads == 3, "each of vLLM's two loggers leaves them out where they are None"


def test_a_health_check_fails_once_the_engine_is_dead() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import MPClient

    assert "raise self.dead_error" in inspect.getsource(AsyncLLM.check_health)
    assert "self.engine_core.resources.engine_dead" in inspect.getsource(AsyncLLM.errored.fget)
    assert "resources.engine_dead = True" in inspect.getsource(MPClient.start_engine_core_monitor)


def test_a_step_without_tokens_hands_its_metadata_to_the_connector_too() -> None:
    from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    source = inspect.getsource(GPUModelRunner.execute_model)
    assert source.index("handle_preemptions(") < source.index("kv_connector_no_forward(")
    assert "self.pre_forward(" in inspect.getsource(ActiveKVConnector.no_forward)


def test_the_parameters_of_a_finished_request_reach_the_body_of_both_kinds_of_answer() -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.protocol import CompletionResponse
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.v1.engine.output_processor import RequestState

    parameter = "kv_transfer_params=final_res.kv_transfer_params"
    assert parameter in inspect.getsource(OpenAIServingChat.chat_completion_full_generator)
    source = inspect.getsource(OpenAIServingCompletion.request_output_to_completion_response)
    assert "final_res_batch[0].kv_transfer_params" in source
    assert "kv_transfer_params" in parameters(RequestState.make_request_output)
    for response in (ChatCompletionResponse, CompletionResponse):
        assert "kv_transfer_params" in response.model_fields


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


def test_vllm_bench_serve_takes_the_options_and_writes_the_fields_of_the_server_suite(tmp_path: Path) -> None:
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from kvserve.bench.load import RESULT_FIELDS, client_command
    from kvserve.bench.server_options import ServerSizes

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    sizes = ServerSizes()
    for load in sizes.loads():
        command = client_command("http://127.0.0.1:1", load, sizes, "model", 3, tmp_path / "result.json")
        given = parser.parse_args(command[3:])
        assert (given.request_rate, given.max_concurrency) == (load.request_rate or math.inf, load.max_concurrency)
        assert (given.seed, given.num_prompts, given.random_range_ratio) == (3, 32, "0.5")
        assert serve.check_goodput_args(given) == {"ttft": 10_000.0, "tpot": 200.0}
    source = inspect.getsource(serve.benchmark)
    statistics = {f"{kind}_{name}_ms" for kind in ("median", "p99") for name in ("ttft", "tpot")}
    assert statistics <= set(RESULT_FIELDS)
    assert 'result[f"median_{metric_attribute_name}_ms"]' in source
    assert 'result[f"p{p_word}_{metric_attribute_name}_ms"]' in source
    assert all(f'"{field}": ' in source for field in set(RESULT_FIELDS) - statistics)
    assert parameters(serve.main) == ["args"]
    assert "np.random.seed(args.seed)" in inspect.getsource(serve.main_async), "the same arrivals for all servers"


def test_servers_publish_the_metrics_that_the_server_suite_reads() -> None:
    from vllm.v1.metrics import loggers

    from kvserve.bench.server import INFO_METRIC, STATE_METRICS

    source = inspect.getsource(loggers.PrometheusStatLogger)
    assert all(f'"{name.removesuffix("_total")}"' in source for name in (*STATE_METRICS.values(), INFO_METRIC))


def test_the_module_that_serves_stock_vllm_runs_as_a_program() -> None:
    spec = importlib.util.find_spec("vllm.entrypoints.openai.api_server")
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text()
    assert '__name__ == "__main__"' in source and source.rstrip().endswith("main()")


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


def test_endpoint_plugins_are_initialised_before_the_server_listens_and_may_end_it() -> None:
    from vllm.config import ParallelConfig
    from vllm.entrypoints.launchers.api_server.entry import build_and_serve
    from vllm.plugins.endpoint_plugins.interface import init_endpoint_plugins_state

    source = inspect.getsource(build_and_serve)
    assert source.index("await init_app_state(") < source.index("await serve_http(")
    assert "except" not in inspect.getsource(init_endpoint_plugins_state)
    assert {"_api_process_count", "worker_extension_cls"} <= set(ParallelConfig.__dataclass_fields__)


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


def test_max_new_tokens_of_a_model_is_a_default_and_no_limit() -> None:
    from vllm.entrypoints.openai.chat_completion import serving
    from vllm.entrypoints.serve.utils.api_utils import get_max_tokens

    def tokens(asked: int | None) -> int:
        return get_max_tokens(8192, asked, 37, {"max_tokens": 512})

    assert [tokens(None), tokens(100), tokens(2000), tokens(9000)] == [512, 100, 2000, 8192 - 37]
    # A limit for all requests comes from --override-generation-config or a folder named by --generation-config only.
    assert 'if mc.generation_config not in ("auto", "vllm")' in inspect.getsource(serving)


def test_where_the_server_refuses_its_configuration_or_its_port_is_told_by_the_function() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.launchers.api_server import entry
    from vllm.entrypoints.launchers.launcher import setup_server

    assert EngineArgs.create_engine_config.__name__ == "create_engine_config"
    assert setup_server.__name__ == "setup_server"
    source = inspect.getsource(entry)
    assert ".create_engine_config(" in source and "setup_server(args, reuse_port=False)" in source


def test_a_server_that_listens_is_found_in_the_state_and_handles_signals_in_its_loop() -> None:
    from vllm.entrypoints.launchers import launcher
    from vllm.v1.engine.async_llm import AsyncLLM

    source = inspect.getsource(launcher.serve_http)
    assert "app.state.server = server" in source
    handlers = [f"loop.add_signal_handler(signal.{name}, signal_handler)" for name in ("SIGINT", "SIGTERM")]
    assert all(handler in source for handler in handlers)
    assert source.index("server_task = ") < source.index(handlers[0]) < source.index("await server_task")
    assert isinstance(AsyncLLM.errored, property)
    assert "server.should_exit = True" in inspect.getsource(launcher.terminate_if_errored)


def test_log_levels_come_from_the_environment_in_every_process() -> None:
    from vllm import envs
    from vllm.config.logging import LoggingConfig

    assert "VLLM_LOGGING_LEVEL" in envs.environment_variables
    assert "envs.VLLM_LOGGING_LEVEL" in inspect.getsource(LoggingConfig)


def test_threads_of_cpu_workers_are_pinned_to_the_first_cores_unless_nobind() -> None:
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    source = inspect.getsource(OMPProcessManager)
    assert 'self.skip_setup = vllm_mask == "nobind"' in source and 'self.auto_setup = vllm_mask == "auto"' in source
    assert 'vllm_mask.split("|")' in source and "get_allowed_cpu_list()" in source


def test_tokens_are_given_to_the_engine_as_it_wants_them() -> None:
    from vllm.inputs.engine import tokens_input

    assert tokens_input([1, 2]) == {"type": "token", "prompt_token_ids": [1, 2]}


def test_the_parser_of_serve_reports_what_it_refuses_by_error() -> None:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    assert parameters(FlexibleArgumentParser.error) == ["self", "message"]
    assert FlexibleArgumentParser.load_config_file is not None
