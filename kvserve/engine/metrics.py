"""Prometheus metrics under `kvserve:` and the startup table, in the API server.

Seams: the `vllm.stat_logger_plugins` entry point group and `vllm.v1.metrics.loggers.AggregateStatLoggerBase`; what only
the scheduler and the workers know comes in `SchedulerStats.kv_connector_stats`. vLLM's own metrics stay as they are.
"""

from __future__ import annotations

from typing import Any, TypeVar

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from kvserve.engine.log import logger
from kvserve.engine.report import EngineReport
from kvserve.engine.settings import EngineSettings
from kvserve.engine.stats import Holding
from kvserve.probe.distances import KINDS, ProbeReport

# Tokens that one KV head holds after an eviction, labelled by layer alone: that shows how budgets differ, and a model
# has a fixed number of layers. A label for each head would multiply the series, one for requests would never end.
KEPT_TOKENS_BUCKETS = tuple(2**power for power in range(6, 18))
ENGINE_LABELS = ("model_name", "engine")  # as vLLM's metrics have them
Metric = TypeVar("Metric", Counter, Gauge, Histogram)


class EngineMetrics:
    """The metrics of one engine. Each is registered once per process, and has a series for every engine.

    Args:
        index: the engine's rank among those of data parallelism, as vLLM counts them.
    """

    def __init__(self, vllm_config: Any, index: int) -> None:
        self.engine = (vllm_config.model_config.served_model_name, str(index))

    def _of(self, kind: type[Metric], name: str, help_text: str, labels: dict[str, str], **options: Any) -> Metric:
        existing: Any = REGISTRY._names_to_collectors.get(name)
        metric = existing or kind(name, help_text, (*ENGINE_LABELS, *labels), **options)
        return metric.labels(*self.engine, *labels.values())

    def gauge(self, name: str, help_text: str, **labels: str) -> Gauge:
        """A gauge; of several API servers the last to set it counts."""
        return self._of(Gauge, name, help_text, labels, multiprocess_mode="mostrecent")

    def bytes_per_token(self, kind: str) -> Gauge:
        return self.gauge("kvserve:kv_bytes_per_token", "KV bytes of a cached token, all layers.", kind=kind)

    def capacity(self, kind: str) -> Gauge:
        return self.gauge("kvserve:kv_capacity_tokens", "Tokens the KV pool holds.", kind=kind)

    def pages(self, state: str) -> Gauge:
        help_text = (
            "Pages of the KV pool (one KV head of one layer each): sealed, compressed tiles; kept, what evictions "
            "left; dense, unfinished tiles and, where prompts are evicted, sinks and request state; free."
        )
        return self.gauge("kvserve:pages", help_text, state=state)

    def ratio(self, kind: str) -> Gauge:
        help_text = (
            "KV bytes of a 16-bit cache over the bytes held. requested: by the policy's bits and rate. effective: by "
            "the users' running requests, whole blocks counted, in the last step that had any; before the first one, "
            "and always where the policy does not evict, by a request of max_model_len tokens."
        )
        return self.gauge("kvserve:compression_ratio", help_text, kind=kind)

    def evicted_tokens(self, policy: str) -> Counter:
        help_text = (
            "Tokens evicted, averaged over layers and KV heads: one that half of the heads dropped counts 0.5. A "
            "preempted request that is evicted again counts again."
        )
        return self._of(Counter, "kvserve:kv_tokens_evicted", help_text, {"policy": policy})

    def demoted_tokens(self, policy: str) -> Counter:
        help_text = "Tokens that are kept in a smaller codec than the policy's own, averaged and counted likewise."
        return self._of(Counter, "kvserve:kv_tokens_demoted", help_text, {"policy": policy})

    def kept_tokens(self, layer: int) -> Histogram:
        help_text = "Tokens that a KV head of the layer holds after an eviction; one observation per head and eviction."
        labels = {"layer": str(layer)}
        return self._of(Histogram, "kvserve:kept_tokens", help_text, labels, buckets=KEPT_TOKENS_BUCKETS)

    def self_test_distance(self, kind: str, layer: int) -> Gauge:
        help_text = (
            "How far layers were off in the self-test at server start, over the size of the answer. kernel: from what "
            "the policy's cache must answer; codec: from the exact answer of the tokens held; cache: from a dense one."
        )
        return self.gauge("kvserve:self_test_distance", help_text, kind=kind, layer=str(layer))


def publish_self_test(vllm_config: Any, report: ProbeReport, engine: int) -> None:
    """What the self-test of one engine found: of each layer all KV heads together, of `kernel` the worst one."""
    metrics = EngineMetrics(vllm_config, engine)
    for layer in report.layers:
        for kind in KINDS:
            metrics.self_test_distance(kind, layer.layer).set(getattr(layer, kind))


class KvserveStatLogger(AggregateStatLoggerBase):
    """Publishes each engine's report once and its page counts at every step; inert without a policy."""

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        self.vllm_config = vllm_config
        self.settings = EngineSettings.from_vllm_config(vllm_config)
        self.report: EngineReport | None = None
        self.engines = {index: EngineMetrics(vllm_config, index) for index in engine_indexes}

    def log_engine_initialized(self) -> None:
        """The pools' size is known: log the table and set what does not change."""
        if self.settings is None:
            return
        self.report = EngineReport.from_vllm_config(self.vllm_config, self.settings, len(self.engines))
        logger.info("%s", self.report.table())
        for metrics in self.engines.values():
            self._publish_report(metrics, self.report)

    def _publish_report(self, metrics: EngineMetrics, report: EngineReport) -> None:
        policy = report.layout.policy
        metrics.bytes_per_token("dense").set(report.dense_bytes_per_token)
        metrics.bytes_per_token("effective").set(report.effective_bytes_per_token)
        metrics.capacity("dense").set(report.dense_capacity_tokens)
        metrics.capacity("effective").set(report.effective_capacity_tokens)
        metrics.ratio("requested").set(report.requested_ratio)
        metrics.ratio("effective").set(report.effective_ratio)
        metrics.gauge(
            "kvserve:policy_info", "The KV policy in effect.", policy=policy.name, tile_tokens=str(policy.tile_tokens),
            sink_tokens=str(policy.sink_tokens), bits=f"{report.layout.bits_per_element():.2f}", kernels=report.kernels,
        ).set(1)  # fmt: skip
        if policy.eviction:
            metrics.evicted_tokens(policy.name)  # 0 until something is evicted
        if policy.eviction and policy.eviction.formats:
            metrics.demoted_tokens(policy.name)
        self._publish_pages(metrics, report.num_blocks - 1, 0, None)

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Update what changes: page counts from vLLM's scheduler statistics, the others from CacheStats in them."""
        metrics = self.engines.get(engine_idx)
        if self.report is None or scheduler_stats is None or metrics is None:
            return
        stats = scheduler_stats.kv_connector_stats
        if stats:
            self._publish_evictions(metrics, stats)
            ratio = self.report.held_ratio(Holding(**stats["users"]))
            if ratio is not None:
                metrics.ratio("effective").set(ratio)
        elif self.report.layout.policy.eviction:
            return  # not the statistics of a step
        usable = self.report.num_blocks - 1
        free_blocks = usable - round(scheduler_stats.kv_cache_usage * usable)
        holding = Holding(**stats["holding"]) if stats else None
        self._publish_pages(metrics, free_blocks, scheduler_stats.num_running_reqs, holding)

    def _publish_pages(
        self, metrics: EngineMetrics, free_blocks: int, num_running: int, holding: Holding | None
    ) -> None:  # fmt: skip
        assert self.report is not None
        for state, count in self.report.pages(free_blocks, num_running, holding).items():
            metrics.pages(state).set(count)

    def _publish_evictions(self, metrics: EngineMetrics, stats: dict[str, Any]) -> None:
        """Counts of the evictions since the last step; every head of every rank is in them."""
        assert self.report is not None
        num_heads, policy = self.report.total_cells_per_block, self.report.layout.policy.name
        metrics.evicted_tokens(policy).inc(stats["evicted_head_tokens"] / num_heads)
        if stats["demoted_head_tokens"]:
            metrics.demoted_tokens(policy).inc(stats["demoted_head_tokens"] / num_heads)
        for layer, kept in enumerate(stats["kept_tokens"]):
            for num_tokens in kept:
                metrics.kept_tokens(layer).observe(num_tokens)
