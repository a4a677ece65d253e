"""Cutting requests in the worker: score every layer as it runs, and pack what stays once the last layer has.

The parts decide: the policy's scorer how much each token matters, its budget how many pages each KV head of each layer
keeps, its retention which rows fill them. What has to be remembered from one step to the next lies in the request's own
state blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from kvserve.accounting.plan import RowStep, kept_elsewhere
from kvserve.attention.base import Batch, PagedAttention, Received, Stored
from kvserve.budgets.base import filled_pages
from kvserve.eviction.collector import Collector
from kvserve.eviction.observer import EvictionObserver, Selection
from kvserve.eviction.query_memory import Rows, recall, remember, rows_to_remember
from kvserve.eviction.query_window import PagedWindow
from kvserve.pages.kept import NOT_KEPT, Kept, KeptRows, held_tokens, num_layers_of, pages_per_block
from kvserve.pages.layout import PageLayout
from kvserve.policies.base import Eviction
from kvserve.retention.base import HeldTokens
from kvserve.retention.base import Rows as PackedRows
from kvserve.scorers.base import LayerView


@dataclass(frozen=True)
class _Request:
    """A row of the batch; `cut` is what this step cuts it down to, if it does."""

    index: int
    step: RowStep
    cut: Kept
    row: torch.Tensor
    state_block: int
    num_tokens: int
    query_rows: slice

    @property
    def num_rows(self) -> int:
        return self.query_rows.stop - self.query_rows.start

    @property
    def decodes(self) -> bool:
        """One query row: the attention it pays is added up by the kernel that attends."""
        return self.num_rows == 1


@dataclass
class _Layer:
    attention: PagedAttention
    cells: torch.Tensor
    scores: list[list[torch.Tensor]] = field(default_factory=list)  # of each cut request, per KV head: [candidates]


class StepEvictor:
    """What one step's rows remember, and the cuts that it ends with.

    Args:
        eviction: the policy's parts.
        steps: by index in the batch.
        batch: the step.
        num_layers: attention layers of this worker.
        observer: is told what was evicted.
        collector: where the scorer needs every query of a prompt.
    """

    def __init__(
        self, eviction: Eviction, steps: dict[int, RowStep], batch: Batch, num_layers: int,
        observer: EvictionObserver | None = None, collector: Collector | None = None,
    ) -> None:  # fmt: skip
        self.eviction, self.batch, self.num_layers = eviction, batch, num_layers
        self.observer = observer or EvictionObserver()
        self.collector = collector or Collector(eviction.scorer)
        self.spared = eviction.spared_layers(num_layers)
        self._starts, self._lengths = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
        self._state_blocks = batch.block_table[:, 0].tolist()
        self.windows = [(r, step.window_start) for r, step in steps.items() if step.window_start is not None]
        self.requests = [self._request(r, step) for r, step in steps.items() if step.cut]
        self.collected = [self._request(r, step) for r, step in steps.items() if step.collects]
        self.layers: dict[int, _Layer] = {}
        self.remembered: Rows | None = None

    def _request(self, index: int, step: RowStep) -> _Request:
        row, block, num_tokens = self.batch.block_table[index], self._state_blocks[index], self._lengths[index]
        query_rows = slice(self._starts[index], self._starts[index + 1])
        return _Request(index, step, step.cut or NOT_KEPT, row, block, num_tokens, query_rows)

    def before_layer(self, attention: PagedAttention, cells: torch.Tensor) -> Received | None:
        """What a layer that is about to attend shall add up on its way."""
        _, index = num_layers_of(cells, attention.layout)
        if not self.collected or index in self.spared:
            return None
        sums = {}
        for request in self.collected:
            before = request.num_tokens - request.num_rows
            places = (request.step.request_id, index, before, request.num_rows)
            table = self.collector.begin(*places, attention.spec.num_kv_heads, cells.device)
            if table is not None and request.decodes:
                sums[request.index] = table
        wanted = self.eviction.scorer.accumulation
        return Received(wanted.power, sums) if wanted and sums else None

    def after_layer(self, attention: PagedAttention, cells: torch.Tensor, query: torch.Tensor) -> None:
        """Remember queries and score in a layer that has just attended and stored; after the last layer, cut.

        Args:
            cells: uint8 [blocks, kv_heads, cell_bytes], the layer's pages, a view into the arena of all layers.
            query: [num_tokens, num_heads, head_dim] of the whole batch.
        """
        layout = attention.layout
        if layout.remembered_queries:
            if not self.layers:
                self.remembered = rows_to_remember(layout, self.batch, self.windows)
            if self.remembered:
                remember(layout, cells, self.remembered, query)
        _, index = num_layers_of(cells, layout)
        layer = self.layers[index] = _Layer(attention, cells)
        for request in self.collected if index not in self.spared else ():
            stored = Stored(cells, request.row, request.num_tokens, request.step.kept)
            window = PagedWindow(attention, stored, query[request.query_rows])
            self.collector.add(request.step.request_id, index, window, request.decodes)
        for request in self.requests:
            layer.scores.append(self._score(index, layer, request, query))
        if len(self.layers) == self.num_layers:
            for number, request in enumerate(self.requests):
                self._cut(number, request)
            if not self.eviction.schedule.repeats:
                self.collector.drop({request.step.request_id for request in self.requests})

    def _score(self, index: int, layer: _Layer, request: _Request, query: torch.Tensor) -> list[torch.Tensor]:
        """Scores of each KV head's candidates, float32."""
        attention, kept = layer.attention, request.step.kept
        sinks, later = attention.layout.policy.sink_tokens, request.num_tokens - request.cut.end
        counts = held_tokens(layer.cells, attention.layout, request.state_block, request.num_tokens, kept)
        if index in self.spared:  # nothing goes, whatever it is worth
            return [torch.zeros(count - sinks - later, device=query.device) for count in counts]
        collected = self.collector.of(request.step.request_id, index)
        whole = LayerView(
            kv_heads=len(counts),
            positions=held_positions(counts[0], request.num_tokens, sinks, query.device),
            scale=attention.spec.scale,
            query_window=self._window(layer, request, query),
            accumulated=None if collected.accumulated is None else collected.accumulated[:, : max(counts)],
            query_statistics=collected.query_statistics,
            kept_tokens=self._kept_tokens(attention.layout, request) + sinks + later,
            request_id=request.step.request_id,
            layer=index,
            first_head=attention.spec.first_head,
        )
        needs, rows = self.eviction.scorer.needs, None
        if needs & {"keys", "values"}:
            rows = held_rows(layer, request, with_values="values" in needs)
        # Before the first cut all heads hold the same tokens and share a view.
        views = self._views_of_heads(whole, request, counts, rows) if kept.end else [_with_rows(whole, rows)]
        scores = [head for view in views for head in self.eviction.scorer.score(view)]
        return [head[sinks : count - later] for head, count in zip(scores, counts, strict=True)]

    def _kept_tokens(self, layout: PageLayout, request: _Request) -> int:
        return kept_elsewhere(layout, request.cut.end, len(request.cut.blocks), request.step.chosen_pages)

    def _views_of_heads(
        self, whole: LayerView, request: _Request, counts: list[int], rows: KeptRows | None
    ) -> Iterator[LayerView]:
        assert isinstance(whole.query_window, PagedWindow)
        attention, sums, statistics = whole.query_window.kernels, whole.accumulated, whole.query_statistics
        sinks, group = attention.layout.policy.sink_tokens, attention.spec.group
        for head, (count, window) in enumerate(zip(counts, whole.query_window.by_head(counts), strict=True)):
            view = replace(
                whole,
                kv_heads=1,
                positions=held_positions(count, request.num_tokens, sinks, whole.positions.device),
                query_window=window,
                accumulated=None if sums is None else sums[head : head + 1, :count],
                query_statistics=statistics and statistics.of_heads(slice(head * group, (head + 1) * group)),
                first_head=whole.first_head + head,
            )
            yield _with_rows(view, rows and KeptRows(rows.keys[head : head + 1], rows.values[head : head + 1]))

    def _window(self, layer: _Layer, request: _Request, query: torch.Tensor) -> PagedWindow:
        """The last queries of a request that stand behind its last cut."""
        layout, kept = layer.attention.layout, request.step.kept
        count = min(self.eviction.window, request.num_tokens - kept.end)
        rows = query[request.query_rows][-count:]
        if layout.remembered_queries:
            assert request.step.window_start is not None
            stored = request.num_tokens - request.step.window_start
            rows = recall(layout, layer.cells, request.row, stored)[-count:]
        return PagedWindow(layer.attention, Stored(layer.cells, request.row, request.num_tokens, kept), rows)

    def _cut(self, number: int, request: _Request) -> None:
        layers = [self.layers[index] for index in sorted(self.layers)]
        scores = torch.nn.utils.rnn.pad_sequence(
            [head for layer in layers for head in layer.scores[number]], batch_first=True, padding_value=-torch.inf
        ).unflatten(0, (len(layers), -1))  # [layers, kv_heads, most candidates]
        layout = layers[0].attention.layout
        total_pages = request.step.chosen_pages * scores.shape[0] * scores.shape[1]
        if not total_pages:
            total_pages = len(request.cut.blocks) * pages_per_block(layout, scores.shape[1], len(layers))
        spec = layers[0].attention.spec
        heads = range(spec.first_head, spec.first_head + spec.num_kv_heads)
        budget = self.eviction.budget.part(range(self.num_layers), heads)
        _, counts, tokens = budget.choose(scores, layout.chosen_unit, total_pages, self.spared)
        held = torch.tensor([[len(head) for head in layer.scores[number]] for layer in layers])
        demoted = held - counts if layout.other_formats else torch.zeros_like(counts)
        pages = torch.stack([
            _pages_of(layer.attention.layout, *of_layer)
            for layer, of_layer in zip(layers, zip(counts, demoted, strict=True), strict=True)
        ])  # fmt: skip
        first_page = (pages.flatten().cumsum(0) - pages.flatten()).view_as(pages)
        sources = [
            self._pack(i, layer, request, first_page[i].tolist(), (tokens[i], layer.scores[number]))
            for i, layer in enumerate(layers)
        ]
        always = layout.policy.sink_tokens + request.num_tokens - request.cut.end
        if request.step.collects and self.eviction.schedule.repeats:
            self._keep_collected(request, sources, held, layout.policy.sink_tokens)
        gone, kept = held - counts - demoted, counts + demoted + always
        self.observer.evicted(request.step.request_id, request.num_tokens, gone, kept, demoted)

    def _keep_collected(
        self, request: _Request, sources: list[list[torch.Tensor]], candidates: torch.Tensor, sinks: int
    ) -> None:
        """What was collected of evicted tokens goes with them; a row has what its source had."""
        later = request.num_tokens - request.cut.end
        for i, index in enumerate(sorted(self.layers)):
            if index in self.spared:
                continue
            first_later = (candidates[i] + sinks).tolist()
            self.collector.of(request.step.request_id, index).keep([
                torch.cat([
                    torch.arange(sinks, device=head.device), head + sinks,
                    torch.arange(first, first + later, device=head.device),
                ])
                for head, first in zip(sources[i], first_later, strict=True)
            ])  # fmt: skip

    def _pack(
        self, index: int, layer: _Layer, request: _Request, first_page: list[int],
        choice: tuple[list[torch.Tensor], list[torch.Tensor]],
    ) -> list[torch.Tensor]:  # fmt: skip
        """Read the tokens of a layer again and write what stays of them.

        Args:
            choice: per KV head, which candidates are chosen, and the scores of all.

        Returns:
            per KV head, the candidate that each row is, or began as.
        """
        sinks, held = layer.attention.layout.policy.sink_tokens, held_rows(layer, request)
        packed = [
            self.eviction.retention.keep(_candidates(held, head, sinks, scores), chosen)
            for head, (chosen, scores) in enumerate(zip(*choice, strict=True))
        ]
        chosen, scores = choice
        sources, ends = [rows.sources for rows in packed], [sinks + len(head) for head in scores]
        self.observer.selected(request.step.request_id, index, Selection(sinks, ends, chosen, scores, sources))
        rows = _rows_of(packed, layer.attention.layout)
        layer.attention.write_kept(layer.cells, request.state_block, request.cut, first_page, rows)
        return sources


def _pages_of(layout: PageLayout, chosen: torch.Tensor, demoted: torch.Tensor) -> torch.Tensor:
    """Kept pages of heads that keep so many tokens in format 0 and in format 1, int64 of the same shape."""
    pages = filled_pages(chosen, layout.page_tokens())
    return pages + filled_pages(demoted, layout.page_tokens(1)) if layout.other_formats else pages


def _candidates(held: KeptRows, head: int, sinks: int, scores: torch.Tensor) -> HeldTokens:
    """What a cut chooses from, of one KV head: the tokens that have `scores`, which follow the sinks."""
    span = slice(sinks, sinks + len(scores))
    mass = torch.zeros_like(scores) if held.log_mass is None else held.log_mass[head][span]
    return HeldTokens(held.keys[head][span], held.values[head][span], scores, mass)


def _rows_of(packed: list[PackedRows], layout: PageLayout) -> KeptRows:
    """The rows of all KV heads; where pages have log-masses, heads without have zeros."""
    masses = [torch.zeros_like(rows.keys[:, 0]) if rows.log_mass is None else rows.log_mass for rows in packed]
    runs = [rows.runs or (len(rows.keys),) for rows in packed] if layout.other_formats else None
    both = [rows.keys for rows in packed], [rows.values for rows in packed]
    return KeptRows(*both, masses if layout.policy.has_mass else None, runs)


def held_rows(layer: _Layer, request: _Request, with_values: bool = True) -> KeptRows:
    """All tokens that each KV head holds, per head float32 [n, head_dim], in ascending positions.

    Their values may be empty where nobody asked for them. Log-masses are there once a cut has stored some.
    """
    attention, cells, kept = layer.attention, layer.cells, request.step.kept
    stored = Stored(cells, request.row, request.num_tokens, kept)
    if not kept.end:
        keys, values = attention.read(stored, 0, stored.num_tokens, with_values=with_values)
        return KeptRows(list(keys), [] if values is None else list(values))
    sinks = attention.read(stored, 0, attention.layout.policy.sink_tokens)
    between = attention.read_kept(cells, request.state_block, kept)
    later = attention.read(stored, kept.end, stored.num_tokens)
    assert sinks[1] is not None and later[1] is not None
    keys = [torch.cat(rows) for rows in zip(sinks[0], between.keys, later[0], strict=True)]
    values = [torch.cat(rows) for rows in zip(sinks[1], between.values, later[1], strict=True)]
    if between.log_mass is None:
        return KeptRows(keys, values)
    before, after = (torch.zeros_like(rows[0][0, :, 0]) for rows in (sinks, later))
    return KeptRows(keys, values, [torch.cat([before, head, after]) for head in between.log_mass])


def _with_rows(view: LayerView, rows: KeptRows | None) -> LayerView:
    if rows is None:
        return view
    values = torch.stack(list(rows.values)) if rows.values else None
    return replace(view, keys=torch.stack(list(rows.keys)), values=values)


def held_positions(count: int, num_tokens: int, sinks: int, device: torch.device) -> torch.Tensor:
    """Positions of the tokens that a head holds, int64 [count].

    A cut does not record where the tokens it kept came from: they count as the ones right before it.
    """
    positions = torch.arange(num_tokens - count, num_tokens, device=device)
    positions[:sinks] = torch.arange(min(sinks, count), device=device)
    return positions
