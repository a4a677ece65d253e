"""README and docs say what the committed result files say."""

from __future__ import annotations

import json
from pathlib import Path

import compatibility_table
import measured_table
import pytest

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


def test_the_tables_in_readme_and_docs_are_made_from_the_result_files():
    for path, text in measured_table.documents().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `python scripts/measured_table.py`"


def test_every_result_file_names_its_command():
    for path in measured_table.RECORDS.glob("*.json"):
        assert json.loads(path.read_text(encoding="utf-8"))["command"], path.name


def test_a_row_shows_the_figures_of_its_record(records: Path):
    write_record(records, "cpu-zen4-speed", [row("stock", "step", 9, 8, 10), row("int8", "speed", 1.26, 1.1, 1.34)])
    figures = {"stock": ["cpu-zen4-speed", "stock", "step"], "a": ["cpu-zen4-speed", "int8", "speed"]}
    published = {"what": "step (stock: {stock:.0f})", "policy": "`int8`", "measured": "{a:.1f}x ({a.low} to {a.high})"}
    shown = measured_table.table([published | {"figures": figures}]).splitlines()[-1]
    assert (
        shown
        == "| step (stock: 9) | `int8` | 1.3x (1.1 to 1.34) |  | [speed](benchmarks/results/cpu-zen4-speed.json) |"
    )


@pytest.mark.parametrize(
    ("sense", "bound", "shown"),
    [(">=", 1.2, "aim"), (">=", 1.3, "aim, **missed**"), ("<=", 1.2, "aim, **missed**")],
)
def test_a_missed_aim_is_called_missed(records: Path, sense: str, bound: float, shown: str):
    write_record(records, "speed", {"the row": {"median": 1.26, "min": 1, "max": 2}})
    published = {
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
