"""vLLM's scheduler with steps that end where a request is cut.

Seams: `--scheduler-cls`, and `Scheduler._mamba_block_aligned_split`, through which vLLM clips steps for models whose
state must be saved at certain tokens; kvserve's state is the evicted cache. `Scheduler.update_from_output`: the
connector learns of a step's evictions before the requests that end with it are finished. And `Scheduler.make_stats`:
vLLM takes a scheduler with a connector for one with an external prefix cache.

Requests that failed (kvserve.engine.failures) are ended as vLLM ends those whose grammar does not compile:
`Scheduler.finish_requests` with FINISHED_ERROR, and an `EngineCoreOutput` with the reason in the next outputs. A client
gets HTTP 500 from vLLM's server, and LLM an output with finish_reason "error" and the reason as stop_reason.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from kvserve.engine.eviction_manager import EvictingPageManager, share_prompts_only

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.outputs import ModelRunnerOutput


class _EvictingMixin:
    """Clips steps to the requests' eviction plans, and ends requests that failed."""

    kv_cache_manager: Any
    connector: Any
    finish_requests: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.manager = EvictingPageManager.of(self.kv_cache_manager)
        share_prompts_only(self.kv_cache_manager)
        self.need_mamba_block_aligned_split = True
        self._last_outputs: dict[int, list[EngineCoreOutput]] = defaultdict(list)  # of ended requests, by client

    def _mamba_block_aligned_split(
        self, request: Request, num_new_tokens: int, num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:  # fmt: skip
        plan = self.manager.plans.get(request.request_id)
        if plan is None:
            return num_new_tokens
        with self.manager.failures.guard(request.request_id):
            return plan.clip_step(request.num_computed_tokens + num_new_local_computed_tokens, num_new_tokens)
        return 0

    def add_request(self, request: Request) -> None:
        super().add_request(request)  # type: ignore[misc]
        self._end_failed()

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self._end_failed()  # what a step under way computes for an ended request is dropped
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        output = model_runner_output.kv_connector_output
        if output is not None:
            self.connector.take_evictions(output.kv_connector_worker_meta)
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        self._end_failed()
        for client, last in self._last_outputs.items():
            outputs.setdefault(client, EngineCoreOutputs()).outputs.extend(last)
        self._last_outputs.clear()
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """As vLLM's, without queries of an external prefix cache: kvserve's connector moves no KV, so there is none."""
        stats = super().make_stats(*args, **kwargs)  # type: ignore[misc]
        if stats is not None:
            stats.connector_prefix_cache_stats = None
        return stats

    def _end_failed(self) -> None:
        """End the requests that failed; one that is over already is left alone."""
        for request_id, reason in self.manager.failures.take().items():
            for request in self.finish_requests(request_id, RequestStatus.FINISHED_ERROR):
                self._last_outputs[request.client_index].append(_error_output(request, reason))


def _error_output(request: Request, reason: str) -> EngineCoreOutput:
    return EngineCoreOutput(
        request.request_id, [], finish_reason=request.get_finished_reason(), stop_reason=reason,
        kv_transfer_params={"kvserve": {"error": reason}}, events=request.take_events(),
        trace_headers=request.trace_headers,
    )  # fmt: skip


class EvictingScheduler(_EvictingMixin, Scheduler):
    """For synchronous scheduling."""


class EvictingAsyncScheduler(_EvictingMixin, AsyncScheduler):
    """For asynchronous scheduling."""


def make_scheduler(vllm_config: Any, **kwargs: Any) -> Scheduler:
    """What vLLM calls in place of a scheduler class."""
    use_async = vllm_config.scheduler_config.async_scheduling
    return (EvictingAsyncScheduler if use_async else EvictingScheduler)(vllm_config=vllm_config, **kwargs)
