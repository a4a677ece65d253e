"""The figures on a terminal: a column for each policy."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from kvserve.evals.options import TEXT
from kvserve.evals.report import Row, format_estimate
from kvserve.measuring.results import format_number

PIPED_WIDTH = 160


def print_tables(rows: Sequence[Row], verdicts: Sequence[str], policies: Sequence[str]) -> None:
    """Text, tasks, and what the intervals allow to say, on stdout."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPED_WIDTH)
    text = [row for row in rows if row.suite == TEXT]
    tasks = [row for row in rows if row.suite != TEXT and (row.samples > 1 or "depth" not in dict(row.cell))]
    for title, found in (("text", text), ("tasks: % of the expected answers that were given", tasks)):
        if found:
            console.print(table(title, found, policies))
    console.print("Brackets: 95 % bootstrap intervals, over windows of text and over questions.", soft_wrap=True)
    for verdict in verdicts:
        console.print(verdict, soft_wrap=True)


def table(title: str, rows: Sequence[Row], policies: Sequence[str]) -> Table:
    """One line for each policy where there are few figures (text), else for each figure."""
    result = Table(title=title, title_justify="left")
    lines = list(dict.fromkeys(_line(row) for row in rows))
    cells = {(_line(row), row.policy): format_estimate(row.measured, format_number) for row in rows}
    shown = [policy for policy in policies if any(row.policy == policy for row in rows)]
    result.add_column("")
    for policy in shown:
        result.add_column(policy, justify="right")
    for line in lines:
        result.add_row(line, *(cells.get((line, policy), "") for policy in shown))
    return result


def _line(row: Row) -> str:
    if row.suite == TEXT:
        return f"{row.metric}, {row.unit}" if row.unit else row.metric
    conditions = dict(row.cell)
    words = [row.suite, f"question {conditions['question']}"]
    if "length" in conditions:
        words.append(f"{conditions['length']:,} tokens")
    if "depth" in conditions:
        words.append(f"depth {conditions['depth']:g}")
    return ", ".join(words)
