"""A request's pages and answers, whatever chunks its rows come in and whoever shares its steps.

A query sees what its position says (csrc/kvserve.h), so given rows must leave the same bytes and get the same answers
from every way to serve them. Steps of one row are answered by another kernel, which rounds queries and weights to
integers of 16 bits: only their answers may differ, by what that rounding leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from kvserve.attention.base import Answers, LayerSpec, NewRows, PagedAttention
from kvserve.attention.native import NativeAttention, available_isas
from kvserve.attention.reference import ReferenceAttention
from kvserve.pages.layout import PageLayout
from tests.cases.attention_cases import make_batch, make_policy, make_table, poisoned_cells

FAMILIES = ["int8", "kivi-4", "kivi-2", "boosted", "dense-pages", "dense"]
DENSE = {"dense-pages", "dense"}
CHUNKS = {
    "512": [512, 248],
    "64": [64] * 11 + [56],
    "odd": [1, 62, 1, 1, 70, 15, 333, 1, 1, 128, 147],
}
LONG_CHUNKS = {"2048": [2048, 52], "1024": [1024, 1024, 52], "odd": [1, 333, 1, 777, 1, 985, 2]}
SHORT_CHUNKS = {"64": [64, 64, 12], "odd": [1, 62, 1, 1, 70, 5]}
# Distances of answers: of another order of float32 sums; of queries and weights in integers of 16 bits.
EXACT, INTEGERS, OF_DTYPE = 2e-6, 2e-4, {torch.bfloat16: 4e-3}
LONGEST = 150  # of the company's requests

Make = Callable[[PageLayout, LayerSpec], PagedAttention]


@dataclass
class Served:
    """What serving one request left: its tile and sink blocks, and the answers to its rows."""

    pages: torch.Tensor
    answers: torch.Tensor


class Rows:
    """One request's query, key and value rows; keys have an offset and a spread per channel, as real ones do."""

    def __init__(self, family: str, tokens: int, head_dim: int = 64, dtype: torch.dtype = torch.float32) -> None:
        policy = make_policy(family, sink_tokens=8)
        self.layout = PageLayout.build(policy, head_dim, 64 if policy.has_pages else 16, dtype)
        self.spec = LayerSpec(6, 2, head_dim**-0.5)
        self.generator = torch.Generator().manual_seed(0)
        self.query, self.value = self.random(tokens, 6).to(dtype), self.random(tokens, 2).to(dtype)
        spread, offset = 0.2 + self.random(1, 2).abs(), 4 * self.random(1, 2)
        self.key = (self.random(tokens, 2) * spread + offset).to(dtype)

    def random(self, tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, self.layout.head_dim, generator=self.generator)

    def serve(self, make: Make, sizes: list[int], company: int = 0) -> Served:
        """In chunks of these sizes, in the middle of others: two of three decode, one brings some of its prompt."""
        layout, total = self.layout, sum(sizes)
        assert total == len(self.query)
        attention, answers, before = make(layout, self.spec), torch.full_like(self.query, torch.nan), company // 2
        table, blocks = make_table(
            layout, [LONGEST] * before + [total] + [LONGEST] * (company - before), self.generator
        )
        cells, done, stored = poisoned_cells(layout, blocks, 2), 0, [0] * company
        for step, size in enumerate(sizes):
            bring = [1 if (i + step) % 3 else 1 + (13 * i + 7 * step) % 20 for i in range(company)]
            stored = [0 if s + n > LONGEST else s for s, n in zip(stored, bring, strict=True)]
            others = [self.random(sum(bring), heads).to(self.query.dtype) for heads in (6, 2, 2)]
            first, own = sum(bring[:before]), slice(done, done + size)
            rows = [
                torch.cat([theirs[:first], mine[own], theirs[first:]])
                for theirs, mine in zip(others, (self.query, self.key, self.value), strict=True)
            ]
            computed = [*stored[:before], done, *stored[before:]]
            new = [*bring[:before], size, *bring[before:]]
            output = torch.full_like(rows[0], torch.nan)
            attention.forward(NewRows(*rows), cells, make_batch(layout, computed, new, table), Answers(output))
            answers[own], done = output[first : first + size], done + size
            stored = [s + n for s, n in zip(stored, bring, strict=True)]
        row = table[before, layout.tail_blocks : layout.blocks_for(total)].long()
        return Served(cells[row], answers)


def one_row_chunks(sizes: list[int]) -> torch.Tensor:
    """Which rows come alone, bool [tokens]."""
    return torch.tensor([size == 1 for size in sizes for _ in range(size)])


def distance(answers: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the rows' answers together, over their size."""
    return float((answers.float() - expected.float()).norm() / expected.float().norm())


def check(rows: Rows, make: Make, chunks: dict[str, list[int]], company: int, rounding: float) -> None:
    """Bit-equal pages everywhere, bit-equal answers to rows that do not come alone, `rounding` between the others."""
    whole = rows.serve(make, [len(rows.query)])
    assert whole.answers.isfinite().all()
    for sizes in chunks.values():
        alone, together = rows.serve(make, sizes), rows.serve(make, sizes, company)
        assert torch.equal(alone.pages, whole.pages) and torch.equal(together.pages, whole.pages)
        assert torch.equal(alone.answers, together.answers)
        single = one_row_chunks(sizes)
        assert torch.equal(alone.answers[~single], whole.answers[~single])
        assert not single.any() or distance(alone.answers[single], whole.answers[single]) < rounding


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_kernels_leave_the_same_pages_and_answers(family: str, isa: str):
    check(
        Rows(family, 760),
        lambda *shape: NativeAttention(*shape, isa),
        CHUNKS,
        15,
        EXACT if family in DENSE else INTEGERS,
    )


@pytest.mark.parametrize("family", ["kivi-2", "dense"])
def test_compiled_kernels_do_so_for_chunks_of_2048_tokens(family: str):
    check(Rows(family, 2100), NativeAttention, LONG_CHUNKS, 15, EXACT if family in DENSE else INTEGERS)


def test_compiled_kernels_do_so_for_bfloat16_models_with_heads_of_96():
    rows = Rows("boosted", 760, 96, torch.bfloat16)
    check(rows, NativeAttention, {"odd": CHUNKS["odd"]}, 15, OF_DTYPE[torch.bfloat16])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_leaves_the_same_pages_and_answers(family: str):
    check(Rows(family, 140), ReferenceAttention, SHORT_CHUNKS, 3, EXACT)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - DENSE))
def test_a_token_gets_the_answer_of_its_prompt_within_the_rounding_of_one_row(family: str):
    """As when a preempted request computes its text again in one chunk."""
    rows = Rows(family, 200)
    whole, single = rows.serve(NativeAttention, [200]), rows.serve(NativeAttention, [1] * 200)
    assert torch.equal(single.pages, whole.pages)
    assert distance(single.answers, whole.answers) < INTEGERS
