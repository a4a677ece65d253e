"""What a cut stores under a retention: rows that stand for several tokens, through one cut and the next."""

from __future__ import annotations

import pytest
import torch

from kvserve.accounting.plan import RowStep
from kvserve.attention.base import Stored
from kvserve.attention.native import NativeAttention
from kvserve.eviction.collector import Collector
from kvserve.eviction.evictor import StepEvictor
from kvserve.eviction.observer import EvictionObserver, Selection
from kvserve.pages.kept import Kept, KeptRows
from kvserve.policies.base import Eviction, Policy
from tests.cases.attention_cases import copy_cells, make_policy
from tests.eviction.test_step_evictor import PROMPT, plain_choice, prompt_case

CODE = 0.06  # half a step of 8-bit codes, twice written, and more
MERGE = {"name": "merge", "threshold": 0.3}


def retaining(retention: object, scorer: object = "key-norm", **options: object) -> Policy:
    eviction = Eviction(scorer=scorer, budget="uniform", retention=retention, rate=2, **options)
    return make_policy("int8").model_copy(update={"eviction": eviction})


class Heard(EvictionObserver):
    def __init__(self) -> None:
        self.selections: list[Selection] = []

    def selected(self, request_id: str, layer: int, selection: Selection) -> None:
        self.selections.append(selection)


def cut(policy: Policy, cells: torch.Tensor, case, step: RowStep, collector: Collector | None = None) -> Selection:
    heard = Heard()
    evictor = StepEvictor(policy.eviction, {0: step}, case.batch, 1, heard, collector)
    kernels = NativeAttention(case.layout, case.spec)
    evictor.before_layer(kernels, cells)
    evictor.after_layer(kernels, cells, case.query)
    (selection,) = heard.selections
    return selection


def test_a_compensation_row_is_the_mean_of_all_that_goes_and_weighs_as_much() -> None:
    policy = retaining("compensate")
    case, _, kept = prompt_case(policy)
    kernels, row, sinks = NativeAttention(case.layout, case.spec), case.batch.block_table[0], policy.sink_tokens
    keys, values = kernels.read(Stored(case.cells, row, PROMPT), sinks, 256)
    chosen = plain_choice(case, policy)
    cells = copy_cells(case.cells)
    cut(policy, cells, case, RowStep("a", Kept(), kept))
    found = kernels.read_kept(cells, int(row[0]), kept)
    for h in (0, 1):
        lowest = max(chosen[h].tolist(), key=lambda t: float(keys[h, t].norm()))
        singles = [t for t in chosen[h].tolist() if t != lowest]
        gone = [t for t in range(256 - sinks) if t not in singles]
        assert found.log_mass[h][0] == torch.tensor(float(len(gone))).log() and not found.log_mass[h][1:].any()
        for rows, stored in ((keys[h], found.keys[h]), (values[h], found.values[h])):
            assert (stored - torch.cat([rows[gone].mean(0, keepdim=True), rows[singles]])).abs().max() < CODE


@pytest.mark.parametrize("retention", ["compensate", MERGE, "evict"], ids=str)
def test_a_second_cut_goes_on_with_the_rows_and_log_masses_of_the_first(retention: object) -> None:
    """Rows of the second cut are what the retention makes of the first one's pages and of what came later."""
    policy = retaining(retention)
    case, _, first = prompt_case(policy)
    kernels, row, sinks = NativeAttention(case.layout, case.spec), case.batch.block_table[0], policy.sink_tokens
    state, cells = int(row[0]), copy_cells(case.cells)
    earlier, second = Kept(192, first.blocks[:1]), Kept(256, first.blocks[1:])
    stored = kernels.read(Stored(cells, row, PROMPT), sinks, 192)
    mass = None if retention == "evict" else [torch.arange(60.0) / 30] * 2
    rows = KeptRows(*([head[::3][:60] for head in part] for part in stored), mass)
    kernels.write_kept(cells, state, earlier, [0, 1], rows)
    held, later = kernels.read_kept(cells, state, earlier), kernels.read(Stored(cells, row, PROMPT), 192, 256)
    selection = cut(policy, cells, case, RowStep("a", earlier, second))
    found = kernels.read_kept(cells, state, second)
    for h in (0, 1):
        keys, values = (torch.cat([old[h], new[h]]) for old, new in zip(held[:2], later, strict=True))
        weights = torch.cat([torch.zeros(60) if mass is None else mass[h], torch.zeros(64)]).exp()
        assert len(selection.scores[h]) == 124 and (selection.first, selection.ends[h]) == (sinks, sinks + 124)
        best = (-keys.norm(dim=-1)).topk(64).indices.sort().values
        assert torch.equal(selection.chosen[h], best)
        if retention == "compensate":
            assert (found.log_mass[h] > 0).sum() == 1, "one row stands for all, those of the first cut among them"
            assert float(found.log_mass[h].exp().sum()) == pytest.approx(float(weights.sum()), rel=1e-5)
        elif retention == "evict":
            assert found.log_mass is None and torch.equal(selection.sources[h], best)
        else:
            assert torch.equal(selection.sources[h], best)
            assert (found.log_mass[h].exp() >= weights[best] - 1e-4).all()
            assert weights[best].sum() < found.log_mass[h].exp().sum() <= weights.sum() + 1e-3
        singles = [i for i, source in enumerate(selection.sources[h]) if mass is None or not found.log_mass[h][i]]
        for rows, packed in ((keys, found.keys[h]), (values, found.values[h])):
            assert (packed[singles] - rows[selection.sources[h][singles]]).abs().max() < CODE


def test_what_was_collected_stands_in_the_order_of_the_rows() -> None:
    policy = retaining("compensate", "accumulated-attention", schedule={"name": "every-n", "interval": 64})
    case, _, kept = prompt_case(policy)
    collector, cells, sinks = Collector(policy.eviction.scorer), copy_cells(case.cells), policy.sink_tokens
    selection = cut(policy, cells, case, RowStep("a", Kept(), kept, None, True), collector)
    sums, count = collector.of("a", 1).accumulated, 128 + sinks + PROMPT - 256
    for h, scores in enumerate(selection.scores):
        of_rows, received = scores[selection.sources[h]], sums[h, sinks:][: len(selection.sources[h])]
        finite = of_rows.isfinite()  # the newest have no sums for scores
        assert finite.any() and torch.equal(received[finite], of_rows[finite])
        assert not sums[h, count:].any()
