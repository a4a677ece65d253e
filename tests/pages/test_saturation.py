"""Rows that float16 has no room for are stored as the nearest that it has, and counted."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from kvserve.attention.native import NativeAttention, available_isas
from kvserve.attention.reference import ReferenceAttention
from kvserve.attention.saturation import rows_beyond_range
from kvserve.codecs.base import FLOAT16_MAX
from kvserve.pages.reference import hadamard
from tests.cases.attention_cases import Case, build_case, make_policy

CPU = torch.device("cpu")


def triton_stage(case: Case) -> torch.Tensor:
    triton = pytest.importorskip("kvserve.attention.triton")
    return triton.TritonAttention(case.layout, case.spec).stage(case.key, case.value)


STAGES: dict[str, Callable[[Case], torch.Tensor]] = {
    "reference": lambda case: ReferenceAttention(case.layout, case.spec).stage(case.key, case.value),
    "triton": triton_stage,
}
for name in available_isas():
    STAGES[name] = functools.partial(
        lambda isa, case: NativeAttention(case.layout, case.spec, isa).stage(case.key, case.value), name
    )


def case_of(family: str, dtype: torch.dtype) -> Case:
    """Of 40 tokens and two KV heads, five K or V rows with a number that is too large, and a NaN that is none."""
    case = build_case(make_policy(family), computed=[0], new_tokens=[40], model_dtype=dtype, group=1)
    case.key[3, 0, 5], case.key[3, 1, 6], case.key[39, 0, :] = 7e4, -torch.inf, 1e6
    case.key[8, 0, 0], case.key[9, 0, 0] = FLOAT16_MAX if dtype == torch.float32 else 65280.0, torch.nan
    # Even numbers that are large only once they are rotated, and the other way round.
    case.value[5, 1, :] = 6e4
    case.value[6, 0, :] = 0.0
    case.value[6, 0, 0] = 9e4
    return case


def too_large(case: Case, rotated: bool) -> int:
    """Rows beyond the range, by plain loops."""
    rows = [row for token in case.key.double() for row in token]
    values = case.value.double() @ hadamard(64).double() if rotated else case.value.double()
    rows += [row for token in values for row in token]
    return sum(any(abs(x) > FLOAT16_MAX for x in row.tolist()) for row in rows)


@pytest.mark.parametrize("where", STAGES)
@pytest.mark.parametrize(
    ("family", "dtype", "counted"),
    [
        ("kivi-2", torch.float32, True), ("kivi-2", torch.bfloat16, True), ("boosted", torch.float32, True),
        ("dense-pages", torch.bfloat16, False), ("dense", torch.float32, False),
    ],
)  # fmt: skip
def test_rows_beyond_float16_are_counted_where_something_is_float16(family, dtype, counted, where):
    case, counter = case_of(family, dtype), rows_beyond_range(CPU)
    before = int(counter)
    staged = STAGES[where](case)
    expected = too_large(case, family == "boosted") if counted else 0
    assert int(counter) - before == expected
    assert not counted or expected == 4
    if case.layout.dense_dtype == torch.float16:
        assert (staged.abs() <= FLOAT16_MAX).logical_or(staged.isnan()).all()


@pytest.mark.parametrize("where", STAGES)
def test_ordinary_rows_are_not_counted(where):
    before = int(rows_beyond_range(CPU))
    STAGES[where](build_case(make_policy("boosted"), computed=[0], new_tokens=[40], group=1))
    assert int(rows_beyond_range(CPU)) == before


def test_an_engine_says_once_that_rows_are_out_of_range(monkeypatch):
    from kvserve.engine import range_watch

    said: list[str] = []
    monkeypatch.setattr(range_watch.logger, "warning", lambda text, *arguments: said.append(text % arguments))
    rows_beyond_range(CPU).zero_()
    watch, case = range_watch.RangeWatch(CPU), case_of("kivi-2", torch.float32)
    watch.look()
    assert said == []
    NativeAttention(case.layout, case.spec).stage(case.key, case.value)
    watch.look()
    watch.look()
    assert len(said) == 1 and said[0].startswith("4 rows") and said[0].endswith("policy none")
