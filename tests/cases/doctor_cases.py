"""A miniature engine on tensors: one request after the other through a few layers, with whatever the policy evicts.

The layers' rows are random, the arena is poisoned, block ids are shuffled, and a probe watches. A damage stands between
the probe and the cache: it changes what a layer's kernels are given, or what they left in the arena.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kvserve.accounting.plan import EvictionPlan, RowStep, plan_eviction
from kvserve.attention.base import Answers, Batch, LayerSpec, NewRows, PagedAttention
from kvserve.attention.native import NativeAttention
from kvserve.eviction.collector import Collector
from kvserve.eviction.evictor import StepEvictor
from kvserve.pages.kept import NOT_KEPT, Kept, KeptTable
from kvserve.pages.layout import PageLayout
from kvserve.policies.base import Policy
from kvserve.policies.limits import request_limit
from kvserve.probe.distances import ProbeReport, complaints
from kvserve.probe.history import LayerHistory
from kvserve.probe.probe import LayerProbe, Probe
from kvserve.probe.request import plan_test
from kvserve.scorers.rotary import Rotary
from tests.cases.attention_cases import POISON, make_batch, random_sinks
from tests.cases.codec_cases import random_layer_tables

NUM_LAYERS, KV_HEADS, GROUP, HEAD_DIM = 2, 2, 3, 64
MAX_MODEL_LEN = 2048
DAMAGED_LAYER = 1


@dataclass
class Step:
    """What one layer's kernels are given; a damage may change it."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cells: torch.Tensor
    batch: Batch
    output: torch.Tensor
    attention: PagedAttention
    history: LayerHistory


class Damage:
    """Does nothing; subclasses break one layer."""

    def before(self, step: Step) -> None:
        """Called before the kernels."""

    def after(self, step: Step) -> None:
        """Called behind the kernels, and before the probe sees the output."""

    def stored(self, machine: Machine, request: Request) -> None:
        """Called when a step is over and its tokens are stored, evictions included."""


@dataclass
class Machine:
    """One worker, with the requests of a self-test.

    Attributes:
        seed: of everything random.
        block_tiles: tiles of one block.
    """

    policy: Policy
    seed: int = 0
    dtype: torch.dtype = torch.float32
    damage: Damage = field(default_factory=Damage)
    block_tiles: int = 1
    sliding_window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False  # learned ones

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        # What a calibration would say of heads: one of each layer is unlike the others.
        flags = torch.eye(KV_HEADS, dtype=torch.int8)[torch.arange(NUM_LAYERS) % KV_HEADS]
        self.policy = self.policy.with_head_tables({"heads.whole": flags})
        size = self.policy.tile_tokens * self.block_tiles
        self.layout = PageLayout.build(
            self.policy, HEAD_DIM, size, self.dtype, query_group=GROUP, num_layers=NUM_LAYERS
        )
        learned = random_sinks(GROUP * KV_HEADS) if self.sinks else None
        self.spec = LayerSpec(
            GROUP * KV_HEADS, KV_HEADS, HEAD_DIM**-0.5, self.sliding_window, 0, self.soft_cap, learned
        )
        self.plan = plan_test(self.layout, MAX_MODEL_LEN)
        blocks = 6 * self.layout.blocks_for(self.plan.prompt_len + self.plan.output_tokens)
        shape = (blocks, KV_HEADS, NUM_LAYERS, self.layout.cell_bytes)
        self.arena = torch.full(shape, POISON, dtype=torch.uint8)
        self.free = torch.randperm(blocks, generator=self.generator).tolist()
        self.layouts = self.layout.each_layer(NUM_LAYERS)
        self.attention = [self._attention(layer) for layer in range(NUM_LAYERS)]
        self.probe = Probe([LayerProbe(i, attention) for i, attention in enumerate(self.attention)])
        rotary = Rotary(1e4 ** -(torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2)))
        self.collector = Collector(self.policy.eviction.scorer, rotary) if self.policy.eviction else None
        self.spread = 0.2 + self._random(NUM_LAYERS, KV_HEADS, HEAD_DIM).abs()
        self.offset = self._random(NUM_LAYERS, KV_HEADS, HEAD_DIM)

    def _attention(self, layer: int) -> NativeAttention:
        tile_format = self.layouts[layer].tile_format
        tables = random_layer_tables(tile_format, KV_HEADS, self.seed + layer)
        return NativeAttention(self.layouts[layer], self.spec, tables=tables)

    def cells(self, layer: int) -> torch.Tensor:
        """What the layer's kernels get."""
        cells = self.arena[:, :, layer]
        return self.layout.cells_of(cells, layer)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def run(self) -> ProbeReport:
        """Both requests of the self-test; the second one finds the first one's tiles where nothing is evicted."""
        total = self.plan.prompt_len + self.plan.output_tokens
        rows = {i: self._rows(i, total) for i in range(NUM_LAYERS)}
        first = Request(self, "first", self.plan.first_len, self.plan.first_len)
        self.probe.begin()
        first.prefill(rows, 0)
        shared = 0 if self.policy.eviction else self.plan.first_len // self.layout.block_size
        second = Request(self, "second", self.plan.prompt_len, total, first, shared)
        self.probe.begin()
        second.prefill(rows, shared * self.layout.block_size)
        while second.num_tokens < total:
            second.step(rows, 1)
        self.num_rows = self.plan.first_len + total - shared * self.layout.block_size
        return self.probe.report()

    def complaints(self) -> list[str]:
        """What the doctor says about `run`."""
        report = self.run()
        return complaints(report, self.num_rows)

    def _rows(self, layer: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value; keys have a per-channel offset and spread, as real ones do."""
        query = self._random(count, GROUP * KV_HEADS, HEAD_DIM)
        key = self._random(count, KV_HEADS, HEAD_DIM) * self.spread[layer] + self.offset[layer]
        return query.to(self.dtype), key.to(self.dtype), self._random(count, KV_HEADS, HEAD_DIM).to(self.dtype)

    def take(self, count: int) -> list[int]:
        taken, self.free = self.free[:count], self.free[count:]
        return taken


class Request:
    """One request; `shared` of its tile blocks, with their sinks, are another one's."""

    def __init__(
        self, machine: Machine, name: str, prompt_len: int, max_len: int, other: Request | None = None, shared: int = 0
    ) -> None:
        self.machine, self.name, self.num_tokens = machine, name, 0
        layout = machine.layout
        self.row = machine.take(layout.blocks_for(max_len))
        if other and shared:
            first, last = layout.tile_row(0), layout.tile_row(shared)
            self.row[first:last] = other.row[first:last]
        self.cuts: EvictionPlan | None = None
        if layout.policy.eviction:
            extra = machine.plan.extra_args
            limit = request_limit(layout.policy.eviction, layout.policy, extra)
            self.cuts = plan_eviction(layout, limit, prompt_len, max_len)
        self.kept = NOT_KEPT
        self.prompt_len = prompt_len

    def prefill(self, rows: dict, computed: int) -> None:
        """The prompt, in chunks of at most 150 tokens, from `computed` on."""
        self.num_tokens = computed
        while self.num_tokens < self.prompt_len:
            count = min(150, self.prompt_len - self.num_tokens)
            self.step(rows, self.cuts.clip_step(self.num_tokens, count) if self.cuts else count)

    def step(self, rows: dict, count: int) -> None:
        machine, layout, eviction = self.machine, self.machine.layout, self.machine.policy.eviction
        before, after = self.num_tokens, self.num_tokens + count
        table = torch.tensor([self.row], dtype=torch.int32)
        batch = make_batch(layout, [before], [count], table)
        if self.kept.end:
            batch.kept = KeptTable.of([self.kept])
        evictor, plan = None, self._plan(before, after)
        if eviction and plan:
            evictor = StepEvictor(eviction, {0: plan}, batch, NUM_LAYERS, machine.probe, machine.collector)
        for layer, attention in enumerate(machine.attention):
            cells = machine.cells(layer)
            received = evictor.before_layer(attention, cells) if evictor else None
            query, key, value = (part[before:after] for part in rows[layer])
            output = torch.full_like(query, torch.nan)
            history = machine.probe.layers[layer].history
            given = Step(query.clone(), key.clone(), value.clone(), cells, batch, output, attention, history)
            damage = machine.damage if layer == DAMAGED_LAYER else Damage()
            damage.before(given)
            given.attention.forward(
                NewRows(given.query, given.key, given.value), given.cells, given.batch, Answers(given.output), received
            )
            damage.after(given)
            machine.probe.layers[layer].observe(query, key, value, given.output, cells, batch)
            if evictor:
                evictor.after_layer(attention, cells, query)
        self.num_tokens = after
        if plan and plan.cut:
            self.kept = plan.cut
        machine.damage.stored(machine, self)

    def _plan(self, before: int, after: int) -> RowStep | None:
        """What the connector tells the worker, see kvserve/engine/connector.py."""
        following = self.cuts.next_cut(before) if self.cuts else None
        if following is None:
            return RowStep(self.name, self.kept) if self.kept.end else None
        assert self.cuts is not None and self.machine.policy.eviction is not None and after <= following.point
        cut = None
        if after == following.point:
            cut = Kept(following.end, tuple(self.machine.take(following.kept_blocks)))
        start, collects = self.cuts.window_start(following), self.machine.policy.eviction.scorer.collects
        chosen = following.chosen_pages if cut else 0
        return RowStep(self.name, self.kept, cut, start if after > start else None, collects, chosen)
