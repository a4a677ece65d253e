"""README's table of policies and its picture say what the records and the layout of pages say."""

from __future__ import annotations

import json

import pytest

from benchmarks.reports import choices, overview
from benchmarks.reports.atlas import PREFIX, RECORDS, Atlas

ROW = "requests of 4,096 tokens in equal bytes, vs 16-bit"


@pytest.fixture(scope="module")
def found() -> dict[str, choices.Choice]:
    return {one.policy: one for one in choices.choices(Atlas(RECORDS, PREFIX))}


def test_the_picture_is_made_from_the_records() -> None:
    assert overview.PICTURE.read_text(encoding="utf-8") == overview.drawn(), (
        "run `python -m benchmarks.reports.overview`"
    )


@pytest.mark.parametrize("file", ["capacity", "evict-capacity"])
def test_memory_is_what_vllms_block_manager_counted(found: dict[str, choices.Choice], file: str) -> None:
    rows = json.loads((RECORDS / f"{PREFIX}-{file}.json").read_text(encoding="utf-8"))["rows"]
    counted = {row["policy"]: row["measured"]["median"] for row in rows if row["metric"] == ROW}
    both = counted.keys() & found.keys()
    assert both
    for policy in both:
        assert found[policy].memory == pytest.approx(counted[policy], rel=0.002), policy


@pytest.mark.parametrize("policy", overview.SHOWN)
def test_the_area_of_a_bar_is_its_memory_but_for_whole_blocks(found: dict[str, choices.Choice], policy: str) -> None:
    area = sum(span.tokens * span.bits for span in overview.spans(policy))
    assert choices.CONTEXT * 16 / area == pytest.approx(found[policy].memory, rel=0.12)


def test_speeds_are_those_of_the_atlas_and_missing_ones_stay_empty(found: dict[str, choices.Choice]) -> None:
    assert found["int8"].speed is None and found["boost-2bit"].speed is not None
    cells = {line.split("|")[2].strip(): line.split("|")[-2].strip() for line in choices.table().splitlines()[2:]}
    assert cells["`int8`"] == "" and cells["`boost-2bit`"] == f"{found['boost-2bit'].speed.value:.1f}x as fast"
