"""The server suite: every load on every server, interleaved, and the rows it reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from kvserve.bench.load import Load, Measured
from kvserve.measuring.engines import STOCK
from kvserve.measuring.results import Row, SuiteResult, interleave, ratio_row, ratios, spread

Runs = dict[str, list[Measured]]

# Metric, field of Measured, unit, and what the unit is of the field's.
TIMES = (
    ("TTFT, median", "ttft_median_ms", "s", 1e-3),
    ("TTFT, p99", "ttft_p99_ms", "s", 1e-3),
    ("TPOT, median", "tpot_median_ms", "ms", 1.0),
    ("TPOT, p99", "tpot_p99_ms", "ms", 1.0),
    ("output tokens/s", "output_tokens_per_second", "tok/s", 1.0),
)
COUNTS = (
    ("goodput", "good_requests_per_second", "requests/s"),
    ("running requests, peak", "peak_running", ""),
    ("preemptions", "preemptions", ""),
)


def server(
    measure: Callable[[str, Load, int], Measured], names: Sequence[str], loads: Sequence[Load], repeats: int, seed: int,
    say: Callable[[str], None],
) -> SuiteResult:  # fmt: skip
    """Measure all names under all loads.

    Args:
        measure: (name, load, seed) -> what one run of the load measured. All names get the same seed in a repeat, and
            no two repeats or loads share one: a prompt that a server has seen would come from its prefix cache.
        names: "stock" first.
    """
    rows: list[Row] = []
    raw: dict[str, Any] = {"loads": [asdict(load) for load in loads], "runs": {}}
    for index, load in enumerate(loads):
        runs: Runs = {name: [] for name in names}
        for repeat, name in interleave(names, repeats):
            run = measure(name, load, 1000 * seed + index * repeats + repeat)
            runs[name].append(run)
            say(f"server {load.name} {repeat + 1}/{repeats} {name}: {summary(run)}")
        rows += load_rows(load.name, runs)
        raw["runs"][load.name] = {name: [asdict(run) for run in found] for name, found in runs.items()}
    return SuiteResult(rows, raw)


def summary(run: Measured) -> str:
    """One run in one line."""
    return (
        f"{run.output_tokens_per_second:.1f} tokens/s, TTFT {run.ttft_median_ms / 1e3:.2f} s, "
        f"TPOT {run.tpot_median_ms:.0f} ms, {run.peak_running} running, {run.preemptions} preemptions, "
        f"{run.seconds:.0f} s"
    )


def load_rows(load: str, runs: Runs) -> list[Row]:
    """Rows of one load: times and throughput of stock, ratios to it, goodput and counts of all."""
    rows = []
    for metric, field, unit, factor in TIMES:
        samples = [factor * value for value in values(runs[STOCK], field)]
        rows.append(Row("server", STOCK, f"{load}: {metric}", unit, spread(samples)))
    for name, found in runs.items():
        if name != STOCK:
            for metric, field, _, _ in TIMES:
                over_stock = ratios(values(found, field), values(runs[STOCK], field))
                rows.append(ratio_row("server", name, f"{load}: {metric}, over stock", over_stock))
        for metric, field, unit in COUNTS:
            rows.append(Row("server", name, f"{load}: {metric}", unit, spread(values(found, field))))
    return rows


def values(runs: Sequence[Measured], field: str) -> list[float]:
    """One field of every repeat."""
    return [getattr(run, field) for run in runs]
