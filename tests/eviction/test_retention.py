"""What becomes of the tokens that a cut does not choose, against sums over the tokens themselves."""

from __future__ import annotations

import math

import pytest
import torch

from kvserve.retention.base import HeldTokens, Rows
from kvserve.retention.compensate import Compensate
from kvserve.retention.demote import Demote
from kvserve.retention.evict import Evict
from kvserve.retention.merge import Merge
from kvserve.retention.registry import RETENTIONS

HEAD_DIM = 8


def held_tokens(count: int, seed: int = 0) -> HeldTokens:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, count, HEAD_DIM, generator=generator)
    return HeldTokens(keys, values, torch.rand(count, generator=generator), torch.zeros(count))


def answer(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, log_mass: torch.Tensor) -> torch.Tensor:
    """Attention in float64, term by term."""
    weights = [math.exp(float(query.double() @ k.double()) + float(m)) for k, m in zip(keys, log_mass, strict=True)]
    total = sum(w * v.double() for w, v in zip(weights, values, strict=True))
    return total / sum(weights)


def masses(rows: Rows) -> torch.Tensor:
    return torch.zeros(len(rows.keys)) if rows.log_mass is None else rows.log_mass


EVICTING = sorted(RETENTIONS.keys() - {"demote"})
TWO_BITS = {"bits": 2, "group_size": 32}


@pytest.mark.parametrize("name", EVICTING)
def test_as_many_rows_are_kept_as_tokens_were_chosen(name: str) -> None:
    held, retention = held_tokens(40), RETENTIONS.make({"name": name})
    assert retention.formats == ()
    for count in (0, 1, 2, 39, 40):
        rows = retention.keep(held, held.scores.topk(count).indices.sort().values)
        assert [len(part) for part in (rows.keys, rows.values, masses(rows), rows.sources)] == [count] * 4


@pytest.mark.parametrize("count", [0, 1, 39, 40])
def test_demoting_keeps_every_token_the_chosen_ones_first(count: int) -> None:
    held, demote = held_tokens(40), Demote(key=TWO_BITS, value=TWO_BITS)
    chosen = held.scores.topk(count).indices.sort().values
    rows = demote.keep(held, chosen)
    rest = [token for token in range(40) if token not in chosen.tolist()]
    assert rows.sources.tolist() == [*chosen.tolist(), *rest] and rows.runs == (count, 40 - count)
    assert torch.equal(rows.keys, held.keys[rows.sources]) and torch.equal(rows.values, held.values[rows.sources])
    assert demote.formats == ((demote.key, demote.value),) and not masses(rows).any()


@pytest.mark.parametrize("name", EVICTING)
def test_where_everything_is_chosen_nothing_changes(name: str) -> None:
    held = held_tokens(40)
    rows = RETENTIONS.make({"name": name}).keep(held, torch.arange(40))
    assert torch.equal(rows.keys, held.keys) and torch.equal(rows.values, held.values)
    assert not masses(rows).any() and torch.equal(rows.sources, torch.arange(40))


def test_evicting_keeps_the_chosen_tokens() -> None:
    held, chosen = held_tokens(10), torch.tensor([1, 4, 9])
    rows = Evict().keep(held, chosen)
    assert torch.equal(rows.keys, held.keys[chosen]) and torch.equal(rows.values, held.values[chosen])
    assert rows.log_mass is None


def test_the_compensation_row_weighs_as_much_as_all_tokens_that_went() -> None:
    held = held_tokens(30)
    chosen = held.scores.topk(11).indices.sort().values
    lowest = chosen[held.scores[chosen].argmin()]
    gone = [t for t in range(30) if t not in chosen.tolist() or t == int(lowest)]
    rows = Compensate().keep(held, chosen)
    assert rows.log_mass is not None and float(rows.log_mass[0].exp()) == pytest.approx(len(gone))
    assert torch.allclose(rows.keys[0], held.keys[gone].mean(0), atol=1e-6)
    assert torch.allclose(rows.values[0], held.values[gone].mean(0), atol=1e-6)
    assert rows.sources[1:].tolist() == [t for t in chosen.tolist() if t != int(lowest)]


def test_tokens_with_equal_keys_are_compensated_exactly() -> None:
    held = held_tokens(30)
    held.keys[10:] = held.keys[10]
    chosen = torch.arange(11)
    rows = Compensate().keep(held._replace(scores=torch.arange(30, 0, -1).float()), chosen)
    query = torch.randn(HEAD_DIM, generator=torch.Generator().manual_seed(3))
    expected = answer(query, held.keys, held.values, held.log_mass)
    assert torch.allclose(answer(query, rows.keys, rows.values, masses(rows)), expected, atol=1e-5)


def test_a_second_cut_counts_the_tokens_of_the_first_one() -> None:
    held = held_tokens(30)
    first = Compensate().keep(held, held.scores.topk(20).indices.sort().values)
    scores = torch.cat([torch.tensor([9.0]), torch.arange(19.0)])
    again = HeldTokens(first.keys, first.values, scores, masses(first))
    second = Compensate().keep(again, scores.topk(5).indices.sort().values)
    assert float(masses(second).exp().sum()) == pytest.approx(30)
    assert (masses(second) != 0).sum() == 1
    singles = set(first.sources[second.sources[1:]].tolist())
    gone = [t for t in range(30) if t not in singles]
    assert torch.allclose(second.values[0], held.values[gone].mean(0), atol=1e-5)


def test_merging_averages_each_token_into_the_row_most_like_it() -> None:
    held = held_tokens(12)
    held.keys[6], held.keys[7] = 2 * held.keys[1], held.keys[4]
    held.keys[8] = -held.keys[1]
    kept = torch.tensor([0, 1, 4, 6, 7, 8])
    held = HeldTokens(held.keys[kept], held.values[kept], held.scores[kept], held.log_mass[kept])
    chosen = torch.tensor([1, 2])
    rows = Merge(threshold=0.999).keep(held, chosen)
    assert torch.allclose(rows.keys[0], (held.keys[1] + held.keys[3]) / 2)
    assert torch.allclose(rows.values[1], (held.values[2] + held.values[4]) / 2)
    assert masses(rows).exp().tolist() == pytest.approx([2, 2])


def test_tokens_like_no_row_are_gone() -> None:
    held = held_tokens(12)
    chosen = torch.tensor([0, 3])
    rows = Merge(threshold=1).keep(held, chosen)
    assert torch.allclose(rows.keys, held.keys[chosen]) and not masses(rows).any()
