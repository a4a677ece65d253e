"""The self-test of a server: two short requests under the probe, before it answers any other.

Seams: `EngineClient.generate` with `vllm.inputs.engine.tokens_input`, `collective_rpc` and `reset_prefix_cache`. vLLM's
API server initialises endpoint plugins after the engine and before it answers on its port, and ends where one raises.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from kvserve.engine.device import device_type
from kvserve.engine.engines import each_engine, on_all_workers
from kvserve.engine.log import logger
from kvserve.engine.own_requests import own_request_id
from kvserve.engine.settings import CONFIG_KEY, EngineSettings
from kvserve.errors import UnsupportedError
from kvserve.probe.distances import KERNEL_LIMIT, ProbeReport, complaints
from kvserve.probe.request import TestPlan, num_queries, plan_test, prompt_tokens

if TYPE_CHECKING:
    from vllm.config import VllmConfig


EXTENSION_PATH = "kvserve.engine.probe_worker.ProbeWorker"


class SelfTestError(RuntimeError):
    """The server must not serve; the message says which layers are wrong, how far, and what to do."""


def is_requested(config: VllmConfig) -> bool:
    """Whether `additional_config` asks for the self-test; `kvserve serve` does unless told otherwise.

    Raises:
        UnsupportedError: the option that brings the probe into the workers is missing.
    """
    additional: Any = config.additional_config
    section = additional.get(CONFIG_KEY) if isinstance(additional, dict) else None
    if not section or not section.get("self_test"):
        return False
    if config.parallel_config.worker_extension_cls != EXTENSION_PATH:
        raise UnsupportedError(f"the self-test needs --worker-extension-cls {EXTENSION_PATH}")
    return True


def why_not(config: VllmConfig) -> str | None:
    """Why a requested self-test cannot run on this engine; None: it can."""
    parallel = config.parallel_config
    if parallel._api_process_count > 1:
        return "it needs a single API server; add --api-server-count 1"
    if device_type() != "cpu" and not config.model_config.enforce_eager:
        return "on a GPU it needs --enforce-eager: nobody can look into a CUDA graph"
    return None


def describe(config: VllmConfig) -> str:
    """What was asked for and what will happen, in one line."""
    if not is_requested(config):
        return "off"
    reason = why_not(config)
    return f"requested, but not run: {reason}" if reason else "requested, runs before the server answers"


async def run_self_test(engine: Any, settings: EngineSettings) -> list[ProbeReport]:
    """Run both requests on every engine, one at a time, and judge each.

    Raises:
        SelfTestError: the server must not serve.
    """
    config = engine.vllm_config.model_config
    layout = settings.layout(config.get_head_size())
    plan, start = plan_test(layout, config.max_model_len), time.monotonic()
    await on_all_workers(engine, "kvserve_probe_start")
    try:
        num_tokens = [await _run_requests(engine, plan, where) for where in each_engine(engine)]
    finally:
        workers = await on_all_workers(engine, "kvserve_probe_finish")
    await engine.reset_prefix_cache()
    reports = [ProbeReport.of_ranks(of_engine) for of_engine in workers]
    for index, (report, count) in enumerate(zip(reports, num_tokens, strict=True)):
        where = f" on engine {index}" if len(reports) > 1 else ""
        found = complaints(report, count, layout.draft_tokens)
        if found:
            raise SelfTestError(
                f"the self-test of policy {settings.policy.name} failed{where}: {'; '.join(found)}. Run `kvserve "
                "doctor` with the same model and policy to see every layer; --no-self-test serves anyway"
            )
        logger.info("%s%s", passed_line(report, time.monotonic() - start), where)
    return reports


def passed_line(report: ProbeReport, seconds: float) -> str:
    """What a self-test found, for the log."""
    kernel, codec, cache = (report.worst(kind) for kind in ("kernel", "codec", "cache"))
    return (
        f"self-test passed in {seconds:.1f} s: kernels {kernel.kernel:.1g} (limit {KERNEL_LIMIT:g}), codec at most "
        f"{codec.codec:.2f} in layer {codec.layer} (limit {codec.codec_limit:g}), whole cache at most "
        f"{cache.cache:.2f} in layer {cache.layer}"
    )


async def _run_requests(engine: Any, plan: TestPlan, where: dict[str, int]) -> int:
    """Both requests on one engine, one after the other; how many queries every layer answered for them."""
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input

    config = engine.vllm_config.model_config
    tokenizer = None if config.skip_tokenizer_init else engine.get_tokenizer()
    tokens = prompt_tokens(tokenizer, config.get_vocab_size(), plan.prompt_len)
    num_tokens = 0
    for length, params in plan.requests():
        await on_all_workers(engine, "kvserve_probe_begin")
        prompt = tokens_input(tokens[:length])
        request_id = own_request_id("self-test")
        async for output in engine.generate(prompt, SamplingParams(**params), request_id=request_id, **where):
            cached = output.num_cached_tokens
        num_tokens += num_queries(length, cached, params["max_tokens"])
    return num_tokens
