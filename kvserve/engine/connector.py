"""What the scheduler tells the worker about evictions.

Seam: `vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1`, vLLM's message channel from scheduler to
worker. This one transfers no KV: it learns of requests as they arrive, and sends with each step what its rows keep and
which of them shall be cut. A row is identified by its state block, the first of the row. What the worker did comes back
the same way (kvserve.engine.stats).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from kvserve.accounting.admission import Admission
from kvserve.accounting.plan import RowStep, check_limit
from kvserve.engine.eviction_manager import EvictingPageManager
from kvserve.engine.kept_tables import KeptTables
from kvserve.engine.log import logger
from kvserve.engine.report import EngineReport
from kvserve.engine.settings import EngineSettings
from kvserve.engine.stats import Accounting, CacheStats, StepEvictions, worker_log
from kvserve.eviction.collector import Collector
from kvserve.pages.kept import Kept
from kvserve.policies.limits import PREFIX, request_limit

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


@dataclass
class StepPlans(KVConnectorMetadata):
    """Rows that are cut already or have something to do in this step, by the id of their state block.

    `ended`: requests that finished or were preempted since the last step.
    """

    rows: dict[int, RowStep] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)

    @property
    def kept(self) -> dict[int, Kept]:
        """What the rows keep that are cut already, by state block."""
        return {block: step.kept for block, step in self.rows.items() if step.kept.end}

    @property
    def work(self) -> dict[int, RowStep]:
        """Rows for which something is done after each layer, by state block."""
        rows = self.rows.items()
        return {block: step for block, step in rows if step.cut or step.collects or step.window_start is not None}


_current = StepPlans()
_followers: WeakSet[KeptTables] = WeakSet()
_collectors: WeakSet[Collector] = WeakSet()


def current_plans() -> StepPlans:
    """The plans of the step that this worker is about to run."""
    return _current


def follow_plans(rows: KeptTables) -> None:
    """Fill `rows` whenever plans arrive.

    With Model Runner V2 that is after the attention metadata was built and before the model, or its graph, runs.
    """
    _followers.add(rows)


def drop_ended(collector: Collector) -> None:
    """Let `collector` drop requests as the worker hears that they ended, whether or not a step with tokens follows."""
    _collectors.add(collector)


class KvserveConnector(KVConnectorBase_V1, SupportsHMA):
    """Carries StepPlans; everything about moving KV is a no-op.

    Without SupportsHMA vLLM would let window layers keep every token, in the blocks of the others.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        settings = EngineSettings.from_vllm_config(vllm_config)
        assert settings is not None and settings.policy.eviction is not None
        self.eviction = settings.policy.eviction
        self.max_model_len = vllm_config.model_config.max_model_len
        report = EngineReport.from_vllm_config(vllm_config, settings)
        self.block_bytes = report.total_block_bytes
        self.manager: EvictingPageManager | None = None
        self.accounting: Accounting | None = None  # in the scheduler only

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # -- scheduler ------------------------------------------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self.manager = EvictingPageManager.of(kv_cache_manager)
        self.accounting = Accounting(self.manager, self.block_bytes)

    def on_new_request(self, request: Request) -> None:
        """Plan the eviction of a request; refuse one that the pool can never hold."""
        assert self.manager is not None
        with self.manager.failures.guard(request.request_id):
            self._admit(request)

    def _admit(self, request: Request) -> None:
        """Its `vllm_xargs` may change the policy's limit."""
        assert self.manager is not None and self.accounting is not None
        layout = self.manager.layout
        params = request.sampling_params
        arguments = (params and params.extra_args) or {}
        try:
            limit = request_limit(self.eviction, layout.policy, arguments, self.max_model_len)
            if limit:
                check_limit(layout, limit, self.max_model_len)
        except ValueError as error:  # LLM(...) does not know the policy, so that not all is refused before
            return self.manager.failures.add(request.request_id, str(error))
        self.accounting.start(request, limit)
        most = self.max_model_len if request.resumable else request.max_tokens  # its prompt grows
        admission = Admission(layout, limit, request.num_prompt_tokens, most, self.max_model_len)
        usable = self.manager.usable_blocks(admission.cached_tokens(most))
        if not admission.fits(usable):
            own_limit = ", ".join(sorted(name for name in arguments if name.startswith(PREFIX)))
            self.manager.failures.add(request.request_id, admission.refusal(usable, own_limit))
        elif admission.plan:
            self.manager.plans[request.request_id] = admission.plan
            if admission.plan.computes_all or not admission.fits_uncut(usable):
                request.skip_reading_prefix_cache = True

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:  # fmt: skip
        """As `request_finished`, whichever groups there are."""
        return self.request_finished(request, block_ids[0])

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Blocks are freed at once; the report of what they held goes into the answer."""
        assert self.manager is not None and self.accounting is not None
        self.manager.plans.pop(request.request_id, None)
        if request.request_id not in self.accounting.requests:  # it failed as it arrived
            return False, None
        with self.manager.failures.guard(request.request_id):
            return False, {"kvserve": self.accounting.finish(request.request_id)}
        return False, None

    def has_pending_block_frees(self) -> bool:
        """Whether the request that got no blocks is better not preempted.

        Its own last steps may be about to give some back, or it has failed and will give them all back.
        """
        assert self.manager is not None and self.accounting is not None
        request_id = self.manager.asked_for
        tracked = self.accounting.requests.get(request_id) if request_id else None
        if request_id is None or tracked is None:
            return False
        computed, in_flight = tracked.request.num_computed_tokens, tracked.request.num_in_flight_tokens
        with self.manager.failures.guard(request_id):
            if self.manager.waits_for_own(request_id, computed, in_flight):
                return True
        return request_id in self.manager.failures

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        pass

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepPlans:
        """The plans that matter to the rows of this step."""
        assert self.manager is not None
        cached = scheduler_output.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        computed |= {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        plans = StepPlans(ended=scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set()))
        for request_id, before in computed.items():
            after = before + scheduler_output.num_scheduled_tokens[request_id]
            with self.manager.failures.guard(request_id):
                row = self._row_step(request_id, before, after)
                if row is not None:
                    plans.rows[self.manager.state_block(request_id)] = row
        return plans

    def _row_step(self, request_id: str, before: int, after: int) -> RowStep | None:
        """What a step from `before` to `after` tokens has to know and do; None: nothing."""
        assert self.manager is not None
        plan = self.manager.plans.get(request_id)
        if plan is None:
            return None
        kept, following = self.manager.kept_at(request_id, before), plan.next_cut(before)
        cut, window_start = None, None
        if following:
            assert after <= following.point, "a step ends where its request is cut"
            cut = self.manager.kept_at(request_id, after) if after == following.point else None
            if after > plan.window_start(following):
                window_start = plan.window_start(following)
        collects = following is not None and self.eviction.scorer.collects
        if cut is None and not kept.end and window_start is None and not collects:
            return None
        chosen = following.chosen_pages if cut and following else 0
        return RowStep(request_id, kept, cut, window_start, collects, chosen)

    def take_evictions(self, worker_meta: StepEvictions | None) -> None:
        """What a step evicted, before vLLM finishes the requests that end with it."""
        assert self.manager is not None and self.accounting is not None
        for request_id, evicted in worker_meta.requests.items() if worker_meta else ():
            with self.manager.failures.guard(request_id):
                self.accounting.add(StepEvictions({request_id: evicted}))

    def get_kv_connector_stats(self) -> CacheStats | None:
        """What the scheduler knows of a step; workers have their own channel."""
        try:
            return self.accounting.take() if self.accounting else None
        except Exception:  # no request is to blame, and requests matter more than metrics
            logger.exception("kvserve's metrics of a step are missing")
            return None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> CacheStats:
        return CacheStats(data or {})

    # -- worker ---------------------------------------------------------------------------------------------------

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """The first call of a step in the worker, before the model runs; also of a step without tokens."""
        global _current
        assert isinstance(kv_connector_metadata, StepPlans)
        _current = kv_connector_metadata
        for rows in _followers:
            rows.fill(_current.kept)
        for collector in _collectors:
            collector.drop(_current.ended)

    def build_connector_worker_meta(self) -> StepEvictions | None:
        """What the step that has just run evicted."""
        return worker_log.take()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass
