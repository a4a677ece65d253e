"""Evicting a prompt in the worker: which tokens each KV head keeps, and what is read to find out."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case, build_case, copy_cells, make_policy

from kvserve.attention.eviction import PromptEviction, StepEvictor
from kvserve.attention.native import NativeAttention
from kvserve.attention.reference import ReferenceAttention
from kvserve.budgets.base import select
from kvserve.pages.kept import Kept
from kvserve.pages.plan import EvictionPlan, policy_plan
from kvserve.policies.base import Eviction, Policy
from kvserve.scorers.base import LayerView
from kvserve.scorers.query_window import PlainWindow

PROMPT = 260


def evicting(scorer: dict) -> Policy:
    eviction = Eviction(scorer=scorer, budget="uniform", rate=2)
    return make_policy("int8").model_copy(update={"eviction": eviction})


def prompt_case(policy: Policy) -> tuple[Case, EvictionPlan, torch.Tensor]:
    """A prompt of which every row has been stored, its plan, and its row with the kept blocks."""
    case = build_case(policy, computed=[PROMPT], new_tokens=[PROMPT])
    plan = policy_plan(case.layout, PROMPT, policy.eviction.window)
    row = case.batch.block_table[0, : plan.kept_row]
    unused = sorted(set(range(len(case.cells))) - set(row.tolist()))
    assert plan.end == 256 and plan.kept_blocks == 2 == len(unused[:2])
    return case, plan, torch.cat([row, torch.tensor(unused[:2], dtype=torch.int32)])


def plain_choice(case: Case, policy: Policy, plan: EvictionPlan, row: torch.Tensor) -> list[torch.Tensor]:
    """The 128 candidates that each of the two heads keeps, by the scorer on plain tensors."""
    keys, values = ReferenceAttention(case.layout, case.spec).read(case.cells, row, 0, PROMPT)
    positions, queries = torch.arange(PROMPT), case.query[-plan.window :].transpose(0, 1)
    view = LayerView(
        kv_heads=2, positions=positions, scale=case.spec.scale, keys=keys, values=values, layer=1, request_id="a",
        query_window=PlainWindow(queries, keys, positions, case.spec.scale),
    )  # fmt: skip
    scores = policy.eviction.scorer.score(view)[:, case.layout.policy.sink_tokens : plan.end]
    return select(scores, torch.tensor([128, 128]))


@pytest.mark.parametrize(
    "scorer",
    [
        {"name": "window-attention", "window": 8, "exponent": 2},
        {"name": "window-attention", "window": 300, "reduce": "max", "keep_window": False},
        {"name": "key-diff"},
    ],
    ids=["window", "whole-prompt", "key-diff"],
)
def test_each_head_keeps_what_the_scorer_chooses_on_plain_tensors(scorer: dict):
    policy = evicting(scorer)
    case, plan, row = prompt_case(policy)
    chosen = plain_choice(case, policy, plan, row)
    expected, cells = copy_cells(case.cells), copy_cells(case.cells)
    kernels = NativeAttention(case.layout, case.spec)
    keys, values = kernels.read(cells, row, policy.sink_tokens, plan.end, PROMPT)
    rows = [[part[index] for part, index in zip(of, chosen, strict=True)] for of in (keys, values)]
    kernels.write_kept(expected, row, Kept(plan.end, plan.kept_row, plan.kept_blocks), [0, 2], *rows)
    case.batch.block_table = row[None]
    evictor = StepEvictor(policy.eviction, [PromptEviction(0, "a", plan)], num_layers=1)
    evictor.after_layer(kernels, cells, case.query, case.batch)
    assert torch.equal(cells, expected) and not torch.equal(cells, case.cells)


@pytest.mark.parametrize(("scorer", "reads"), [("window-attention", 0), ("random", 0), ("key-norm", 1)])
def test_keys_are_read_for_scorers_that_need_them_and_no_others(scorer: str, reads: int, monkeypatch):
    policy = evicting({"name": scorer})
    case, plan, row = prompt_case(policy)
    kernels, spans = NativeAttention(case.layout, case.spec), []
    read = kernels.read
    monkeypatch.setattr(kernels, "read", lambda *args, **more: spans.append(args[2:4]) or read(*args, **more))
    case.batch.block_table = row[None]
    evictor = StepEvictor(policy.eviction, [PromptEviction(0, "a", plan)], num_layers=1)
    evictor.after_layer(kernels, copy_cells(case.cells), case.query, case.batch)
    packing = (policy.sink_tokens, plan.end)
    assert spans == [(0, PROMPT)] * reads + [packing]
