"""The order of kvserve's rooms: a package or module imports only what stands below it, so there is no circle.

Imports for annotations alone (`if TYPE_CHECKING:`) do not run and do not count.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# From the bottom up. Rooms of one line do not know each other.
FLOORS = (
    ("brought", "native", "prose", "shades", "text_files"),
    ("codecs", "part_registry"),
    ("errors", "pages"),
    ("budgets", "default_model", "kernels", "retention", "schedules", "scorers", "transforms"),
    ("attention", "compat", "layer_kinds", "policies"),
    ("speculation",),
    ("accounting", "connectors", "refused_models"),
    ("checks",),
    ("arguments", "eviction"),
    ("calibration", "probe"),
    ("engine",),
    ("measuring",),
    ("calibrate",),
    ("bench", "evals", "inspect"),
    ("doctor",),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
COMMANDS = {"cli", "bench", "calibrate", "doctor", "evals", "inspect"}


def _imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of the modules, or of what is taken out of them, that run with this code."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in node.orelse:
                yield from _imported(other)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "kvserve.(relative)"
        yield from _imported(node)


def rooms_of(source: str) -> set[str]:
    """The rooms of kvserve that a file's code imports."""
    names = [name.split(".") for name in _imported(ast.parse(source))]
    return {name[1] for name in names if name[0] == "kvserve" and len(name) > 1}


def complaints(room: str, source: str) -> list[str]:
    """What is wrong with the imports of one file of a room."""
    return [f"{room} imports {other}" for other in sorted(rooms_of(source) - {room}) if not is_below(other, room)]


def is_below(other: str, room: str) -> bool:
    """Whether `room` may import `other`."""
    return FLOOR_OF.get(other, len(FLOORS)) < FLOOR_OF[room]


def all_files() -> dict[str, list[Path]]:
    """Python files by room."""
    found: dict[str, list[Path]] = {}
    for path in sorted((ROOT / "kvserve").glob("*")):
        if path.is_dir() and (path / "__init__.py").exists():
            found[path.name] = sorted(path.resolve().rglob("*.py"))
        elif path.suffix == ".py" and path.name != "__init__.py":
            found[path.stem] = [path]
    return found


FILES = all_files()


def test_every_room_has_its_place() -> None:
    assert set(FILES) <= set(FLOOR_OF), "a new room: put it into FLOORS"
    assert sum(map(len, FLOORS)) == len(FLOOR_OF), "a room stands on two floors"


@pytest.mark.parametrize("room", FILES)
def test_no_import_runs_up(room: str) -> None:
    found = [f"{path.name}: {line}" for path in FILES[room] for line in complaints(room, path.read_text("utf-8"))]
    assert not found


@pytest.mark.parametrize("room", [room for room in FILES if room not in COMMANDS])
def test_nothing_below_the_commands_knows_one(room: str) -> None:
    assert not COMMANDS & {other for path in FILES[room] for other in rooms_of(path.read_text("utf-8"))}


def test_pages_and_codecs_stand_on_their_own() -> None:
    for room, known in (("pages", {"pages", "codecs"}), ("codecs", {"codecs", "brought"})):
        for path in FILES.get(room, []):
            assert rooms_of(path.read_text("utf-8")) <= known, path


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("engine", "from kvserve.bench.command import main"),
        ("engine", "def late():\n    import kvserve.cli.main"),
        ("engine", "from kvserve import doctor"),
        ("pages", "from kvserve.attention.base import Batch"),
        ("codecs", "import kvserve.pages.layout as layout"),
        ("bench", "if True:\n    from kvserve.evals import text"),
        ("evals", "from ..cli import main"),
        ("cli", "from kvserve.nowhere import thing"),
    ],
)
def test_an_import_that_runs_up_is_found(room: str, source: str) -> None:
    assert len(complaints(room, source)) == 1


def test_annotations_and_own_modules_do_not_count() -> None:
    source = "if TYPE_CHECKING:\n    from kvserve.cli import main\nimport kvserve.pages.kept"
    assert complaints("pages", source) == []
