"""Cutting requests in the worker: score every layer as it runs, and pack what stays once the last layer has.

The parts decide: the policy's scorer how much each token matters, its budget how many pages each KV head of each layer
keeps. What has to be remembered from one step to the next lies in the request's own state blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kvserve.attention.base import Batch, PagedAttention
from kvserve.attention.observer import EvictionObserver
from kvserve.attention.query_memory import Rows, recall, remember, rows_to_remember
from kvserve.attention.query_window import PagedWindow
from kvserve.budgets.base import select
from kvserve.pages.kept import Kept, held_tokens, num_layers_of
from kvserve.pages.plan import RowStep
from kvserve.policies.base import Eviction
from kvserve.scorers.base import LayerView


@dataclass(frozen=True)
class _Request:
    """A row of the batch that this step cuts."""

    index: int
    step: RowStep
    cut: Kept
    row: torch.Tensor
    num_tokens: int
    query_rows: slice

    @property
    def state_block(self) -> int:
        return int(self.row[0])


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
    """

    def __init__(
        self, eviction: Eviction, steps: dict[int, RowStep], batch: Batch, num_layers: int,
        observer: EvictionObserver | None = None,
    ) -> None:  # fmt: skip
        self.eviction, self.batch, self.num_layers = eviction, batch, num_layers
        self.observer = observer or EvictionObserver()
        self.windows = [(r, step.window_start) for r, step in steps.items() if step.window_start is not None]
        self.requests = [self._request(r, step, step.cut) for r, step in steps.items() if step.cut]
        self.layers: dict[int, _Layer] = {}
        self.remembered: Rows | None = None

    def _request(self, index: int, step: RowStep, cut: Kept) -> _Request:
        first, last = self.batch.query_start_loc[index : index + 2].tolist()
        return _Request(
            index, step, cut, self.batch.block_table[index], int(self.batch.seq_lens[index]), slice(first, last)
        )

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
        for request in self.requests:
            layer.scores.append(self._score(index, layer, request, query))
        if len(self.layers) == self.num_layers:
            for number, request in enumerate(self.requests):
                self._cut(number, request)

    def _score(self, index: int, layer: _Layer, request: _Request, query: torch.Tensor) -> list[torch.Tensor]:
        """Scores of each KV head's candidates, float32."""
        attention, kept = layer.attention, request.step.kept
        window = PagedWindow(
            attention, layer.cells, request.row, request.num_tokens, self._queries(layer, request, query), kept
        )
        counts = held_tokens(layer.cells, attention.layout, request.state_block, request.num_tokens, kept)
        sinks = attention.layout.policy.sink_tokens
        needs = self.eviction.scorer.needs
        keys = values = None
        if needs & {"keys", "values"}:
            keys, values = held_rows(layer, request, with_values="values" in needs)
        scores = []
        # Before the first cut all heads hold the same tokens and share a view.
        views = [(0, len(counts), window)] if not kept.end else [(h, 1, w) for h, w in enumerate(window.by_head())]
        for first_head, heads, queries in views:
            view = LayerView(
                kv_heads=heads,
                positions=held_positions(counts[first_head], request.num_tokens, sinks),
                scale=attention.spec.scale,
                keys=None if keys is None else torch.stack(keys[first_head : first_head + heads]),
                values=None if not values else torch.stack(values[first_head : first_head + heads]),
                query_window=queries,
                request_id=request.step.request_id,
                layer=index,
                first_head=first_head,
            )
            candidates = slice(sinks, counts[first_head] - (request.num_tokens - request.cut.end))
            scores += self.eviction.scorer.score(view)[:, candidates]
        return scores

    def _queries(self, layer: _Layer, request: _Request, query: torch.Tensor) -> torch.Tensor:
        """The last queries of a request that stand behind its last cut, [at most window, num_heads, head_dim]."""
        count = min(self.eviction.window, request.num_tokens - request.step.kept.end)
        if layer.attention.layout.remembered_queries:
            assert request.step.window_start is not None
            stored = request.num_tokens - request.step.window_start
            return recall(layer.attention.layout, layer.cells, request.row, stored)[-count:]
        return query[request.query_rows][-count:]

    def _cut(self, number: int, request: _Request) -> None:
        layers = [self.layers[index] for index in sorted(self.layers)]
        scores = torch.nn.utils.rnn.pad_sequence(
            [head for layer in layers for head in layer.scores[number]], batch_first=True, padding_value=-torch.inf
        ).unflatten(0, (len(layers), -1))  # [layers, kv_heads, most candidates]
        layout = layers[0].attention.layout
        pages_per_block = scores.shape[0] * scores.shape[1] * layout.tiles_per_block
        pages = self.eviction.budget.allocate(
            scores, layout.tile_tokens, len(request.cut.blocks) * pages_per_block, minimum_pages=1
        )
        first_page = (pages.flatten().cumsum(0) - pages.flatten()).view_as(pages)
        held = (scores > -torch.inf).sum(-1)
        kept_tokens = (pages * layout.tile_tokens).minimum(held)
        for i, layer in enumerate(layers):
            self._pack(i, layer, request, first_page[i], select(scores[i], kept_tokens[i]), held[i])
        always = layout.policy.sink_tokens + request.num_tokens - request.cut.end
        self.observer.evicted(request.step.request_id, request.num_tokens, held - kept_tokens, kept_tokens + always)

    def _pack(
        self, index: int, layer: _Layer, request: _Request, first_page: torch.Tensor, chosen: list[torch.Tensor],
        candidates: torch.Tensor,
    ) -> None:  # fmt: skip
        """Read the tokens of a layer again and write those that stay."""
        sinks = layer.attention.layout.policy.sink_tokens
        self.observer.selected(request.step.request_id, index, sinks, (candidates + sinks).tolist(), chosen)
        keys, values = (
            [rows[tokens + sinks] for rows, tokens in zip(kind, chosen, strict=True)]
            for kind in held_rows(layer, request)
        )
        layer.attention.write_kept(layer.cells, request.state_block, request.cut, first_page.tolist(), keys, values)


def held_rows(
    layer: _Layer, request: _Request, with_values: bool = True
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Keys and values of all tokens that each KV head holds, float32 [n, head_dim], in ascending positions.

    `with_values` False: there may be no values.
    """
    attention, cells, kept, stored = layer.attention, layer.cells, request.step.kept, request.num_tokens
    if not kept.end:
        all_keys, all_values = attention.read(cells, request.row, 0, stored, with_values=with_values)
        return list(all_keys), [] if all_values is None else list(all_values)
    sinks = attention.read(cells, request.row, 0, attention.layout.policy.sink_tokens, stored)
    between = attention.read_kept(cells, request.state_block, kept)
    later = attention.read(cells, request.row, kept.end, stored)
    keys, values = (
        [torch.cat(rows) for rows in zip(*kind, strict=True)] for kind in zip(sinks, between, later, strict=True)
    )
    return keys, values


def held_positions(count: int, num_tokens: int, sinks: int) -> torch.Tensor:
    """Positions of the tokens that a head holds, int64 [count].

    A cut does not record where the tokens it kept came from: they count as the ones right before it.
    """
    positions = torch.arange(num_tokens - count, num_tokens)
    positions[:sinks] = torch.arange(min(sinks, count))
    return positions
