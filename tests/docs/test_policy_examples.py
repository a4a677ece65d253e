"""Policies that pages show are policies, and every option of serve is on the page about serving."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvserve.arguments import own_options
from kvserve.policies.loading import load_policy
from kvserve.policies.registry import policy_names

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = [page for page in sorted(DOCS.glob("*.md")) if page.name != "adding-a-method.md"]  # has a test of its own
EXAMPLES = [
    pytest.param(text, id=page.name)
    for page in PAGES
    for text in re.findall(r"^```yaml\n(name:.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
]


@pytest.mark.parametrize("text", EXAMPLES)
def test_a_policy_that_a_page_shows_loads(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_policy(str(path)).name == "mine"


def test_every_shipped_policy_has_a_row_in_a_table() -> None:
    tables = "".join((DOCS / page).read_text(encoding="utf-8") for page in ("policies.md", "eviction.md"))
    first = [line.split("|")[1] for line in tables.splitlines() if line.startswith("| `")]
    assert set(policy_names()) <= {name for cell in first for name in re.findall(r"`([^`]+)`", cell)}


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3


def test_every_option_of_serve_is_on_its_page() -> None:
    page = (DOCS / "serving.md").read_text(encoding="utf-8")
    options = {*own_options._EXAMPLES, "--no-self-test", "--verbose"}
    assert {option for option in options if f"`{option}" not in page} == set()
