"""The atlas: all shipped policies take part, the front is right, and the page says what the result files say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import atlas
from benchmarks.reports import atlas as atlas_report
from benchmarks.reports.atlas import Point
from kvserve.evals.statistics import Estimate
from kvserve.policies.registry import policy_names

UNKNOWN = Estimate(0, 0, 0)


def point(label: str, memory: float, perplexity: float) -> Point:
    return Point(label, "kvserve", memory, Estimate(perplexity, perplexity, perplexity), UNKNOWN, UNKNOWN, UNKNOWN)


def test_every_shipped_policy_is_in_the_atlas():
    assert {label.partition("@")[0] for label in atlas.policies()} == set(policy_names())


def test_the_front_holds_what_nothing_beats_in_both_bytes_and_perplexity():
    small, large, beaten = point("small", 8, 20), point("large", 2, 1), point("beaten", 4, 30)
    equal = point("equal", 8, 25)
    assert atlas_report.front([beaten, large, equal, small]) == [large, small]


def test_the_larger_of_two_caches_with_equal_perplexity_is_not_on_the_front():
    assert atlas_report.front([point("large", 2, 5), point("small", 4, 5)]) == [point("small", 4, 5)]


def test_speed_is_the_dense_time_over_the_time_repeat_by_repeat():
    assert atlas_report.speed([2, 4, 6], [1, 1, 2]) == Estimate(3, 2, 4)


def test_the_page_is_made_from_the_result_files():
    text = atlas_report.DOCUMENT.read_text(encoding="utf-8")
    found = atlas_report.Atlas(atlas_report.RECORDS, atlas_report.PREFIX)
    assert atlas_report.filled(text, found) == text, "run `python -m benchmarks.reports.atlas`"


def test_a_missing_result_file_is_named(tmp_path: Path):
    with pytest.raises(SystemExit, match=r"mine-atlas-eval\.json is missing: run `make atlas`"):
        atlas_report.Atlas(tmp_path, "mine")
