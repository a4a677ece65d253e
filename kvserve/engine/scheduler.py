"""vLLM's scheduler with steps that end where a request is cut.

Seams: `--scheduler-cls`, and `Scheduler._mamba_block_aligned_split`, through which vLLM clips steps for models whose
state must be saved at certain tokens; kvserve's state is the evicted cache. And `Scheduler.update_from_output`: the
connector learns of a step's evictions before the requests that end with it are finished.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from kvserve.engine.eviction_manager import EvictingPageManager

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput


class _EvictingMixin:
    """Clips steps to the requests' eviction plans."""

    kv_cache_manager: Any
    connector: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.manager = EvictingPageManager.of(self.kv_cache_manager)
        self.need_mamba_block_aligned_split = True

    def _mamba_block_aligned_split(
        self, request: Request, num_new_tokens: int, num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:  # fmt: skip
        plan = self.manager.plans.get(request.request_id)
        computed = request.num_computed_tokens + num_new_local_computed_tokens
        return plan.clip_step(computed, num_new_tokens) if plan else num_new_tokens

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        output = model_runner_output.kv_connector_output
        if output is not None:
            self.connector.take_evictions(output.kv_connector_worker_meta)
        return super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]


class EvictingScheduler(_EvictingMixin, Scheduler):
    """For synchronous scheduling."""


class EvictingAsyncScheduler(_EvictingMixin, AsyncScheduler):
    """For asynchronous scheduling."""


def make_scheduler(vllm_config: Any, **kwargs: Any) -> Scheduler:
    """What vLLM calls in place of a scheduler class."""
    use_async = vllm_config.scheduler_config.async_scheduling
    return (EvictingAsyncScheduler if use_async else EvictingScheduler)(vllm_config=vllm_config, **kwargs)
