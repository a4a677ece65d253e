#!/usr/bin/env python3
"""README's table "Measured" and docs/records.md, from benchmarks/published.yaml and the files in benchmarks/results.

python scripts/measured_table.py
"""

import json
import operator
import sys
from pathlib import Path
from typing import Any

import yaml
from documents import fill

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "results"
PUBLISHED = ROOT / "benchmarks" / "published.yaml"
README, RECORD_LIST = ROOT / "README.md", ROOT / "docs" / "records.md"
IS_MET = {">=": operator.ge, "<=": operator.le}


class Figure(float):
    """The median of one row of a result file, with its lowest and highest repeat."""

    low: float
    high: float

    @classmethod
    def find(cls, file: str, *row: str) -> "Figure":
        """Look a figure up.

        Raises:
            SystemExit: there is no such file or row, or more than one.
        """
        path = RECORDS / f"{file}.json"
        if not path.exists():
            raise SystemExit(f"{PUBLISHED.name} names {path.name}, which is not in {RECORDS.name}")
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        if isinstance(rows, dict):  # of benchmarks/eviction_speed.py
            found = [measured for name, measured in rows.items() if (name,) == row]
            low, high = "min", "max"
        else:
            found = [one["measured"] for one in rows if (one["policy"], one["metric"]) == row]
            low, high = "low", "high"
        if len(found) != 1:
            raise SystemExit(f"{path.name} has {len(found)} rows {', '.join(row)}")
        figure = cls(found[0]["median"])
        figure.low, figure.high = found[0][low], found[0][high]
        return figure


def table(published: list[dict[str, Any]]) -> str:
    """README's table; rows without `what` go on with the one above."""
    lines = ["| what | policy | measured | aim | record |", "|---|---|---|---|---|"]
    for row in published:
        figures = {name: Figure.find(*where) for name, where in row["figures"].items()}
        what, measured = (row.get(name, "").format(**figures) for name in ("what", "measured"))
        (file,) = {where[0] for where in row["figures"].values()}
        link = f"[{file.removeprefix('cpu-zen4-')}](benchmarks/results/{file}.json)"
        lines.append(f"| {what} | {row['policy']} | {measured} | {_aim(row, figures)} | {link} |")
    return "\n".join(lines)


def _aim(row: dict[str, Any], figures: dict[str, Figure]) -> str:
    if "aim" not in row:
        return ""
    name, sense, bound, text = row["aim"]
    return text if IS_MET[sense](figures[name], bound) else f"{text}, **missed**"


def record_list() -> str:
    """Every result file: its command, when and on what it was made."""
    lines = ["| result file | made by | on | started |", "|---|---|---|---|"]
    for path in sorted(RECORDS.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        command, machine = record["command"], record.get("machine", {})
        words = " ".join(command if isinstance(command, list) else [command])
        on = ", ".join(str(part) for part in (machine.get("cpu"), machine.get("device")) if part)
        cores = f", {machine['cores']} cores" if "cores" in machine else ""
        started = record.get("started", "")[:10]
        lines.append(f"| [{path.stem}](../benchmarks/results/{path.name}) | `{words}` | {on}{cores} | {started} |")
    return "\n".join(lines)


def documents() -> dict[Path, str]:
    """Both documents with their tables made anew."""
    published = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    contents = {README: ("measured", table(published)), RECORD_LIST: ("records", record_list())}
    return {path: fill(path.read_text(encoding="utf-8"), *content) for path, content in contents.items()}


def main() -> int:
    """Write both documents."""
    for path, text in documents().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
