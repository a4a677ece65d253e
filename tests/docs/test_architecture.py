"""docs/architecture.md and docs/adding-a-method.md name rooms, classes and words as the code does."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.package.test_rooms import FLOORS

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURE, ADDING = ROOT / "docs" / "architecture.md", ROOT / "docs" / "adding-a-method.md"
WORDS = [
    "tile",
    "page",
    "cell",
    "strip",
    "block",
    "slot",
    "tail",
    "sinks",
    "header",
    "cut",
    "plan",
    "codec",
    "half",
    "stage",
    "table",
    "transform",
    "retention",
    "log-mass",
    "scorer",
    "budget",
    "schedule",
]


def floors_of(text: str) -> list[set[str]]:
    """The floors of the page's drawing, from the bottom up: the words before two spaces, of lines that have some."""
    drawing = text.partition("<!-- rooms -->")[2].partition("<!-- end rooms -->")[0]
    lines = [line for line in drawing.splitlines() if re.match(r"\w", line)]
    return [set(re.split(r"  +", line)[0].split()) for line in reversed(lines)]


@cache
def members() -> dict[str, set[str]]:
    """Methods and fields of every class of kvserve, by its name; those of its bases included."""
    own: dict[str, set[str]] = {}
    bases: dict[str, list[str]] = {}
    for path in sorted((ROOT / "kvserve").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found = own.setdefault(node.name, set())
                bases.setdefault(node.name, []).extend(ast.unparse(base).split("[")[0] for base in node.bases)
                for child in node.body:
                    if isinstance(child, ast.FunctionDef):
                        found.add(child.name)
                    elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
                        found.add(child.target.id)

    def with_bases(name: str) -> set[str]:
        return own.get(name, set()).union(*(with_bases(base) for base in bases.get(name, ()) if base != name))

    return {name: with_bases(name) for name in own}


def unknown_members(text: str) -> list[str]:
    """`Class.member` of a text, in code or not, that no class of kvserve has."""
    named = re.findall(r"(?<![\w./])([A-Z][A-Za-z]+)\.([a-z_]+)\b(?!\.)", text)
    return [f"{cls}.{member}" for cls, member in named if cls in members() and member not in members()[cls]]


def test_the_rooms_of_the_page_are_those_that_imports_obey() -> None:
    assert floors_of(ARCHITECTURE.read_text(encoding="utf-8")) == [set(floor) for floor in FLOORS]


@pytest.mark.parametrize("page", [ARCHITECTURE, ADDING], ids=lambda page: page.name)
def test_every_method_that_a_page_names_exists(page: Path) -> None:
    assert unknown_members(page.read_text(encoding="utf-8")) == []


def test_a_method_that_is_gone_is_found() -> None:
    assert unknown_members("`PagedAttention.stage` and PagedAttention.gone, kvserve/x.py") == ["PagedAttention.gone"]


@pytest.mark.parametrize("word", WORDS)
def test_words_of_the_code_are_explained(word: str) -> None:
    assert re.search(rf"^\| {word} \| \S", ARCHITECTURE.read_text(encoding="utf-8"), re.MULTILINE)
