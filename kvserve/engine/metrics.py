"""Prometheus metrics under `kvserve:` and the startup table, in the API server.

Seams: the `vllm.stat_logger_plugins` entry point group and `vllm.v1.metrics.loggers.StatLoggerBase`. vLLM's own
metrics stay as they are.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import REGISTRY, Gauge
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import StatLoggerBase

from kvserve.checks import UnsupportedError
from kvserve.engine.report import EngineReport
from kvserve.engine.settings import EngineSettings

logger = init_logger("vllm.kvserve")


def _gauge(name: str, help_text: str, *labels: str) -> Gauge:
    """A gauge, created once per process."""
    existing = REGISTRY._names_to_collectors.get(name)
    return existing or Gauge(name, help_text, labels, multiprocess_mode="mostrecent")  # type: ignore[return-value]


class KvserveStatLogger(StatLoggerBase):
    """Publishes the engine's report once and the page counts at every step; inert without a policy."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.vllm_config = vllm_config
        self.settings = EngineSettings.from_vllm_config(vllm_config)
        self.report: EngineReport | None = None
        if self.settings and vllm_config.device_config.device_type != "cpu":
            raise UnsupportedError("this kvserve serves on CPUs only; remove the kvserve policy to serve on a GPU")

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
        ratio = _gauge("kvserve:compression_ratio", "KV bytes of a 16-bit cache over the bytes held.", "kind")
        ratio.labels("requested").set(report.requested_ratio)
        ratio.labels("effective").set(report.effective_ratio)
        info = _gauge("kvserve:policy_info", "The KV policy in effect.", "policy", "tile_tokens", "sink_tokens", "bits")
        bits = f"{report.layout.bits_per_element():.2f}"
        info.labels(policy.name, str(policy.tile_tokens), str(policy.sink_tokens), bits).set(1)
        self._publish_pages(free_blocks=report.num_blocks - 1, num_running=0)

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Update the page counts from vLLM's scheduler statistics."""
        if self.report is None or scheduler_stats is None:
            return
        usable = self.report.num_blocks - 1
        self._publish_pages(usable - round(scheduler_stats.kv_cache_usage * usable), scheduler_stats.num_running_reqs)

    def _publish_pages(self, free_blocks: int, num_running: int) -> None:
        assert self.report is not None
        pages = _gauge("kvserve:pages", "Pages of the KV pool (one KV head of one layer each).", "state")
        for state, count in self.report.pages(free_blocks, num_running).items():
            pages.labels(state).set(count)
