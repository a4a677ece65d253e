"""Samples, ratios to stock, the target table and the result file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.table import Table

SCHEMA_VERSION = 1


class Spread(NamedTuple):
    """Median and range of the repeats."""

    median: float
    low: float
    high: float


def spread(samples: Sequence[float]) -> Spread:
    """Median and range of at least one sample."""
    return Spread(statistics.median(samples), min(samples), max(samples))


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Element-wise quotients: sample i of both comes from repeat i, so a slow spell of the machine cancels out.

    Raises:
        ValueError: the two have different numbers of repeats.
    """
    return [top / bottom for top, bottom in zip(numerator, denominator, strict=True)]


def interleave(names: Sequence[str], repeats: int) -> list[tuple[int, str]]:
    """(repeat, name) pairs: every repeat runs all names once, starting one further each time."""
    order = []
    for repeat in range(repeats):
        start = repeat % len(names)
        order += [(repeat, name) for name in (*names[start:], *names[:start])]
    return order


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        measured: median and range, in `unit`.
        target: bound on the median; None where there is none.
        sense: whether the median must be at least or at most the target.
    """

    suite: str
    policy: str
    metric: str
    unit: str
    measured: Spread
    target: float | None = None
    sense: Literal[">=", "<="] = ">="

    @property
    def is_met(self) -> bool | None:
        """Whether the median meets the target."""
        if self.target is None:
            return None
        return self.measured.median >= self.target if self.sense == ">=" else self.measured.median <= self.target


@dataclass(frozen=True)
class SuiteResult:
    """What a suite reports: rows for the table and everything they were computed from."""

    rows: list[Row]
    raw: dict[str, Any]


def ratio_row(
    suite: str, policy: str, metric: str, samples: Sequence[float], target: float | None = None,
    sense: Literal[">=", "<="] = ">=",
) -> Row:  # fmt: skip
    """A row of ratios, unit `x`."""
    return Row(suite, policy, metric, "x", spread(samples), target, sense)


def row_content(row: Row) -> dict[str, Any]:
    """The row as JSON."""
    return {**asdict(row), "measured": row.measured._asdict(), "is_met": row.is_met}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write the result file, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def format_number(value: float) -> str:
    """Four significant digits, thousands grouped."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(rows: Sequence[Row]) -> Table:
    """The rows with their targets."""
    result = Table(title="kvserve bench", title_justify="left")
    for name in ("suite", "policy", "metric"):
        result.add_column(name)
    for name in ("median", "min .. max", "target"):
        result.add_column(name, justify="right")
    result.add_column("met")
    for row in rows:
        low_high = f"{format_number(row.measured.low)} .. {format_number(row.measured.high)}"
        target = "" if row.target is None else f"{row.sense} {format_number(row.target)}"
        met = {None: "", True: "yes", False: "no"}[row.is_met]
        median = f"{format_number(row.measured.median)} {row.unit}".rstrip()
        result.add_row(row.suite, row.policy, row.metric, median, low_high, target, met)
    return result


def print_table(rows: Sequence[Row]) -> None:
    """The table on stdout, 120 columns wide where it is not a terminal."""
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table(rows))
