"""docs/eviction-results.md says what the records say, and the report's statistics are right."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.reports import eviction as script


def test_the_tables_of_the_document_are_made_from_the_committed_records() -> None:
    text = script.DOCUMENT.read_text(encoding="utf-8")
    assert script.filled(text, script.Report.read()) == text


def test_records_of_different_prompts_are_not_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("quality", "kvpress", "overlap"):
        record = f'{{"prompts_sha256": {{"texts": "{name}"}}}}'
        (tmp_path / f"cpu-zen4-evict-{name}.json").write_text(record, encoding="utf-8")
    monkeypatch.setattr(script, "RECORDS", tmp_path)
    with pytest.raises(SystemExit, match="different prompts"):
        script.Report.read()


def test_an_answer_counts_if_it_holds_the_number_with_or_without_commas() -> None:
    assert script.found(["It is 1,234,567.", "1234568", ""], ["1234567"] * 3) == [True, False, False]


def test_excess_perplexity_is_paired() -> None:
    dense = [-3.0, -1.0, -2.0, -5.0]
    constant = script.excess([nats - 0.1 for nats in dense], dense)
    assert constant == pytest.approx([100 * (math.exp(0.1) - 1)] * 3)  # texts differ widely, the loss does not
    assert script.verdict(constant) == "worse"
    assert script.verdict(script.excess(dense, [nats - 0.1 for nats in dense])) == "better"


def test_the_interval_of_a_mean_is_near_the_normal_one() -> None:
    losses = [0.01 * ((7 * text) % 20 - 9.5) + 0.02 for text in range(20)]  # spread evenly around 0.02
    found = script.excess([-loss for loss in losses], [0.0] * 20)
    error = math.sqrt(sum((loss - 0.02) ** 2 for loss in losses)) / 20
    low, high = (100 * math.expm1(0.02 + sign * 1.96 * error) for sign in (-1, 1))
    assert found.value == pytest.approx(100 * math.expm1(0.02))
    assert found.low == pytest.approx(low, abs=0.3) and found.high == pytest.approx(high, abs=0.3)
    assert script.verdict(found) == "no difference shown"


@pytest.mark.parametrize(("only_a", "only_b", "p"), [(5, 0, 2 / 32), (0, 0, 1), (3, 3, 1), (6, 1, 2 * 8 / 128)])
def test_the_sign_test_counts_prompts_that_one_alone_answers(only_a: int, only_b: int, p: float) -> None:
    a = [True] * 4 + [True] * only_a + [False] * only_b
    b = [True] * 4 + [False] * only_a + [True] * only_b
    assert script.sign_test(a, b) == pytest.approx(p)


def test_wilsons_interval_of_all_hits_ends_at_one() -> None:
    n, z = 24, script.Z
    assert script.wilson([True] * n) == pytest.approx((1, n / (n + z * z), 1))
