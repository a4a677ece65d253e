"""Cutting requests in the worker: score every layer as it runs, and pack what stays once the last layer has.

The parts decide: the policy's scorer how much each token matters, its budget how many pages each KV head of each layer
keeps. What has to be remembered from one step to the next lies in the request's own state blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from kvserve.attention.base import Batch, PagedAttention
from kvserve.attention.query_memory import Rows, recall, remember, rows_to_remember
from kvserve.budgets.base import select
from kvserve.pages.kept import Kept, num_layers_of
from kvserve.pages.plan import RowStep
from kvserve.policies.base import Eviction
from kvserve.scorers.base import LayerView


class Tokens(NamedTuple):
    """The cached tokens of one KV head, or of several that hold the same ones.

    Attributes:
        keys, values: float32 [kv_heads, n, head_dim].
        positions: int64 [n], ascending. An earlier cut does not say where the tokens it kept came from: they count as
            the ones right before it.
        first, last: those in between are the candidates; before them are sinks, behind them what stays in any case.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    first: int
    last: int


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
        num_layers: attention layers of this worker.
    """

    def __init__(self, eviction: Eviction, steps: dict[int, RowStep], num_layers: int) -> None:
        self.eviction, self.num_layers = eviction, num_layers
        self.cuts = [(request, step, step.cut) for request, step in steps.items() if step.cut]
        self.windows = [(r, step.window_start) for r, step in steps.items() if step.window_start is not None]
        self.layers: dict[int, _Layer] = {}
        self.remembered: Rows | None = None

    def after_layer(self, attention: PagedAttention, cells: torch.Tensor, query: torch.Tensor, batch: Batch) -> None:
        """Remember queries and score in a layer that has just attended and stored; after the last layer, cut.

        Args:
            cells: uint8 [blocks, kv_heads, cell_bytes], the layer's pages, a view into the arena of all layers.
            query: [num_tokens, num_heads, head_dim] of the whole batch.
        """
        layout = attention.layout
        if layout.remembered_queries:
            if not self.layers:
                self.remembered = rows_to_remember(layout, batch, self.windows)
            if self.remembered:
                remember(layout, cells, self.remembered, query)
        _, index = num_layers_of(cells, layout)
        layer = self.layers[index] = _Layer(attention, cells)
        for request, step, cut in self.cuts:
            layer.scores.append(self._score(index, layer, request, step, cut, query, batch))
        if len(self.layers) == self.num_layers:
            for number, (request, step, cut) in enumerate(self.cuts):
                self._cut(number, request, step, cut, batch)

    def _score(
        self, index: int, layer: _Layer, request: int, step: RowStep, cut: Kept, query: torch.Tensor, batch: Batch
    ) -> list[torch.Tensor]:
        """Scores of each KV head's candidates, float32."""
        queries = self._window(layer, request, step, query, batch)
        group, scores = layer.attention.spec.group, list[torch.Tensor]()
        for tokens in cached_tokens(layer.attention, layer.cells, request, step, cut, batch):
            heads = tokens.keys.shape[0]
            first_head = len(scores)
            view = LayerView(
                keys=tokens.keys,
                values=tokens.values,
                positions=tokens.positions,
                scale=layer.attention.spec.scale,
                window_queries=queries[first_head * group : (first_head + heads) * group],
                request_id=step.request_id,
                layer=index,
                first_head=first_head,
            )
            scores += self.eviction.scorer.score(view)[:, tokens.first : tokens.last]
        return scores

    def _window(self, layer: _Layer, request: int, step: RowStep, query: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The last queries of a request, float32 [num_heads, at most window, head_dim]."""
        layout = layer.attention.layout
        first, last = batch.query_start_loc[request : request + 2].tolist()
        if layout.remembered_queries:
            assert step.window_start is not None
            count = int(batch.seq_lens[request]) - step.window_start
            return recall(layout, layer.cells, batch.block_table[request], count)
        return query[max(last - self.eviction.window, first) : last].float().transpose(0, 1)

    def _cut(self, number: int, request: int, step: RowStep, cut: Kept, batch: Batch) -> None:
        layers = [self.layers[index] for index in sorted(self.layers)]
        scores = torch.nn.utils.rnn.pad_sequence(
            [head for layer in layers for head in layer.scores[number]], batch_first=True, padding_value=-torch.inf
        ).unflatten(0, (len(layers), -1))  # [layers, kv_heads, most candidates]
        layout = layers[0].attention.layout
        pages_per_block = scores.shape[0] * scores.shape[1] * layout.tiles_per_block
        pages = self.eviction.budget.allocate(
            scores, layout.tile_tokens, len(cut.blocks) * pages_per_block, minimum_pages=1
        )
        first_page = (pages.flatten().cumsum(0) - pages.flatten()).view_as(pages)
        held = (scores > -torch.inf).sum(-1)
        kept_tokens = (pages * layout.tile_tokens).minimum(held)
        for i, layer in enumerate(layers):
            chosen = select(scores[i], kept_tokens[i])
            self._pack(layer, request, step, cut, batch, first_page[i], chosen)

    def _pack(
        self, layer: _Layer, request: int, step: RowStep, cut: Kept, batch: Batch, first_page: torch.Tensor,
        chosen: list[torch.Tensor],
    ) -> None:  # fmt: skip
        """Read the candidates of a layer again and write those that stay."""
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for tokens in cached_tokens(layer.attention, layer.cells, request, step, cut, batch):
            for key, value in zip(tokens.keys, tokens.values, strict=True):
                index = chosen[len(keys)] + tokens.first
                keys.append(key[index])
                values.append(value[index])
        state_block = int(batch.block_table[request, 0])
        layer.attention.write_kept(layer.cells, state_block, cut, first_page.tolist(), keys, values)


def cached_tokens(
    attention: PagedAttention, cells: torch.Tensor, request: int, step: RowStep, cut: Kept, batch: Batch
) -> list[Tokens]:
    """What the KV heads of one layer hold of a request: one entry for all, or one for each once it was cut."""
    row, length, sinks = batch.block_table[request], int(batch.seq_lens[request]), attention.layout.policy.sink_tokens
    if not step.kept.end:
        return [Tokens(*attention.read(cells, row, 0, length), torch.arange(length), sinks, cut.end)]
    parts = (
        attention.read(cells, row, 0, sinks, length),
        attention.read_kept(cells, int(row[0]), step.kept),
        attention.read(cells, row, step.kept.end, length),
    )
    entries = []
    for head, kept_keys in enumerate(parts[1][0]):
        key, value = (torch.cat([rows[head] for rows in kind]) for kind in zip(*parts, strict=True))
        positions = torch.arange(length - len(key), length)
        positions[:sinks] = torch.arange(sinks)
        last = sinks + len(kept_keys) + cut.end - step.kept.end
        entries.append(Tokens(key[None], value[None], positions, sinks, last))
    return entries
