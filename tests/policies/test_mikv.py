"""mikv against an independent reading of MiKV (arXiv 2402.18096, section 3), in float64 and without an engine.

The oracle sees the rows of a prompt and of a few generated tokens. It codes tiles of 64 tokens to 8 bits, sums the
attention that every token receives in the prompt, keeps 8 bits of the newest and of the most attended to, codes the
others to 2 bits, and attends to all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import NamedTuple

import pytest
import torch

from kvserve.accounting.plan import RowStep, policy_plan
from kvserve.attention.base import Answers, LayerSpec, NewRows, PagedAttention
from kvserve.attention.native import NativeAttention
from kvserve.attention.reference import ReferenceAttention
from kvserve.errors import PolicyError
from kvserve.eviction.collector import Collector
from kvserve.eviction.evictor import StepEvictor
from kvserve.eviction.observer import EvictionObserver, Selection
from kvserve.pages.kept import NOT_KEPT, Kept, KeptTable
from kvserve.pages.layout import PageLayout
from kvserve.policies.base import Policy
from kvserve.policies.loading import load_policy, policy_content, policy_from_config
from tests.accounting.test_eviction_manager import EvictingSimulation
from tests.cases.attention_cases import POISON, make_batch

LAYERS, HEADS, GROUP, DIM, TILE = 2, 2, 2, 64, 64
PROMPT, TOTAL = 564, 570
SCALE = DIM**-0.5
TOLERANCE = 2e-3


class Rows(NamedTuple):
    """Of one layer: query [tokens, heads * group, DIM], key and value [tokens, heads, DIM]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def layer_rows(layer: int, prefix: int = 0) -> Rows:
    """Rows whose channels differ in offset and spread, and of which some tokens attract every query.

    Args:
        prefix: tokens that are the same in every request; the others are those of another request if it is not 0.
    """
    parts = []
    for seed, count in ((layer, prefix or TOTAL), (layer + 50, TOTAL - (prefix or TOTAL))):
        generator = torch.Generator().manual_seed(seed)
        key = torch.randn(count, HEADS, DIM, generator=generator)
        query, value = (torch.randn(count, n * HEADS, DIM, generator=generator) for n in (GROUP, 1))
        sinks = torch.randperm(count, generator=generator)[: count // 10]
        key[sinks] += 0.5
        parts.append((query + 0.5, key, value))
    query, key, value = (torch.cat(part) for part in zip(*parts, strict=True))
    channels = torch.Generator().manual_seed(layer + 100)
    return Rows(query, key * (0.3 + torch.rand(HEADS, DIM, generator=channels)), value)


def coded(rows: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """Groups of `size` along dim 0 to the nearest of 2**bits equidistant levels from the least to the largest."""
    groups = rows.split(size)
    return torch.cat([_coded_group(group, bits) for group in groups])


def _coded_group(x: torch.Tensor, bits: int) -> torch.Tensor:
    low, high = x.min(0).values, x.max(0).values
    scale = ((high - low) / (2**bits - 1)).clamp_min(2.0**-20).half().double()
    low = low.half().double()
    return ((x - low) / scale).round().clamp(0, 2**bits - 1) * scale + low


def coded_tiles(key: torch.Tensor, value: torch.Tensor, bits: int, key_group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys per channel and `key_group` tokens, values per token; the last tile is filled with its last token."""
    count, keys = len(key), []
    for tile in key.split(TILE):
        filled = torch.cat([tile, tile[-1:].repeat(TILE - len(tile), 1)])
        keys.append(coded(filled, bits, key_group))
    return torch.cat([*keys, key[:0]])[:count], coded(value.T, bits, DIM).T


@dataclass
class Oracle:
    """What one KV head of one layer must hold and answer."""

    key: torch.Tensor  # float64 [TOTAL, DIM], as float16 slots keep it
    value: torch.Tensor
    query: torch.Tensor  # [TOTAL, GROUP, DIM]
    chunks: list[int] = field(default_factory=lambda: [PROMPT])

    def __post_init__(self) -> None:
        self.end = PROMPT // TILE * TILE
        self.sealed = coded_tiles(self.key[: self.end], self.value[: self.end], 8, 64)
        chosen = self.chosen()
        rest = [t for t in range(self.end) if t not in set(chosen)]
        keys, values = self.sealed
        high = coded_tiles(keys[chosen], values[chosen], 8, 64)
        low = coded_tiles(keys[rest], values[rest], 2, 32)
        self.kept_key, self.kept_value = (torch.cat(both) for both in zip(high, low, strict=True))
        self.important = chosen

    def stored_keys(self, length: int) -> torch.Tensor:
        """The keys of so many tokens: whole tiles are coded."""
        sealed = length // TILE * TILE
        return torch.cat([self.sealed[0][:sealed], self.key[sealed:length]])

    def chosen(self) -> list[int]:
        """A fifth of the prompt less what stays dense, in whole tiles: half of all that is kept is the newest."""
        sums, done = torch.zeros(PROMPT, dtype=torch.float64), 0
        for chunk in self.chunks:
            length = done + chunk
            scores = self.query[done:length].flatten(0, 1) @ self.stored_keys(length).T * SCALE
            positions = torch.arange(done, length).repeat_interleave(GROUP)[:, None]
            sums[:length] += scores.masked_fill(torch.arange(length) > positions, -torch.inf).softmax(-1).sum(0)
            done = length
        count = ceil((ceil(PROMPT / 5) - (PROMPT - self.end)) / TILE) * TILE
        newest = (count + PROMPT - self.end) // 2
        sums[PROMPT - newest :] = torch.inf
        return sorted(sums[: self.end].topk(count).indices.tolist())

    def answer(self, position: int) -> torch.Tensor:
        """Of a generated token's query, [GROUP, DIM]; all tokens behind the kept ones are dense still."""
        keys = torch.cat([self.kept_key, self.key[self.end : position + 1]])
        values = torch.cat([self.kept_value, self.value[self.end : position + 1]])
        return (self.query[position] @ keys.T * SCALE).softmax(-1) @ values


class Heard(EvictionObserver):
    def __init__(self) -> None:
        self.selections: dict[int, Selection] = {}
        self.counts: list[torch.Tensor] = []

    def selected(self, request_id: str, layer: int, selection: Selection) -> None:
        self.selections[layer] = selection

    def evicted(self, request_id, num_tokens, evicted, kept, demoted) -> None:
        self.counts += [evicted, kept, demoted]


class Worker:
    """A few layers of one arena, and the requests that go through them."""

    def __init__(self, kernels: type[PagedAttention], policy: Policy | None = None) -> None:
        self.policy = policy or load_policy("mikv")
        self.layout = PageLayout.build(self.policy, DIM, TILE, torch.float32, num_layers=LAYERS)
        self.attention = kernels(self.layout, LayerSpec(HEADS * GROUP, HEADS, SCALE))
        self.arena = torch.full((80, HEADS, LAYERS, self.layout.cell_bytes), POISON, dtype=torch.uint8)
        self.free = torch.randperm(80, generator=torch.Generator().manual_seed(1)).tolist()
        self.heard, self.collector = Heard(), Collector(self.policy.eviction.scorer)
        self.rows = [layer_rows(layer) for layer in range(LAYERS)]

    def take(self, count: int) -> list[int]:
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def run(self, chunks: list[int], shared: list[int] = (), name: str = "a") -> list[torch.Tensor]:
        """The outputs of all layers for the generated tokens, [layers, heads * group, DIM] each.

        Args:
            shared: tile blocks that a request before this one has stored.
        """
        plan, count = policy_plan(self.layout, PROMPT, TOTAL), self.layout.blocks_for(TOTAL)
        self.row = self.take(self.layout.private_blocks) + list(shared)
        self.row += self.take(count - len(self.row))
        computed, kept, outputs = TILE * len(shared), NOT_KEPT, []
        for chunk in [*chunks, *[1] * (TOTAL - PROMPT)]:
            cut = plan.next_cut(computed)
            assert plan.clip_step(computed, chunk) == chunk
            step = RowStep(name, kept, collects=cut is not None and self.policy.eviction.scorer.collects)
            if cut and cut.point == computed + chunk:
                blocks = Kept(cut.end, tuple(self.take(cut.kept_blocks)))
                step = RowStep(name, kept, blocks, plan.window_start(cut), step.collects, cut.chosen_pages)
            outputs.append(self._step(step, computed, chunk))
            computed += chunk
            if step.cut:
                kept = step.cut
                self.arena[self.row[self.layout.tile_row(0) : self.layout.tile_row(PROMPT // TILE)]] = POISON
        return outputs[len(chunks) :]

    def _step(self, step: RowStep, computed: int, count: int) -> torch.Tensor:
        batch = make_batch(self.layout, [computed], [count], torch.tensor([self.row], dtype=torch.int32))
        batch.kept = KeptTable.of([step.kept]) if step.kept.end else None
        evictor = StepEvictor(self.policy.eviction, {0: step}, batch, LAYERS, self.heard, self.collector)
        outputs = []
        for layer, rows in enumerate(self.rows):
            cells, new = self.arena[:, :, layer], slice(computed, computed + count)
            received = evictor.before_layer(self.attention, cells)
            output = torch.full_like(rows.query[new], torch.nan)
            self.attention.forward(NewRows(*(part[new] for part in rows)), cells, batch, Answers(output), received)
            evictor.after_layer(self.attention, cells, rows.query[new])
            outputs.append(output[-1])
        return torch.stack(outputs)


def oracles(chunks: list[int]) -> list[list[Oracle]]:
    """[layer][kv_head]"""
    made = []
    for layer in range(LAYERS):
        rows = layer_rows(layer)
        key, value = (part.half().double() for part in (rows.key, rows.value))
        query = rows.query.double().unflatten(1, (HEADS, GROUP))
        made.append([Oracle(key[:, h], value[:, h], query[:, h], chunks) for h in range(HEADS)])
    return made


@pytest.mark.parametrize("chunks", [[564], [150, 150, 150, 114], [64, 1, 300, 198, 1]], ids=str)
@pytest.mark.parametrize("kernels", [ReferenceAttention, NativeAttention])
def test_the_most_attended_and_the_newest_keep_8_bits_and_all_others_2(kernels, chunks: list[int]) -> None:
    worker, expected = Worker(kernels), oracles(chunks)
    outputs = worker.run(chunks)
    for layer, heads in enumerate(expected):
        for head, oracle in enumerate(heads):
            assert worker.heard.selections[layer].chosen[head].tolist() == oracle.important
            assert len(oracle.important) == 64 and oracle.important[-6:] == list(range(506, 512))
            for step, output in enumerate(outputs):
                found = output[layer, head * GROUP : (head + 1) * GROUP]
                assert (found - oracle.answer(PROMPT + step)).abs().max() < TOLERANCE


def test_two_bits_answer_otherwise_than_eight() -> None:
    """What the tolerance above must tell apart: all tokens in 8 bits, and those that are not chosen evicted."""
    (oracle, _), (other, _) = oracles([PROMPT])
    for each in (oracle, other):
        found, evicted = each.answer(PROMPT), len(each.important)
        each.kept_key, each.kept_value = each.kept_key[:evicted], each.kept_value[:evicted]
        assert (each.answer(PROMPT) - found).abs().max() > 10 * TOLERANCE
        each.kept_key, each.kept_value = each.sealed
        assert (each.answer(PROMPT) - found).abs().max() > 10 * TOLERANCE


def test_nothing_is_evicted_and_what_is_demoted_is_counted() -> None:
    worker = Worker(NativeAttention)
    worker.run([PROMPT])
    evicted, kept, demoted = worker.heard.counts
    assert not evicted.any() and (kept == PROMPT).all() and (demoted == 512 - 64).all()


def test_kept_blocks_replace_more_tile_blocks_than_they_are() -> None:
    layout = PageLayout.build(load_policy("mikv"), DIM, TILE, torch.float32, num_layers=LAYERS)
    cut = policy_plan(layout, PROMPT, TOTAL).last_cut(PROMPT)
    # A tile of 8 bits and, three a page, seven of 2 bits for every head of both layers; two pages fill a strip.
    assert (cut.end // TILE, cut.kept_blocks, cut.chosen_pages) == (8, 4, 1)


@pytest.mark.parametrize("seed", range(3))
def test_free_and_held_blocks_add_up(seed: int) -> None:
    layout = PageLayout.build(load_policy("mikv"), DIM, TILE, torch.float32, num_layers=LAYERS)
    simulation = EvictingSimulation(layout, 100, seed)
    simulation.run(30)
    assert simulation.num_cuts > 0


def test_a_prefix_that_another_request_has_stored_changes_no_bit() -> None:
    """With a scorer of the last queries, which needs no others: mikv's own computes every prompt whole."""
    assert load_policy("mikv").eviction.scorer.collects
    worker = Worker(NativeAttention, load_policy("mikv", ["eviction.scorer=window-attention"]))
    alone = Worker(NativeAttention, worker.policy)
    for each in (worker, alone):
        each.rows = [layer_rows(layer, prefix=192) for layer in range(LAYERS)]
    expected = alone.run([192, 372])
    first = Worker(NativeAttention, worker.policy)
    first.rows, first.arena, first.free = [layer_rows(layer) for layer in range(LAYERS)], worker.arena, worker.free
    for layer, rows in enumerate(first.rows):  # the same first 192 tokens, then others
        for part, own in zip(rows, worker.rows[layer], strict=True):
            part[:192] = own[:192]
    first.row = first.take(first.layout.blocks_for(192))
    first._step(RowStep("first", NOT_KEPT), 0, 192)
    worker.free = first.free
    tiles = first.row[first.layout.tile_row(0) :]
    outputs = worker.run([372], tiles, "second")
    assert all(torch.equal(found, wanted) for found, wanted in zip(outputs, expected, strict=True))


# -- the policy -----------------------------------------------------------------------------------------------------


def test_the_policy_survives_the_way_to_another_process() -> None:
    policy = load_policy("mikv")
    assert policy_from_config({"policy": policy_content(policy)}) == policy
    assert [codec.bits for _, codec in policy.codecs] == [8, 8, 2, 2] and policy.code_bits == 2
    changed = load_policy("mikv", ["eviction.retention.key.bits=4", "eviction.rate=3"])
    assert changed.eviction.retention.key.bits == 4 and changed.eviction.rate == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["eviction.budget=pyramid"], "as many tokens of every head in full; use budget: uniform"),
        (["eviction.schedule=every-n"], "divides the tokens of a request once; use schedule: end-of-prefill"),
        (["eviction.schedule={name: end-of-prefill, chunk_tokens: 64}"], "without chunk_tokens"),
        (["eviction.spare_layers=[0]"], "keeps all tokens of all layers; leave out spare_layers"),
        (["codec=dense"], "dense pages have one format, demote needs another; use codec: int8"),
        (["eviction.retention.value={name: symmetric, bits: 2}"], "differ in `rotate`; rotate both, or neither"),
        (["eviction.retention.key={name: table, bits: 2}"], "the key of demote reads tables"),
        (["eviction.retention=demote"], "key"),
        (["eviction.retention.key=4"], "must be a codec's name and parameters"),
        (["layers={0: int8}"], "layers with their own codecs are evicted with retention: evict"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_sentence(changes: list[str], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        load_policy("mikv", changes)


def test_demoted_tiles_must_be_smaller() -> None:
    policy = load_policy("mikv", ["codec=kivi-2bit"])
    with pytest.raises(ValueError, match="demote needs smaller tiles than the policy's own of 2816 bytes, got 2816"):
        PageLayout.build(policy, DIM, TILE, torch.float32, num_layers=LAYERS)
    with pytest.raises(ValueError, match="needs num_layers"):
        PageLayout.build(load_policy("mikv"), DIM, TILE, torch.float32)
