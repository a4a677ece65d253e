"""What kvserve relies on in vLLM's API server and its command line; a failure here names the seam that moved."""

from __future__ import annotations

import importlib.util
import inspect
import math
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tests.contracts.test_contracts import parameters


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


def test_every_post_route_that_generates_is_known() -> None:
    from fastapi.routing import APIRoute
    from packaging.version import Version
    from vllm.entrypoints.launchers.app import build_app
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from kvserve.compat import check_vllm_version
    from kvserve.engine.moved import moved
    from kvserve.engine.request_limits import COMPLETION_ROUTES

    args = moved("make_arg_parser")(FlexibleArgumentParser()).parse_args(["--enable-scale-out"])
    routes = build_app(args, ("generate",)).routes
    posts = {route.path for route in routes if isinstance(route, APIRoute) and "POST" in route.methods}
    others = {
        path for path in posts if path.endswith(("/render", "/derender", "/cancel", "/count_tokens", "elastic_ep"))
    }
    others |= {"/tokenize", "/detokenize", "/ping", "/inference/v1/abort_requests"}
    absent = {"/cohere/v2/chat"}  # needs Cohere's library, and VLLM_ENABLE_COHERE_API
    if Version(check_vllm_version()) < Version("0.33.0"):
        absent.add("/v1/decisions")
    assert posts - others == COMPLETION_ROUTES.keys() - absent


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


def test_endpoint_plugins_are_initialised_before_the_server_listens_and_may_end_it() -> None:
    from vllm.config import ParallelConfig
    from vllm.entrypoints.launchers.api_server.entry import build_and_serve
    from vllm.plugins.endpoint_plugins.interface import init_endpoint_plugins_state

    source = inspect.getsource(build_and_serve)
    assert source.index("await init_app_state(") < source.index("await serve_http(")
    assert "except" not in inspect.getsource(init_endpoint_plugins_state)
    assert {"_api_process_count", "worker_extension_cls"} <= set(ParallelConfig.__dataclass_fields__)


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


def test_every_engine_of_a_server_can_be_asked() -> None:
    """kvserve.engine.engines: `collective_rpc` keeps the answer of the first engine alone."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.core_client import AsyncMPClient, DPLBAsyncMPClient, MPClient

    assert "self.core_engines: list[" in inspect.getsource(MPClient.__init__)
    assert parameters(AsyncMPClient.call_utility_all_async) == ["self", "method", "args"]
    assert "call_utility_all_async(method, *args))[0]" in inspect.getsource(DPLBAsyncMPClient.call_utility_async)
    assert parameters(EngineCore.collective_rpc) == ["self", "method", "timeout", "args", "kwargs"]
    assert "data_parallel_rank" in parameters(AsyncLLM.generate)
    source = inspect.getsource(DPLBAsyncMPClient.get_core_engine_for_request)
    assert "request.data_parallel_rank" in source and "self.core_engines[eng_index]" in source
