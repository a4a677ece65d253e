"""Steps that speculate: their last tokens may be rejected, and the next step begins as if they had never been.

The oracle is the same request without drafts: whatever was rejected, wherever the borders of tiles are, true rows leave
the same pages and get the same answers.
"""

from __future__ import annotations

import pytest
import torch

from kvserve.attention.base import Answers, NewRows, PagedAttention, Stored
from kvserve.attention.native import NativeAttention, available_isas
from kvserve.attention.reference import ReferenceAttention
from kvserve.pages.layout import PageLayout
from kvserve.policies.loading import load_policy, policy_from_config
from tests.cases.attention_cases import make_batch, make_policy, make_table, poisoned_cells
from tests.kernels.test_chunks_and_company import INTEGERS, Make, Rows, distance
from tests.kernels.test_triton_chunks import TritonThere

FAMILIES = ["int8", "kivi-2", "boosted", "dense-pages", "dense"]
DRAFTS = (1, 3, 8)


class Speculated(Rows):
    """One request whose decode steps bring drafts behind the true token."""

    def __init__(self, family: str, tokens: int, draft_tokens: int) -> None:
        super().__init__(family, tokens)
        self.layout, self.drafts = self.layout.with_drafts(draft_tokens), draft_tokens

    def speculate(self, attention: PagedAttention, prompt: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Serve a prompt, then steps of a true token and drafts of which the first few are true.

        Returns:
            The request's tile and sink blocks, and the answers to true rows.
        """
        generator, total = torch.Generator().manual_seed(seed), len(self.query)
        table, blocks = make_table(self.layout, [total + self.drafts], self.generator)
        cells, answers = poisoned_cells(self.layout, blocks, 2), torch.full_like(self.query, torch.nan)
        self._step(attention, cells, table, (0, prompt, prompt), answers)
        done = prompt
        while done < total:
            accepted = min(int(torch.randint(self.drafts + 1, (), generator=generator)), total - done - 1)
            self._step(attention, cells, table, (done, 1 + accepted, 1 + self.drafts), answers)
            done += 1 + accepted
        row = table[0, self.layout.tail_blocks : self.layout.blocks_for(total)].long()
        return cells[row], answers

    def _step(
        self, attention: PagedAttention, cells: torch.Tensor, table: torch.Tensor, rows: tuple[int, int, int],
        answers: torch.Tensor,
    ) -> None:  # fmt: skip
        """Behind `computed` tokens, `new` rows of which the first `true` ones are the request's."""
        computed, true, new = rows
        own, rest = slice(computed, computed + true), new - true
        given = (self.query, self.key, self.value)
        parts = [torch.cat([part[own], 9 * self.random(rest, part.shape[1])]) for part in given]
        output = torch.full_like(parts[0], torch.nan)
        attention.forward(NewRows(*parts), cells, make_batch(self.layout, [computed], [new], table), Answers(output))
        answers[own] = output[:true]


def check(family: str, drafts: int, make: Make, prompt: int, total: int) -> None:
    plain = Rows(family, total)
    expected = plain.serve(make, [prompt, *[1] * (total - prompt)])
    speculated = Speculated(family, total, drafts)
    for part in ("query", "key", "value"):
        setattr(speculated, part, getattr(plain, part))
    pages, answers = speculated.speculate(make(speculated.layout, speculated.spec), prompt)
    whole = len(pages) if plain.layout.has_pages else total // plain.layout.block_size  # dense drafts stay behind it
    assert torch.equal(pages[:whole], expected.pages[:whole])
    assert answers.isfinite().all()
    assert distance(answers, expected.answers) < INTEGERS


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("drafts", DRAFTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_kernels_leave_the_pages_and_answers_of_a_request_without_drafts(family: str, drafts: int, isa: str):
    check(family, drafts, lambda layout, spec: NativeAttention(layout, spec, isa), 50, 200)


@pytest.mark.parametrize("drafts", DRAFTS)
@pytest.mark.parametrize("family", ["kivi-2", "dense"])
def test_the_reference_does_so_too(family: str, drafts: int):
    check(family, drafts, ReferenceAttention, 58, 140)


@pytest.mark.parametrize("drafts", [3])
@pytest.mark.parametrize("family", ["boosted", pytest.param("dense-pages", marks=pytest.mark.slow)])
def test_triton_kernels_do_so_too(family: str, drafts: int):
    check(family, drafts, TritonThere, 60, 72)


def test_what_is_read_after_a_rejection_are_the_true_rows():
    """A tile that drafts completed is unfinished again: its rows come from the tail, as they were staged."""
    rows = Speculated("kivi-2", 63, 3)
    attention = NativeAttention(rows.layout, rows.spec)
    table, blocks = make_table(rows.layout, [66], rows.generator)
    cells, answers = poisoned_cells(rows.layout, blocks, 2), torch.zeros_like(rows.query)
    rows._step(attention, cells, table, (0, 62, 62), answers)
    rows._step(attention, cells, table, (62, 1, 4), answers)  # completes the tile with drafts
    key, value = attention.read(Stored(cells, table[0], 63), 0, 63)
    torch.testing.assert_close(key.transpose(0, 1), rows.key, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(value.transpose(0, 1), rows.value, rtol=2e-3, atol=4e-3)


def test_a_tail_has_a_slot_for_each_token_that_a_step_may_have_to_take_back():
    layout = PageLayout.build(make_policy("kivi-2", sink_tokens=4), 64, 64, torch.bfloat16)
    for drafts in range(70):
        own = layout.with_drafts(drafts)
        assert own.tail_blocks * own.slots_per_cell >= own.tail_slots
        for computed in range(130):
            seq_len = computed + 1 + drafts
            held = range(own.first_tail_token(seq_len), seq_len)
            assert len({token % own.tail_slots for token in held}) == len(held)
            assert all(own.first_tail_token(seq_len) <= left // 64 * 64 for left in range(computed + 1, seq_len + 1))


def test_layers_of_their_own_share_the_longer_tail():
    mixed = PageLayout.build(
        policy_from_config({"policy": "kivi-2bit", "set": {"layers": {0: "int8"}}}),
        64,
        64,
        torch.bfloat16,
        num_layers=4,
    )
    longer = mixed.with_drafts(60)
    assert longer.tail_blocks > mixed.tail_blocks
    assert {layer.tail_blocks for layer in longer.each_layer(4)} == {longer.tail_blocks}


def test_the_dense_policy_needs_no_tail():
    layout = PageLayout.build(load_policy("none"), 64, 16, torch.bfloat16)
    assert layout.with_drafts(5) == layout and layout.tail_blocks == 0
