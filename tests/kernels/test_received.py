"""Attention added up by the kernels that attend to decode rows: against the sums of stored keys, and in total."""

from __future__ import annotations

import pytest
import torch

from kvserve.attention.base import Answers, NewRows, PagedAttention, Received
from kvserve.attention.native import NativeAttention, available_isas
from kvserve.attention.reference import ReferenceAttention
from tests.cases.attention_cases import make_policy
from tests.cases.kept_cases import LAYERS, SPARE, Ask, build_kept_case

FAMILIES = ["int8", "kivi-4", "kivi-2", "boosted", "dense-pages"]
# Evicted or whole, a few rows or one, a new token that completes a tile, heads that keep nothing, several chunks.
ASKS = [
    Ask(128, 200, 1, (70, 3, 0, 124)),
    Ask(0, 70, 1),
    Ask(64, 71, 5, (60, 17, 1, 40)),
    Ask(64, 127, 1, (0, 9, 60, 33)),
    Ask(0, 2200, 1),
    Ask(0, 0, 1),
]


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("power", "group", "sinks"), [(1, 3, 4), (2, 5, 0), (2, 1, 63)])
def test_decode_rows_add_what_their_tokens_receive(family, power, group, sinks, isa):
    """Keys that the codec represents exactly: they are the same before and after their tile is full."""
    case = build_kept_case(make_policy(family, 64, sinks), ASKS, group=group, exact=True)
    asked = [0, 1, 3, 4, 5]
    for layer in LAYERS:
        native = case.received(NativeAttention(case.layout, case.spec, isa), layer, power, asked)
        expected = case.received(ReferenceAttention(case.layout, case.spec), layer, power, asked)
        for r in asked:
            torch.testing.assert_close(native[r], expected[r], rtol=1e-3, atol=2e-5)
            assert (native[r][:, -SPARE:] == 1).all()


def test_the_probabilities_of_a_kv_heads_queries_sum_to_their_number():
    case = build_kept_case(make_policy("kivi-2"), ASKS)
    sums = case.received(NativeAttention(case.layout, case.spec), 0, 1, [0, 1, 3, 4])
    for table in sums.values():
        torch.testing.assert_close((table - 1).sum(1), torch.full((2,), float(case.spec.group)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kernels", [NativeAttention, ReferenceAttention])
def test_sums_that_kernels_cannot_add_to_are_refused(kernels: type[PagedAttention]):
    case = build_kept_case(make_policy("kivi-2"), ASKS)
    attention, query = kernels(case.layout, case.spec), torch.cat(case.query[0])
    rows = [case.new_rows(rows) for rows in (case.key[0], case.value[0])]
    for table in (torch.zeros(3, 300), torch.zeros(2, 300).double(), torch.zeros(300, 2).T):
        with pytest.raises(ValueError, match=r"received.sums must be contiguous float32 \[2, columns\]"):
            received = Received(1, {0: table})
            attention.forward(
                NewRows(query, *rows), case.arena[:, :, 0], case.batch, Answers(torch.empty_like(query)), received
            )
