"""The Triton kernels on the rows of test_chunks_and_company.py: interpreted on a small shape."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from kvserve.attention.base import Answers, Batch, NewRows
from kvserve.attention.triton import TritonAttention
from tests.cases.triton_cases import DEVICE, batch_on, cells_on
from tests.kernels.test_chunks_and_company import EXACT, Rows, distance

slow = pytest.mark.slow


class TritonThere(TritonAttention):
    """Takes the CPU's tensors to the kernels' device, and the results back."""

    def forward(self, rows, cells, batch: Batch, answers, received=None) -> None:
        there, found = cells_on(DEVICE, cells), Answers(answers.output.to(DEVICE))
        super().forward(NewRows(*(tensor.to(DEVICE) for tensor in rows)), there, batch_on(DEVICE, batch), found)
        answers.output.copy_(found.output)
        cells.copy_(cells_on(torch.device("cpu"), there))


@pytest.mark.parametrize(
    "family", ["boosted", *(pytest.param(f, marks=slow) for f in ("int8", "kivi-2", "dense-pages"))]
)
def test_triton_kernels_leave_the_same_pages_and_answers(family: str):
    """How a GPU splits the tokens among programs depends on the batch, and so does the order of its sums."""
    rows, sizes = Rows(family, 140), [1, 62, 1, 71, 5]
    whole, alone, together = (rows.serve(TritonThere, *how) for how in (([140],), (sizes,), (sizes, 2)))
    for served in (alone, together):
        assert torch.equal(served.pages, whole.pages)
        assert distance(served.answers, whole.answers) < EXACT
