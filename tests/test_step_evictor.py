"""What the evictor reads of a prompt to score it."""

from __future__ import annotations

import pytest
import torch
from attention_cases import build_case, make_policy

from kvserve.attention.eviction import PromptEviction, StepEvictor
from kvserve.attention.reference import ReferenceAttention
from kvserve.pages.plan import plan_eviction
from kvserve.policies.base import Eviction
from kvserve.schedules.base import Limit
from kvserve.scorers.base import LayerView, Scorer


class Watched(ReferenceAttention):
    """Notes whether values were asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.asked: list[bool] = []

    def read(self, *args, with_values: bool = True, **kwargs):
        self.asked.append(with_values)
        return super().read(*args, with_values=with_values, **kwargs)


class ValueNorm(Scorer):
    needs = frozenset({"values"})
    query_agnostic = True
    name: str = "value-norm"

    def _score(self, view: LayerView) -> torch.Tensor:
        assert view.values is not None
        return view.values.norm(dim=-1)


@pytest.mark.parametrize(("scorer", "needs_values"), [("key-norm", False), ("key-diff", False), (ValueNorm(), True)])
def test_values_are_read_for_scorers_that_need_them_only(scorer: object, needs_values: bool):
    case = build_case(make_policy("dense-pages"), computed=[200], new_tokens=[1], num_kv_heads=1)
    plan = plan_eviction(case.layout, Limit(2.0), 200, window=1)
    assert plan is not None
    attention = Watched(case.layout, case.spec)
    evictor = StepEvictor(
        Eviction(scorer=scorer, budget="uniform", rate=2), [PromptEviction(0, "a", plan)], num_layers=2
    )
    evictor.after_layer(attention, case.cells, case.query, case.batch)  # of two layers: scores, and evicts nothing yet
    assert attention.asked == [needs_values]
    (scores,) = evictor.layers[1].scores
    assert scores.shape == (1, 188), "the tokens of the whole tiles, without the sinks"
    if needs_values:
        assert torch.equal(scores[0], case.past_value[0][4:192, 0].norm(dim=-1))
