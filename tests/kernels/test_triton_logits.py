"""Capped logits and learned sinks in the Triton kernels: interpreted on the CPU, or on a GPU."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from kvserve.attention.base import Answers, Stored
from kvserve.attention.reference import ReferenceAttention
from kvserve.attention.triton import TritonAttention
from kvserve.pages.kept import NOT_KEPT
from tests.cases.attention_cases import build_case, make_policy
from tests.cases.kept_cases import LAYERS, Ask, KeptCase, build_kept_case
from tests.cases.triton_cases import DEVICE, attention_of, batch_on, cells_on, run, run_case

slow = pytest.mark.slow
BOTH: dict[str, Any] = {"soft_cap": 2.0, "sinks": True}
ASKS = (Ask(64, 128, 1, (9, 0)), Ask(0, 70, 1), Ask(64, 71, 3, (20, 60)), Ask(0, 0, 1))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@functools.cache
def kept_case(family: str, **options: Any) -> KeptCase:
    """A step over evicted and whole requests, with decode rows and prompts."""
    return build_kept_case(make_policy(family), list(ASKS), num_kv_heads=1, group=3, **options)


def kernels_of(case: KeptCase) -> TritonAttention:
    return TritonAttention(case.layout, case.spec.on(DEVICE))


@pytest.mark.parametrize("options", [{"soft_cap": 2.0}, {"sinks": True}, BOTH], ids=["capped", "sinks", "both"])
@pytest.mark.parametrize("family", ["kivi-2", pytest.param("boosted", marks=slow), pytest.param("int8", marks=slow)])
def test_steps_answer_as_a_plain_softmax(family: str, options: dict[str, Any]) -> None:
    case, layer = kept_case(family, **options), LAYERS[0]
    rows = case.new_rows(case.key[layer]), case.new_rows(case.value[layer])
    found = run(kernels_of(case), torch.cat(case.query[layer]), *rows, case.arena[:, :, layer], case.batch)
    for mine, wanted in zip(found, case.expected(layer), strict=False):
        torch.testing.assert_close(mine.double(), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("family", ["dense", "dense-pages", "table-3+vector", "kivi-4"])
def test_steps_match_the_reference(family: str) -> None:
    case = build_case(make_policy(family), computed=[63, 100, 0], new_tokens=[1, 1, 20], num_kv_heads=1, **BOTH)
    for mine, wanted in zip(run_case(case), case.run(case.reference), strict=False):
        torch.testing.assert_close(mine, wanted, **CLOSE)


def test_windows_match_the_reference() -> None:
    case = build_case(
        make_policy("kivi-2"), computed=[140, 100], new_tokens=[1, 20], num_kv_heads=1, sliding_window=50, **BOTH
    )
    for mine, wanted in zip(run_case(case), case.run(case.reference), strict=False):
        torch.testing.assert_close(mine, wanted, **CLOSE)


@pytest.mark.parametrize("family", ["dense", "kivi-2"])
@pytest.mark.parametrize("splits", [1, 2, 8])
def test_a_sink_counts_once_however_a_context_is_split(splits: int, family: str) -> None:
    """There are more splits than chunks: the first one may have no token."""
    case = build_case(make_policy(family), computed=[3, 300], new_tokens=[1, 1], num_kv_heads=1, **BOTH)
    expected, expected_lse = case.run(case.reference)
    attention, cells = attention_of(case), cells_on(DEVICE, case.cells)
    batch, query = batch_on(DEVICE, case.batch), case.query.to(DEVICE)
    staged = attention.stage(case.key.to(DEVICE), case.value.to(DEVICE))
    attention.store_sealed(cells, batch, staged)
    output, lse = torch.empty_like(query), torch.empty(query.shape[:2], device=DEVICE)
    attention.decode(query, attention._tables(cells, batch), staged, Answers(output, lse), splits=splits)
    torch.testing.assert_close(output.cpu(), expected, **CLOSE)
    torch.testing.assert_close(lse.cpu(), expected_lse, **CLOSE)


@pytest.mark.parametrize("family", ["kivi-2", "dense-pages"])
@pytest.mark.parametrize(("power", "reduce"), [(1, "sum"), (2, "max")])
def test_attention_sums_match_the_reference(power: int, reduce: str, family: str) -> None:
    case, layer = kept_case(family, **BOTH), LAYERS[1]
    query = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(0))
    for r in (0, 1):
        kept = case.kept_of(r) if case.asks[r].end else NOT_KEPT
        stored = Stored(case.arena[:, :, layer], case.batch.block_table[r], case.asks[r].computed, kept)
        expected = ReferenceAttention(case.layout, case.spec).attention_sums(query, stored, power, reduce)
        there = stored._replace(
            cells=case.arena.to(DEVICE)[:, :, layer], block_table_row=stored.block_table_row.to(DEVICE)
        )
        found = kernels_of(case).attention_sums(query.to(DEVICE), there, power, reduce)
        torch.testing.assert_close(found.cpu(), expected, **CLOSE)


@pytest.mark.parametrize("power", [1, 2])
def test_what_decode_rows_add_matches_the_reference(power: int) -> None:
    case, layer = kept_case("kivi-2", exact=True, **BOTH), LAYERS[0]
    asked = [0, 1, 3]
    found = case.received(kernels_of(case), layer, power, asked, batch_on(DEVICE, case.batch))
    expected = case.received(ReferenceAttention(case.layout, case.spec), layer, power, asked)
    for r in asked:
        torch.testing.assert_close(found[r], expected[r], **CLOSE)


def test_sinks_on_another_device_than_the_cells_are_refused_by_name() -> None:
    case = kept_case("kivi-2", sinks=True)
    attention = TritonAttention(case.layout, case.spec.on(torch.device("meta")))
    with pytest.raises(ValueError, match="sink_logits is on meta, but cells on"):
        attention.store_sealed(case.arena.to(DEVICE)[:, :, 0], batch_on(DEVICE, case.batch), torch.empty(0))
