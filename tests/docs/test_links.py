"""Links and paths in README and docs lead somewhere, and README is short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
MAX_README_LINES = 150

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
GIVEN = re.compile(r"^(.*`.*:)\n\n```", re.MULTILINE)  # a line in front of a block
# What stands in backticks and names a file of the repository; patterns and placeholders are left out.
PATH = re.compile(r"(?:kvserve|kernels|csrc|tests|benchmarks|scripts|configs|docs|docker)/[\w./-]+")


def links_of(page: Path) -> list[str]:
    """Targets of the links in a page, those to other sites and those in code left out."""
    targets = LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    return [target for target in targets if not re.match(r"\w+:", target)]


def anchors_of(page: Path) -> set[str]:
    """What `#` links to a page may name: its headings as GitHub spells them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    plain = (LINK.sub("]", heading).replace("]", "").replace("[", "") for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def dead_links(page: Path) -> list[str]:
    """Links of a page that lead nowhere."""
    dead = []
    for link in links_of(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            dead.append(link)
    return dead


def paths_of(page: Path) -> list[str]:
    """Files and folders of the repository that a page names in backticks, but for new ones whose content it gives."""
    text = page.read_text(encoding="utf-8")
    given = {code for line in GIVEN.findall(text) for code in CODE.findall(line)}
    codes = CODE.findall(FENCE.sub("", text))
    return [code for code in codes if PATH.fullmatch(code) and code not in given]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_link_is_dead(page: Path) -> None:
    assert dead_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    assert [path for path in paths_of(page) if not (ROOT / path).exists()] == []


def test_every_page_is_linked_from_readme() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links_of(README)}
    assert [page.name for page in PAGES if page != README and page not in linked] == []


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES


def test_dead_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# What it costs: `a` and [b](c)\n\n```\n# no heading\n```\n", encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n[1](other.md#what-it-costs-a-and-b) [2](#here) [3](https://nowhere.invalid/x) ![4](gone.png)\n"
        "[5](other.md#no-heading) [6](#there) [7](gone.md)\n```\n[8](gone.md)\n```\n",
        encoding="utf-8",
    )
    assert dead_links(page) == ["gone.png", "other.md#no-heading", "#there", "gone.md"]
