"""Choosing what is kept where the scores are: the CPU's choice, and the device is not waited for head by head."""

from __future__ import annotations

import warnings

import pytest
import torch

from kvserve.budgets.base import Budget, Choice
from kvserve.budgets.global_pages import GlobalPages
from kvserve.budgets.heads_in_layer import HeadsInLayer
from kvserve.budgets.pyramid import Pyramid
from kvserve.budgets.uniform import Uniform
from tests.cases.second_device import SecondDevice, back, moved

# With the reads of what heads hold, of the tokens of layers that share them, and of what heads won.
READS = [(Uniform(), 1), (Pyramid(), 1), (HeadsInLayer(), 3), (GlobalPages(), 2), (GlobalPages(metric="mean"), 2)]


def ragged_scores() -> torch.Tensor:
    """Scores with ties; one head holds fewer tokens."""
    scores = torch.randint(0, 999, (6, 4, 1500), generator=torch.Generator().manual_seed(0)).float()
    scores[3, 1, 900:] = -torch.inf
    return scores


def choose(budget: Budget, scores: torch.Tensor) -> Choice:
    return budget.choose(scores, 64, 6 * 4 * 9)


def assert_same(found: Choice, expected: Choice) -> None:
    assert torch.equal(found.pages, expected.pages) and torch.equal(found.counts, expected.counts)
    for mine, theirs in zip(found.tokens, expected.tokens, strict=True):
        assert all(torch.equal(*heads) for heads in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(("budget", "reads"), READS, ids=repr)
def test_a_choice_on_another_device_reads_a_few_numbers_back_and_is_the_same(budget: Budget, reads: int):
    with SecondDevice() as device:
        found = choose(budget, moved(ragged_scores()))
    assert len(device.waits) == reads
    assert_same(found._replace(tokens=back(found.tokens)), choose(budget, ragged_scores()))


@pytest.mark.gpu
@pytest.mark.parametrize(("budget", "reads"), READS, ids=repr)
def test_a_choice_on_a_gpu_reads_a_few_numbers_back_and_is_the_same(budget: Budget, reads: int):
    scores = ragged_scores().cuda()
    choose(budget, scores)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            found = choose(budget, scores)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([wait for wait in waits if "synchroniz" in str(wait.message)]) <= reads
    assert_same(
        found._replace(tokens=[[t.cpu() for t in heads] for heads in found.tokens]), choose(budget, ragged_scores())
    )
