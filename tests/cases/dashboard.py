"""The queries of the Grafana dashboard and of the Prometheus rules, and the metrics that they name."""

from __future__ import annotations

import json
from pathlib import Path

import promql_parser
import yaml

DOCKER = Path(__file__).resolve().parents[2] / "docker"
RATE_INTERVAL = "$__rate_interval"  # Grafana fills it in


def dashboard_queries() -> list[str]:
    panels = json.loads((DOCKER / "grafana" / "kvserve.json").read_text())["panels"]
    return [target["expr"].replace(RATE_INTERVAL, "1m") for panel in panels for target in panel["targets"]]


def rules() -> list[dict]:
    groups = yaml.safe_load((DOCKER / "prometheus-rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def all_queries() -> list[str]:
    return dashboard_queries() + [rule["expr"] for rule in rules()]


def series_of(query: str) -> set[str]:
    """Names of the series that a query reads.

    Raises:
        ValueError: it is no PromQL.
    """
    return _series(promql_parser.parse(query))


def _series(node: object) -> set[str]:
    return {selector.name for selector in _selectors(node)}


def filters_of(query: str) -> list[set[str]]:
    """The labels by which each selector of a query picks series."""
    selectors = _selectors(promql_parser.parse(query))
    return [{matcher.name for matcher in selector.matchers.matchers} for selector in selectors]


def _selectors(node: object) -> list[promql_parser.VectorSelector]:
    found = [node] if isinstance(node, promql_parser.VectorSelector) else []
    below = [getattr(node, part, None) for part in ("expr", "lhs", "rhs", "vector_selector", "param")]
    below += getattr(node, "args", None) or []
    return sum((_selectors(child) for child in below if child is not None), found)


def wanted_series(evicts: bool) -> set[str]:
    """What a server must publish for every panel and alert; two metrics are of policies that evict only."""
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    wanted = set().union(*map(series_of, all_queries())) - recorded
    return wanted if evicts else {name for name in wanted if not name.startswith(("kvserve:kv_tokens", "kvserve:kept"))}
