"""README and docs say what the committed result files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.reports import compatibility as compatibility_table
from benchmarks.reports import measured as measured_table
from kvserve.policies.registry import policy_names


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for result files of a test's own."""
    monkeypatch.setattr(measured_table, "RECORDS", tmp_path)
    return tmp_path


def write_record(folder: Path, name: str, rows: object) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")


def row(policy: str, metric: str, *measured: float) -> dict[str, object]:
    return {"policy": policy, "metric": metric, "measured": dict(zip(("median", "low", "high"), measured, strict=True))}


def test_the_tables_of_readme_and_docs_are_made_from_the_result_files():
    for path, text in measured_table.documents().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `python -m benchmarks.reports.measured`"


def test_every_result_file_names_its_command():
    for path in measured_table.RECORDS.glob("*.json"):
        assert json.loads(path.read_text(encoding="utf-8"))["command"], path.name


def test_a_row_shows_the_figures_of_its_record(records: Path):
    write_record(records, "cpu-zen4-speed", [row("stock", "step", 9, 8, 10), row("int8", "speed", 1.26, 1.1, 1.34)])
    figures = {"stock": ["speed", "stock", "step"], "a": ["speed", "int8", "speed"]}
    published = {"what": "step (stock: {stock:.0f})", "policy": "`int8`", "measured": "{a:.1f}x ({a.low} to {a.high})"}
    shown = measured_table.table([published | {"figures": figures}]).splitlines()[-1]
    assert (
        shown
        == "| step (stock: 9) | `int8` | 1.3x (1.1 to 1.34) |  | [speed](../benchmarks/results/cpu-zen4-speed.json) |"
    )


def test_every_machine_with_records_has_a_table_of_the_rows_it_has(records: Path):
    for machine, cpu, files in (("cpu-spr", "Intel Xeon", ["step"]), ("cpu-zen4", "AMD EPYC", ["speed", "step"])):
        for name in files:
            speed = {"step": 2.03, "speed": 1.26}[name] if machine == "cpu-spr" else 2.55
            content = {"machine": {"id": machine, "cpu": cpu, "cores": 2}, "rows": [row("int8", "speed", speed, 1, 3)]}
            (records / f"{machine}-{name}.json").write_text(json.dumps(content), encoding="utf-8")
    published = [
        {"what": "alone", "policy": "p", "measured": "{a}", "figures": {"a": ["speed", "int8", "speed"]}},
        {"policy": "goes on", "measured": "{a}", "figures": {"a": ["speed", "int8", "speed"]}},
        {"what": "in the engine", "policy": "p", "measured": "{a}x", "figures": {"a": ["step", "int8", "speed"]}},
    ]
    spr, zen4 = (part.splitlines() for part in measured_table.table(published).split("\n\n`"))
    assert spr[0] == "`cpu-spr`: Intel Xeon, 2 cores" and zen4[0] == "cpu-zen4`: AMD EPYC, 2 cores"
    assert spr[4:] == ["| in the engine | p | 2.03x |  | [step](../benchmarks/results/cpu-spr-step.json) |"]
    assert len(zen4[4:]) == 3 and zen4[-1].startswith("| in the engine | p | 2.55x |")
    with pytest.raises(SystemExit, match="gone, which no machine has"):
        measured_table.table([*published, {"what": "", "policy": "p", "figures": {"a": ["gone", "int8", "speed"]}}])


@pytest.mark.parametrize(
    ("sense", "bound", "shown"),
    [(">=", 1.2, "aim"), (">=", 1.3, "aim, **missed**"), ("<=", 1.2, "aim, **missed**")],
)
def test_a_missed_aim_is_called_missed(records: Path, sense: str, bound: float, shown: str):
    write_record(records, "cpu-zen4-speed", {"the row": {"median": 1.26, "min": 1, "max": 2}})
    published = {
        "what": "w",
        "policy": "p",
        "measured": "{a}",
        "figures": {"a": ["speed", "the row"]},
        "aim": ["a", sense, bound, "aim"],
    }
    assert f"| {shown} |" in measured_table.table([published])


@pytest.mark.parametrize(
    ("file", "metric", "message"), [("gone", "speed", "gone.json"), ("speed", "size", "has 0 rows")]
)
def test_a_figure_that_no_record_has_is_refused(records: Path, file: str, metric: str, message: str):
    write_record(records, "speed", [row("int8", "speed", 1, 1, 1)])
    with pytest.raises(SystemExit, match=message):
        measured_table.Figure.find(file, "int8", metric)


def test_the_compatibility_page_is_made_from_its_result_file():
    assert compatibility_table.DOCUMENT.read_text(encoding="utf-8") == compatibility_table.document()


def test_the_compatibility_matrix_has_every_policy_and_no_hole():
    matrix = json.loads(compatibility_table.RECORD.read_text(encoding="utf-8"))["matrix"]
    assert set(matrix) == set(policy_names()), "run `make matrix`"
    assert len({frozenset(cells) for cells in matrix.values()}) == 1
