"""razor against an independent reading of RazorAttention (arXiv 2407.15891, section 3), in float64."""

from __future__ import annotations

import math

import pytest
import torch

from kvserve.accounting.plan import RowStep, policy_plan
from kvserve.attention.base import Answers, NewRows, PagedAttention
from kvserve.attention.native import NativeAttention
from kvserve.attention.reference import ReferenceAttention
from kvserve.eviction.evictor import StepEvictor
from kvserve.pages.kept import Kept, KeptTable
from kvserve.policies.loading import load_policy
from tests.cases.attention_cases import Case, build_case, copy_cells, make_batch

PROMPT, END, SINKS, KV_HEADS, GROUP, WHOLE = 644, 640, 4, 8, 2, 5
CODES = 0.03  # what 8-bit codes change in an answer at most


def razor_case() -> tuple[Case, Kept]:
    """A stored prompt of one layer, a new token behind it, and where its cut lies; of eight KV heads one is whole."""
    flags = torch.zeros(1, KV_HEADS, dtype=torch.int8)
    flags[0, WHOLE] = 1
    policy = load_policy("razor").with_head_tables({"heads.whole": flags})
    case = build_case(policy, computed=[PROMPT], new_tokens=[PROMPT], num_kv_heads=KV_HEADS, group=GROUP)
    row = case.batch.block_table[0, : case.layout.blocks_for(PROMPT + 1)]
    unused = sorted(set(range(len(case.cells))) - set(row.tolist()))
    _, end, blocks, _ = policy_plan(case.layout, PROMPT).last_cut(PROMPT)
    assert end == END
    case.batch = make_batch(case.layout, [0], [PROMPT], row[None].contiguous())
    return case, Kept(END, tuple(unused[:blocks]))


def answer(case: Case, kept: Kept, attention: PagedAttention, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Of a token behind the prompt, once that was cut, [heads, head_dim]."""
    cells, policy = copy_cells(case.cells), case.layout.policy
    StepEvictor(policy.eviction, {0: RowStep("a", Kept(), kept)}, case.batch, 1).after_layer(
        attention, cells, case.query
    )
    batch = make_batch(case.layout, [PROMPT], [1], case.batch.block_table)
    batch.kept = KeptTable.of([kept])
    query = case.query[:1]
    output = torch.empty_like(query)
    attention.forward(NewRows(query, key, value), cells, batch, Answers(output))
    return output[0]


def razor_answer(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: int, mass: bool) -> torch.Tensor:
    """A head that keeps `rows` rows of the tokens between the sinks and END: the newest, and one for all the others.

    num / den with num = sum exp(q k) v + N exp(q mean k) mean v; not `mass`: as if N were 1.
    """
    num, den = torch.zeros(len(query)), 0.0
    gone = range(SINKS, END - (rows - 1)) if rows < END - SINKS else range(0)
    for t in range(len(keys)):
        if t not in gone:
            weight = math.exp(float(query @ keys[t]) * 0.125)
            num, den = num + weight * values[t], den + weight
    if gone:
        mean_key, mean_value = (part[gone.start : gone.stop].mean(0) for part in (keys, values))
        weight = (len(gone) if mass else 1) * math.exp(float(query @ mean_key) * 0.125)
        num, den = num + weight * mean_value, den + weight
    return num / den


@pytest.mark.parametrize("kernels", [ReferenceAttention, NativeAttention])
def test_retrieval_heads_see_everything_and_the_others_a_mean_of_what_is_gone(kernels: type[PagedAttention]) -> None:
    case, kept = razor_case()
    key, value = (rows[PROMPT - 1 :] for rows in (case.key, case.value))  # of the new token
    found = answer(case, kept, kernels(case.layout, case.spec), key, value).double()
    keys, values = (
        torch.cat([past[0], new]).double() for past, new in ((case.past_key, key), (case.past_value, value))
    )
    pages, whole = len(kept.blocks) * KV_HEADS, -(-(END - SINKS) // 64)
    share, more = divmod(pages - whole, KV_HEADS - 1)
    others = [head for head in range(KV_HEADS) if head != WHOLE]
    bare = []
    for head in range(KV_HEADS):
        rows = END - SINKS if head == WHOLE else 64 * (share + (others.index(head) < more))
        for index in range(head * GROUP, head * GROUP + GROUP):
            asked = (case.query[0, index].double(), keys[:, head], values[:, head], rows)
            assert (found[index] - razor_answer(*asked, mass=True)).abs().max() <= CODES
            if head != WHOLE:
                bare.append(float((found[index] - razor_answer(*asked, mass=False)).abs().max()))
    assert share < whole / 3 and min(bare) > CODES


def test_a_fifth_is_what_the_other_heads_keep() -> None:
    """Of a long prompt, with 15 % of the heads whole."""
    policy, heads = load_policy("razor"), 100
    flags = (torch.arange(heads) < 15)[None].to(torch.int8)
    budget = policy.with_head_tables({"heads.whole": flags}).eviction.budget
    scores, tokens = torch.zeros(1, heads, 64 * 150), 64 * 150
    pages = budget.allocate(scores, 64, int(heads * 150 / policy.eviction.rate), 1)[0]
    assert (pages[:15] == 150).all()
    assert float(pages[15:].double().mean()) * 64 / tokens == pytest.approx(0.2, abs=0.03)
