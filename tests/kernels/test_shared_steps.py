"""A layer that reads another's cache answers within the other's step, as the other would answer its queries."""

from __future__ import annotations

import pytest
import torch

from kvserve.attention.base import Answers, NewRows, PagedAttention, Received
from kvserve.attention.native import NativeAttention
from kvserve.attention.reference import ReferenceAttention
from tests.cases.attention_cases import Case, build_case, copy_cells, make_policy
from tests.cases.triton_cases import DEVICE, attention_of

# Steps that begin in a tile, complete one and more, bring one token, and begin a request.
FAMILIES = ("int8", "kivi-2", "dense-pages", "dense")
COMPUTED, NEW = [60, 130, 0, 63, 200], [70, 1, 200, 1, 30]


def case_of(family: str, window: int | None = None) -> Case:
    return build_case(make_policy(family), computed=COMPUTED, new_tokens=NEW, sliding_window=window)


def kernels_of(name: str, case: Case) -> PagedAttention:
    if name == "triton":
        return attention_of(case)
    kind = {"native": NativeAttention, "reference": ReferenceAttention}[name]
    return kind(case.layout, case.spec, tables=case.tables)


def other_rows(case: Case) -> NewRows:
    generator = torch.Generator().manual_seed(9)
    return NewRows(*(torch.randn(rows.shape, generator=generator) for rows in (case.query, case.key, case.value)))


@pytest.mark.parametrize(
    ("name", "family", "window"),
    [
        *((name, family, None) for name in ("native", "reference") for family in FAMILIES),
        ("native", "dense", 50),
        ("reference", "dense", 50),
        pytest.param("triton", "kivi-2", None, marks=pytest.mark.skipif(DEVICE.type != "cpu", reason="interpreted")),
    ],
)
def test_queries_of_another_layer_see_the_rows_of_an_open_step(name: str, family: str, window: int | None) -> None:
    case, other = case_of(family, window), other_rows(case_of(family, window))
    attention, reader = kernels_of(name, case), kernels_of(name, case)
    cells, expected_cells = copy_cells(case.cells), copy_cells(case.cells)
    expected, found, own = (torch.full_like(case.query, torch.nan) for _ in range(3))
    kernels_of(name, case).forward(
        NewRows(other.query, case.key, case.value), expected_cells, case.batch, Answers(expected)
    )
    opened = attention.open(NewRows(case.query, case.key, case.value), cells, case.batch, Answers(own)).copied()
    kernels_of(name, case).store(other.key, other.value, copy_cells(case.cells), case.batch)  # a layer between them
    reader.attend(other.query, cells, case.batch, opened.staged, Answers(found))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(own, case.run(kernels_of(name, case))[0])
    attention.close(opened)
    assert torch.equal(cells, expected_cells)


def test_a_closed_step_has_lost_rows_that_an_open_one_shows() -> None:
    """Why a target's tail waits: the new tokens' slots are those of tokens that the step's first queries still see."""
    case = case_of("int8")
    attention, cells = kernels_of("native", case), copy_cells(case.cells)
    early, late, own = (torch.full_like(case.query, torch.nan) for _ in range(3))
    opened = attention.open(NewRows(case.query, case.key, case.value), cells, case.batch, Answers(own)).copied()
    attention.attend(case.query, cells, case.batch, opened.staged, Answers(early))
    attention.close(opened)
    attention.attend(case.query, cells, case.batch, opened.staged, Answers(late))
    torch.testing.assert_close(early, own)
    assert not torch.allclose(late, own, atol=1e-2)


@pytest.mark.parametrize("family", ["int8", "dense-pages"])
def test_what_tokens_receive_of_an_open_step_is_added_when_it_closes(family: str) -> None:
    case = case_of(family)
    decodes = [request for request, count in enumerate(NEW) if count == 1]
    sums = {}
    for way in ("whole", "open"):
        tables = {request: torch.zeros(2, 300) for request in decodes}
        attention, cells = kernels_of("native", case), copy_cells(case.cells)
        place = (NewRows(case.query, case.key, case.value), cells, case.batch, Answers(torch.empty_like(case.query)))
        if way == "whole":
            attention.forward(*place, Received(1, tables))
        else:
            opened = attention.open(*place, Received(1, tables)).copied()
            assert not any(table.any() for table in tables.values())
            attention.close(opened)
        sums[way] = torch.stack(list(tables.values()))
    torch.testing.assert_close(sums["open"].sum(-1), torch.full((2, 2), 3.0))  # of a group's three heads
    torch.testing.assert_close(sums["open"], sums["whole"], atol=2e-2, rtol=0)
