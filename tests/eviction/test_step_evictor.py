"""Cutting a request in the worker: which tokens each KV head keeps, what is read for it, and what is remembered."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from kvserve.accounting.plan import EvictionPlan, RowStep, policy_plan
from kvserve.attention.base import Answers, Batch, LayerSpec, NewRows, Stored
from kvserve.attention.native import NativeAttention
from kvserve.attention.reference import ReferenceAttention
from kvserve.budgets.base import held_counts, select
from kvserve.eviction.collector import Collected, Collector
from kvserve.eviction.evictor import StepEvictor
from kvserve.pages.kept import Kept, KeptRows, KeptTable
from kvserve.policies.base import Eviction, Policy
from kvserve.scorers.base import Accumulation, LayerView, Scorer
from kvserve.scorers.query_window import PlainWindow
from kvserve.scorers.registry import make_scorer
from kvserve.scorers.rotary import Rotary
from tests.cases.attention_cases import Case, build_case, copy_cells, make_batch, make_policy
from tests.cases.second_device import KernelsThere, SecondDevice, moved

PROMPT, NEW = 260, 128
SCORERS = {
    "window": {"name": "window-attention", "window": 8, "exponent": 2},
    "whole-prompt": {"name": "window-attention", "window": 300, "reduce": "max", "keep_window": False},
    "key-diff": {"name": "key-diff"},
}

SCORER_NAMES = [
    *("accumulated-attention", "expected-attention", "key-diff", "key-norm", "position", "random"),
    *("window-attention",),
]


def evicting(scorer: dict) -> Policy:
    eviction = Eviction(scorer=scorer, budget="uniform", rate=2)
    return make_policy("int8").model_copy(update={"eviction": eviction})


def prompt_case(policy: Policy) -> tuple[Case, EvictionPlan, Kept]:
    """A prompt of which every row has been stored, its plan, and the kept blocks of its cut."""
    case = build_case(policy, computed=[PROMPT], new_tokens=[PROMPT])
    plan = policy_plan(case.layout, PROMPT)
    row = case.batch.block_table[0, : case.layout.blocks_for(PROMPT)]
    unused = sorted(set(range(len(case.cells))) - set(row.tolist()))
    assert plan.last_cut(PROMPT)[:3] == (PROMPT, 256, 2)
    case.batch = make_batch(case.layout, [0], [PROMPT], row[None].contiguous())
    return case, plan, Kept(256, tuple(unused[:2]))


def plain_choice(case: Case, policy: Policy) -> list[torch.Tensor]:
    """The 128 candidates that each of the two heads keeps, by the scorer on plain tensors."""
    row, count = case.batch.block_table[0], policy.eviction.window
    keys, values = ReferenceAttention(case.layout, case.spec).read(Stored(case.cells, row, PROMPT), 0, PROMPT)
    positions, queries = torch.arange(PROMPT), case.query[-count:].transpose(0, 1)
    view = LayerView(
        kv_heads=2, positions=positions, scale=case.spec.scale, keys=keys, values=values, layer=1, request_id="a",
        query_window=PlainWindow(queries, keys, positions, case.spec.scale),
    )  # fmt: skip
    scores = policy.eviction.scorer.score(view)[:, case.layout.policy.sink_tokens : 256]
    return select(scores, torch.tensor([128, 128]), held_counts(scores))


def evict(case: Case, policy: Policy, cells: torch.Tensor, step: RowStep, spec: LayerSpec | None = None) -> None:
    StepEvictor(policy.eviction, {0: step}, case.batch, 1).after_layer(
        NativeAttention(case.layout, spec or case.spec), cells, case.query
    )


@pytest.mark.parametrize("scorer", SCORERS.values(), ids=list(SCORERS))
def test_each_head_keeps_what_the_scorer_chooses_on_plain_tensors(scorer: dict):
    policy = evicting(scorer)
    case, _, kept = prompt_case(policy)
    row, chosen = case.batch.block_table[0], plain_choice(case, policy)
    expected, cells = copy_cells(case.cells), copy_cells(case.cells)
    kernels = NativeAttention(case.layout, case.spec)
    keys, values = kernels.read(Stored(cells, row, PROMPT), policy.sink_tokens, 256)
    rows = [[part[index] for part, index in zip(of, chosen, strict=True)] for of in (keys, values)]
    kernels.write_kept(expected, int(row[0]), kept, [0, 2], KeptRows(*rows))
    evict(case, policy, cells, RowStep("a", Kept(), kept))
    assert torch.equal(cells, expected) and not torch.equal(cells, case.cells)


@pytest.mark.parametrize(("scorer", "reads"), [("window-attention", 0), ("random", 0), ("key-norm", 1)])
def test_keys_are_read_for_scorers_that_need_them_and_no_others(scorer: str, reads: int, monkeypatch):
    policy = evicting({"name": scorer})
    case, _, kept = prompt_case(policy)
    spans, read = [], NativeAttention.read
    monkeypatch.setattr(
        NativeAttention, "read", lambda self, *args, **more: spans.append(args[1:3]) or read(self, *args, **more)
    )
    evict(case, policy, copy_cells(case.cells), RowStep("a", Kept(), kept))
    assert spans == [(0, PROMPT)] * reads + [(0, PROMPT)], "the last one packs"


@pytest.mark.parametrize("scorer", ["key-norm", "key-diff"])
def test_a_second_cut_chooses_among_what_the_first_one_kept_and_what_came_later(scorer: str):
    policy = evicting({"name": scorer})
    case, _, first = prompt_case(policy)
    kernels, cells, row = NativeAttention(case.layout, case.spec), copy_cells(case.cells), case.batch.block_table[0]
    sinks = policy.sink_tokens
    stored = Stored(cells, row, PROMPT)
    before, later = kernels.read(stored, 0, 192), kernels.read(stored, 192, PROMPT)
    state, earlier = int(row[0]), Kept(192, first.blocks[:1])
    survivors = [torch.arange(sinks, 192)[h::3][:60] for h in (0, 1)]
    packed = KeptRows(*([rows[h][survivors[h]] for h in (0, 1)] for rows in before))
    kernels.write_kept(cells, state, earlier, [0, 1], packed)
    held = kernels.read_kept(cells, state, earlier)
    evict(case, policy, cells, RowStep("a", earlier, Kept(256, first.blocks[1:])))
    keys, values, *_ = kernels.read_kept(cells, state, Kept(256, first.blocks[1:]))
    for h in (0, 1):
        pool = [torch.cat([before[i][h][:sinks], held[i][h], later[i][h]]) for i in (0, 1)]
        norms = pool[0].norm(dim=-1)
        unit = pool[0] / norms[:, None]
        scores = -norms if scorer == "key-norm" else -torch.cosine_similarity(unit, unit.mean(0, keepdim=True), dim=-1)
        best = sinks + scores[sinks : sinks + 60 + 64].topk(64).indices.sort().values
        assert (keys[h] - pool[0][best]).abs().max() < 0.05, "8-bit codes of the same tokens"
        assert (values[h] - pool[1][best]).abs().max() < 0.05


@pytest.mark.parametrize("cut_before", [False, True], ids=["first-cut", "second-cut"])
def test_a_ranks_heads_are_scored_by_their_place_in_the_whole_model(cut_before: bool, monkeypatch):
    """`random` depends on nothing but names: equal names would give the heads of all ranks the same tokens."""
    policy = evicting({"name": "random"})
    case, _, first = prompt_case(policy)
    seen: list[tuple[int, int]] = []
    score = Scorer.score
    monkeypatch.setattr(
        Scorer, "score", lambda self, view: seen.append((view.first_head, view.kv_heads)) or score(self, view)
    )
    chosen = []
    for rank in (0, 1):
        cells = copy_cells(case.cells)
        step = RowStep("a", Kept(), first)
        if cut_before:
            kernels, row = NativeAttention(case.layout, case.spec), case.batch.block_table[0]
            earlier, sinks = Kept(192, first.blocks[:1]), policy.sink_tokens
            stored = kernels.read(Stored(cells, row, PROMPT), sinks, sinks + 64)
            kernels.write_kept(cells, int(row[0]), earlier, [0, 1], KeptRows(*map(list, stored)))
            step = RowStep("a", earlier, Kept(256, first.blocks[1:]))
        evict(case, policy, cells, step, replace(case.spec, first_head=2 * rank))
        chosen.append(
            NativeAttention(case.layout, case.spec).read_kept(cells, int(case.batch.block_table[0, 0]), step.cut)
        )
    assert seen == ([(0, 1), (1, 1), (2, 1), (3, 1)] if cut_before else [(0, 2), (2, 2)])
    assert not torch.equal(chosen[0][0][0], chosen[1][0][0])


def test_queries_of_earlier_steps_are_remembered():
    """A cut while generating is the one that all its window's queries in one step would have made."""
    eviction = Eviction(scorer=SCORERS["window"], budget="uniform", schedule="every-n", rate=2)
    policy = make_policy("int8").model_copy(update={"eviction": eviction})
    case = build_case(policy, computed=[PROMPT], new_tokens=[PROMPT])
    assert case.layout.remembered_queries == 8 and case.layout.query_group == case.spec.group
    row = case.batch.block_table[0]
    case.batch = make_batch(case.layout, [0], [PROMPT], row[None].contiguous())
    unused = sorted(set(range(len(case.cells))) - set(row[: case.layout.blocks_for(PROMPT)].tolist()))
    kept, kernels = Kept(256, tuple(unused[:2])), NativeAttention(case.layout, case.spec)
    at_once, one_by_one = copy_cells(case.cells), copy_cells(case.cells)
    evict(case, policy, at_once, RowStep("a", Kept(), kept, PROMPT - 8))
    for length in range(PROMPT - 7, PROMPT + 1):
        batch = make_batch(case.layout, [length - 1], [1], case.batch.block_table)
        step = RowStep("a", Kept(), kept if length == PROMPT else None, PROMPT - 8)
        StepEvictor(eviction, {0: step}, batch, 1).after_layer(kernels, one_by_one, case.query[length - 1 : length])
    for cells in (at_once, one_by_one):
        assert not torch.equal(cells, case.cells)
    assert torch.equal(at_once, one_by_one)


def test_a_table_gives_each_request_its_own_blocks():
    assert KeptTable.of([Kept(), Kept(128, (3, 1))]).of_request(1) == Kept(128, (3, 1))
    assert KeptTable.of([Kept(), Kept(128, (3, 1))]).of_request(0) == Kept()


def collect(case: Case, scorer: Scorer, chunks: list[int]) -> Collected:
    """What is collected of a prompt that is computed in `chunks`."""
    rotary = Rotary(1.0 / 10000 ** (torch.arange(0, 64, 2) / 64))
    collector, done = Collector(scorer, rotary), 0
    for chunk in chunks:
        batch = make_batch(case.layout, [done], [chunk], case.batch.block_table)
        rows, done = case.query[done : done + chunk], done + chunk
        evictor = StepEvictor(evicting({"name": scorer.name}).eviction, {0: COLLECTING}, batch, 1, collector=collector)
        kernels = NativeAttention(case.layout, case.spec)
        evictor.before_layer(kernels, case.cells)
        evictor.after_layer(kernels, case.cells, rows)
    return collector.requests["a"][1]


COLLECTING = RowStep("a", Kept(), None, None, collects=True)


def test_attention_is_accumulated_over_chunks_as_over_the_whole_prompt():
    check_accumulated(make_scorer({"name": "accumulated-attention"}), power=1)


class Squares(Scorer):
    """A scorer of another package, which says what is to be summed up for it."""

    needs: ClassVar[frozenset[str]] = frozenset({"accumulated"})
    query_agnostic: ClassVar[bool] = False
    name: str = "random"
    accumulation: ClassVar[Accumulation] = Accumulation(power=2)

    def _score(self, view: LayerView) -> torch.Tensor:
        return view.accumulated


def test_what_is_accumulated_is_what_a_scorer_declares():
    check_accumulated(Squares(), power=2)
    assert Squares().collects and make_scorer({"name": "accumulated-attention", "exponent": 2}).accumulation.power == 2
    assert make_scorer({"name": "key-norm"}).accumulation is None


def check_accumulated(scorer: Scorer, power: int) -> None:
    case, _, _ = prompt_case(evicting({"name": scorer.name}))
    keys, _ = ReferenceAttention(case.layout, case.spec).read(
        Stored(case.cells, case.batch.block_table[0], PROMPT), 0, PROMPT
    )
    plain = PlainWindow(case.query.transpose(0, 1), keys, torch.arange(PROMPT), case.spec.scale)
    expected = (plain.probabilities(PROMPT) ** power).sum(1).unflatten(0, (2, -1)).sum(1)
    for chunks in ([PROMPT], [64, 128, 68]):  # the case's tiles are sealed: chunks that end with one see the same keys
        found = collect(case, scorer, chunks)
        torch.testing.assert_close(found.accumulated[:, :PROMPT], expected, rtol=2e-4, atol=2e-4)


def test_query_statistics_over_chunks_are_those_of_all_queries_behind_the_sinks():
    scorer = make_scorer({"name": "expected-attention"})
    case, _, _ = prompt_case(evicting({"name": scorer.name}))
    for chunks in ([PROMPT], [3, 100, 157]):
        found = collect(case, scorer, chunks).query_statistics
        turned = found.rotary.rotate(case.query[4:].transpose(0, 1), -torch.arange(4, PROMPT))
        assert found.count == PROMPT - 4
        torch.testing.assert_close(found.mean, turned.mean(1), rtol=1e-4, atol=1e-4)
        covariance = torch.stack([head.T.cov(correction=0) for head in turned])
        torch.testing.assert_close(found.covariance, covariance, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scorer", ["accumulated-attention", "expected-attention"])
def test_nothing_is_left_of_a_request_that_was_cut(scorer: str):
    policy = evicting({"name": scorer})
    case, _, kept = prompt_case(policy)
    collector = Collector(policy.eviction.scorer, Rotary(torch.ones(32)))
    cells, step = copy_cells(case.cells), RowStep("a", Kept(), kept, None, collects=True)
    evictor = StepEvictor(policy.eviction, {0: step}, case.batch, 1, collector=collector)
    kernels = NativeAttention(case.layout, case.spec)
    evictor.before_layer(kernels, cells)
    evictor.after_layer(kernels, cells, case.query)
    assert not torch.equal(cells, case.cells) and not collector.requests


def heaviest(sums: torch.Tensor, first: int, end: int, recent: int, count: int) -> torch.Tensor:
    """Columns [first, end) of one head that H2O keeps: the `recent` newest of all, and those with the largest sums."""
    scores = sums.clone()
    scores[len(sums) - recent :] = torch.inf
    return first + scores[first:end].topk(count).indices.sort().values


def test_attention_received_while_generating_counts_at_the_next_cut():
    """H2O over two cuts: each head's sums go on for what it kept, and queries see nothing that was evicted."""
    eviction = Eviction(
        scorer="accumulated-attention", budget="uniform", schedule={"name": "every-n", "interval": NEW}, rate=2
    )
    policy = make_policy("dense-pages").model_copy(update={"eviction": eviction})
    case = build_case(policy, computed=[0], new_tokens=[PROMPT + NEW])
    row, sinks, heads = case.batch.block_table[0], policy.sink_tokens, case.spec.num_kv_heads
    used = row[: case.layout.blocks_for(PROMPT + NEW)].tolist()
    first = Kept(256, tuple(sorted(set(range(len(case.cells))) - set(used))[:2]))
    second = Kept(384, tuple(used[case.layout.tile_row(i)] for i in (0, 1, 2)))  # what the first cut gave back
    kernels, collector = NativeAttention(case.layout, case.spec), Collector(eviction.scorer)

    def step(computed: int, new: int, kept: Kept, cut: Kept | None) -> None:
        rows = slice(computed, computed + new)
        batch = make_batch(case.layout, [computed], [new], case.batch.block_table)
        batch.kept = KeptTable.of([kept]) if kept.end else None
        evictor = StepEvictor(eviction, {0: RowStep("a", kept, cut, None, True)}, batch, 1, collector=collector)
        received = evictor.before_layer(kernels, case.cells)
        query, output = case.query[rows], torch.empty_like(case.query[rows])
        kernels.forward(NewRows(query, case.key[rows], case.value[rows]), case.cells, batch, Answers(output), received)
        evictor.after_layer(kernels, case.cells, query)

    def pay(sums: torch.Tensor, head: int, tokens: torch.Tensor, queries: range) -> None:
        for position in queries:
            seen = tokens[tokens <= position]
            group = case.query[position].unflatten(0, (heads, -1))[head]
            sums[: len(seen)] += (group @ case.key[seen, head].T * case.spec.scale).softmax(-1).sum(0)

    step(0, PROMPT, Kept(), first)
    for computed in range(PROMPT, PROMPT + NEW):
        step(computed, 1, first, second if computed == PROMPT + NEW - 1 else None)
    keys = kernels.read_kept(case.cells, int(row[0]), second).keys
    for head in range(heads):
        tokens, sums = torch.arange(PROMPT), torch.zeros(PROMPT)
        pay(sums, head, tokens, range(PROMPT))
        chosen = heaviest(sums, sinks, 256, int(0.5 * (128 + sinks + 4)), 128)
        columns = torch.cat([torch.arange(sinks), chosen, torch.arange(256, PROMPT)])
        tokens = torch.cat([tokens[columns], torch.arange(PROMPT, PROMPT + NEW)])
        sums = torch.cat([sums[columns], torch.zeros(NEW)])
        pay(sums, head, tokens, range(PROMPT, PROMPT + NEW))
        chosen = heaviest(sums, sinks, len(tokens) - 4, int(0.5 * (192 + sinks + 4)), 192)
        torch.testing.assert_close(keys[head], case.key[tokens[chosen], head])


def test_requests_that_end_before_their_cut_are_forgotten():
    collector = Collector(make_scorer({"name": "accumulated-attention"}), None)
    collector.requests = {"a": {}, "b": {}}
    collector.drop({"a", "c"})
    assert collector.requests.keys() == {"b"}


ELSEWHERE = [
    *(("uniform", scorer, False) for scorer in SCORER_NAMES),
    *(("uniform", scorer, True) for scorer in SCORER_NAMES if not make_scorer({"name": scorer}).collects),
    *((budget, "window-attention", True) for budget in ("global-pages", "heads-in-layer", "pyramid")),
]


@pytest.mark.parametrize(("budget", "scorer", "again"), ELSEWHERE)
def test_on_another_device_the_same_tokens_stay(budget: str, scorer: str, again: bool):
    """No scorer, budget or bookkeeping mixes devices, and kernels get tensors of theirs only."""
    schedule = "every-n" if again else "end-of-prefill"
    eviction = Eviction(scorer={"name": scorer}, budget=budget, schedule=schedule, rate=2)
    case, _, kept = prompt_case(make_policy("int8").model_copy(update={"eviction": eviction}))
    kernels, row, cells = NativeAttention(case.layout, case.spec), case.batch.block_table[0], copy_cells(case.cells)
    earlier, kept = (Kept(192, kept.blocks[:1]), Kept(256, kept.blocks[1:])) if again else (Kept(), kept)
    expected = copy_cells(case.cells)
    for arena in (cells, expected) if again else ():
        rows = kernels.read(Stored(arena, row, PROMPT), 4, 192)
        survivors = [[part[h][h::3][:60] for h in (0, 1)] for part in rows]
        kernels.write_kept(arena, int(row[0]), earlier, [0, 1], KeptRows(*survivors))
    window_start = PROMPT - eviction.window if eviction.remembers_queries else None
    step = RowStep("a", earlier, kept, window_start, eviction.scorer.collects)
    rotary = Rotary(1.0 / 10000 ** (torch.arange(0, 64, 2) / 64))
    here = Collector(eviction.scorer, rotary)
    evictor = StepEvictor(eviction, {0: step}, case.batch, 1, collector=here)
    evictor.before_layer(kernels, expected)
    evictor.after_layer(kernels, expected, case.query)
    with SecondDevice():
        tables = moved((case.batch.query_start_loc, case.batch.seq_lens, case.batch.block_table))
        there = Collector(eviction.scorer, Rotary(moved(rotary.inverse_frequencies)))
        evictor = StepEvictor(eviction, {0: step}, Batch(*tables), 1, collector=there)
        arguments = (KernelsThere(kernels), moved(cells))
        evictor.before_layer(*arguments)
        evictor.after_layer(*arguments, moved(case.query))
    assert torch.equal(cells, expected) and not torch.equal(cells, case.cells)


def test_tensors_of_two_devices_do_not_meet():
    with SecondDevice(), pytest.raises(RuntimeError, match="two devices"):
        moved(torch.ones(3)) + torch.arange(3)
