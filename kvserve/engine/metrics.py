"""Prometheus metrics under `kvserve:` and the startup table, in the API server.

Seams: the `vllm.stat_logger_plugins` entry point group and `vllm.v1.metrics.loggers.StatLoggerBase`; what only the
scheduler and the workers know comes in `SchedulerStats.kv_connector_stats`. vLLM's own metrics stay as they are.
"""

from __future__ import annotations

from typing import Any, TypeVar

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import StatLoggerBase

from kvserve.doctor.distances import KINDS, ProbeReport
from kvserve.engine.report import EngineReport
from kvserve.engine.settings import EngineSettings
from kvserve.engine.stats import Holding

logger = init_logger("vllm.kvserve")


# Tokens that one KV head holds after an eviction, labelled by layer alone: that shows how budgets differ, and a model
# has a fixed number of layers. A label for each head would multiply the series, one for requests would never end.
KEPT_TOKENS_BUCKETS = tuple(2**power for power in range(6, 18))
Metric = TypeVar("Metric", Counter, Gauge, Histogram)


def _metric(kind: type[Metric], name: str, help_text: str, *labels: str, **options: Any) -> Metric:
    """A metric, created once per process."""
    existing: Any = REGISTRY._names_to_collectors.get(name)
    return existing or kind(name, help_text, labels, **options)


def _gauge(name: str, help_text: str, *labels: str) -> Gauge:
    return _metric(Gauge, name, help_text, *labels, multiprocess_mode="mostrecent")


def _pages() -> Gauge:
    help_text = (
        "Pages of the KV pool (one KV head of one layer each): sealed, compressed tiles; kept, what evictions left; "
        "dense, unfinished tiles and, where prompts are evicted, sinks and request state; free."
    )
    return _gauge("kvserve:pages", help_text, "state")


def _ratio() -> Gauge:
    help_text = (
        "KV bytes of a 16-bit cache over the bytes held. requested: by the policy's bits and rate. effective: by the "
        "running requests, whole blocks counted, in the last step that had any; before the first one, and always where "
        "the policy does not evict, by a request of max_model_len tokens."
    )
    return _gauge("kvserve:compression_ratio", help_text, "kind")


def _evicted_tokens() -> Counter:
    help_text = (
        "Tokens evicted, averaged over layers and KV heads: one that half of the heads dropped counts 0.5. A preempted "
        "request that is evicted again counts again."
    )
    return _metric(Counter, "kvserve:kv_tokens_evicted", help_text, "policy")


def _kept_tokens() -> Histogram:
    help_text = "Tokens that a KV head of the layer holds after an eviction; one observation per head and eviction."
    return _metric(Histogram, "kvserve:kept_tokens", help_text, "layer", buckets=KEPT_TOKENS_BUCKETS)


def publish_self_test(report: ProbeReport) -> None:
    """What the self-test found: of each layer all KV heads together, of `kernel` the worst one."""
    help_text = (
        "How far layers were off in the self-test at server start, over the size of the answer. kernel: from what the "
        "policy's cache must answer; codec: from the exact answer of the tokens held; cache: from a dense cache."
    )
    gauge = _gauge("kvserve:self_test_distance", help_text, "kind", "layer")
    for layer in report.layers:
        for kind in KINDS:
            gauge.labels(kind, str(layer.layer)).set(getattr(layer, kind))


class KvserveStatLogger(StatLoggerBase):
    """Publishes the engine's report once and the page counts at every step; inert without a policy."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.vllm_config = vllm_config
        self.settings = EngineSettings.from_vllm_config(vllm_config)
        self.report: EngineReport | None = None

    def log_engine_initialized(self) -> None:
        """The pool's size is known: log the table and set what does not change."""
        if self.settings is None:
            return
        report = self.report = EngineReport.from_vllm_config(self.vllm_config, self.settings)
        for line in report.table().splitlines():
            logger.info("%s", line)
        policy = self.settings.policy
        bytes_per_token = _gauge("kvserve:kv_bytes_per_token", "KV bytes of a cached token, all layers.", "kind")
        bytes_per_token.labels("dense").set(report.dense_bytes_per_token)
        bytes_per_token.labels("effective").set(report.effective_bytes_per_token)
        capacity = _gauge("kvserve:kv_capacity_tokens", "Tokens the KV pool holds.", "kind")
        capacity.labels("dense").set(report.dense_capacity_tokens)
        capacity.labels("effective").set(report.effective_capacity_tokens)
        _ratio().labels("requested").set(report.requested_ratio)
        _ratio().labels("effective").set(report.effective_ratio)
        labels = ("policy", "tile_tokens", "sink_tokens", "bits", "kernels")
        info = _gauge("kvserve:policy_info", "The KV policy in effect.", *labels)
        bits = f"{report.layout.bits_per_element():.2f}"
        info.labels(policy.name, str(policy.tile_tokens), str(policy.sink_tokens), bits, report.kernels).set(1)
        if policy.eviction:
            _evicted_tokens().labels(policy.name)  # 0 until something is evicted
        self._publish_pages(report.num_blocks - 1, 0, None)

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Update what changes: page counts from vLLM's scheduler statistics, the others from CacheStats in them."""
        if self.report is None or scheduler_stats is None:
            return
        stats = scheduler_stats.kv_connector_stats
        holding = Holding(**stats["holding"]) if stats else None
        if stats and holding:
            self._publish_evictions(stats)
            ratio = self.report.held_ratio(holding)
            if ratio is not None:
                _ratio().labels("effective").set(ratio)
        if holding is None and self.report.layout.policy.eviction:
            return  # not the statistics of a step
        usable = self.report.num_blocks - 1
        free_blocks = usable - round(scheduler_stats.kv_cache_usage * usable)
        self._publish_pages(free_blocks, scheduler_stats.num_running_reqs, holding)

    def _publish_pages(self, free_blocks: int, num_running: int, holding: Holding | None) -> None:
        assert self.report is not None
        for state, count in self.report.pages(free_blocks, num_running, holding).items():
            _pages().labels(state).set(count)

    def _publish_evictions(self, stats: dict[str, Any]) -> None:
        """Counts of the evictions since the last step; every head of every rank is in them."""
        assert self.report is not None and self.settings is not None
        num_heads = self.report.cells_per_block * self.report.num_ranks
        _evicted_tokens().labels(self.settings.policy.name).inc(stats["evicted_head_tokens"] / num_heads)
        for layer, kept in enumerate(stats["kept_tokens"]):
            for num_tokens in kept:
                _kept_tokens().labels(str(layer)).observe(num_tokens)
