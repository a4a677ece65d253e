#!/usr/bin/env python3
"""docs/measured.md, docs/records.md and README's table of policies, from the files in benchmarks/results.

    python -m benchmarks.reports.measured

benchmarks/published.yaml has the rows of docs/measured.md, choices.py those of README.
"""

import json
import operator
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.reports import choices
from benchmarks.reports.documents import command_of, fill

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "benchmarks" / "results"
PUBLISHED = ROOT / "benchmarks" / "published.yaml"
README = ROOT / "README.md"
MEASURED, RECORD_LIST = ROOT / "docs" / "measured.md", ROOT / "docs" / "records.md"
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


def machines() -> dict[str, str]:
    """The machines that have records: their names, which begin the names of their files, and what they are."""
    found: dict[str, str] = {}
    for path in sorted(RECORDS.glob("cpu-*.json")):
        machine = json.loads(path.read_text(encoding="utf-8")).get("machine", {})
        name = machine.get("id") or "-".join(path.stem.split("-")[:2])
        found[name] = found.get(name) or _describe(machine)
    return found


def _describe(machine: dict[str, Any]) -> str:
    cores = f"{machine['cores']} cores" if "cores" in machine else ""
    return ", ".join(str(part) for part in (machine.get("cpu"), machine.get("device"), cores) if part)


def table(published: list[dict[str, Any]]) -> str:
    """The tables of docs/measured.md, one for each machine.

    Raises:
        SystemExit: no machine has the files of a row.
    """
    shown: set[int] = set()
    tables = []
    for machine, what in machines().items():
        lines = _table_of(machine, published, shown)
        if lines:
            head = ["| what | policy | measured | aim | record |", "|---|---|---|---|---|"]
            tables.append("\n".join([f"`{machine}`" + (f": {what}" if what else ""), "", *head, *lines]))
    for index, row in enumerate(published):
        if index not in shown:
            raise SystemExit(f"{PUBLISHED.name} names {_files(row)}, which no machine has in {RECORDS.name}")
    return "\n\n".join(tables)


def _files(row: dict[str, Any]) -> str:
    return " and ".join(sorted({where[0] for where in row["figures"].values()}))


def _table_of(machine: str, published: list[dict[str, Any]], shown: set[int]) -> list[str]:
    """The rows whose record this machine has, whose indices go into `shown`.

    Rows without `what` go on with the one above, and are left out with it.
    """
    lines, above = [], False
    for index, row in enumerate(published):
        (file,) = {where[0] for where in row["figures"].values()}
        has_record = (RECORDS / f"{machine}-{file}.json").exists()
        above = has_record and (above or "what" in row)
        if not above:
            continue
        shown.add(index)
        figures = {
            name: Figure.find(f"{machine}-{name_of}", *rest) for name, (name_of, *rest) in row["figures"].items()
        }
        what, measured = (row.get(name, "").format(**figures) for name in ("what", "measured"))
        link = f"[{file}](../benchmarks/results/{machine}-{file}.json)"
        lines.append(f"| {what} | {row['policy']} | {measured} | {_aim(row, figures)} | {link} |")
    return lines


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
        on, started = _describe(record.get("machine", {})), record.get("started", "")[:10]
        link = f"[{path.stem}](../benchmarks/results/{path.name})"
        lines.append(f"| {link} | `{command_of(record)}` | {on} | {started} |")
    return "\n".join(lines)


def documents() -> dict[Path, str]:
    """The documents with their tables made anew."""
    published = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    contents = {
        README: ("choices", choices.table()),
        MEASURED: ("measured", table(published)),
        RECORD_LIST: ("records", record_list()),
    }
    return {path: fill(path.read_text(encoding="utf-8"), *content) for path, content in contents.items()}


def main() -> int:
    """Write the documents."""
    for path, text in documents().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
