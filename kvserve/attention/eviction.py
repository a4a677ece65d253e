"""Evicting prompts in the worker: score every layer as it runs, and pack what stays once the last layer has.

The parts decide: the policy's scorer how much each token matters, its budget how many pages each KV head of each layer
keeps. Nothing is remembered from one step to the next.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kvserve.attention.base import Batch, PagedAttention
from kvserve.attention.observer import EvictionObserver
from kvserve.budgets.base import select
from kvserve.pages.kept import Kept, num_layers_of
from kvserve.pages.plan import EvictionPlan
from kvserve.policies.base import Eviction
from kvserve.scorers.base import LayerView


@dataclass(frozen=True)
class PromptEviction:
    """One row of the batch whose prompt ends with this step."""

    request: int
    request_id: str
    plan: EvictionPlan


@dataclass
class _Layer:
    attention: PagedAttention
    cells: torch.Tensor
    scores: list[torch.Tensor] = field(default_factory=list)  # of each evicted prompt: [kv_heads, candidates]


class StepEvictor:
    """Evicts the prompts of one step.

    Args:
        eviction: the policy's parts.
        prompts: the rows to evict.
        num_layers: attention layers of this worker.
        observer: is told what was evicted.
    """

    def __init__(
        self,
        eviction: Eviction,
        prompts: list[PromptEviction],
        num_layers: int,
        observer: EvictionObserver | None = None,
    ) -> None:
        self.eviction, self.prompts, self.num_layers = eviction, prompts, num_layers
        self.observer = observer or EvictionObserver()
        self.layers: dict[int, _Layer] = {}

    def after_layer(self, attention: PagedAttention, cells: torch.Tensor, query: torch.Tensor, batch: Batch) -> None:
        """Score the prompts in a layer that has just attended and stored; after the last layer, evict.

        Args:
            cells: uint8 [blocks, kv_heads, cell_bytes], the layer's pages, a view into the arena of all layers.
            query: [num_tokens, num_heads, head_dim] of the whole batch.
        """
        _, index = num_layers_of(cells, attention.layout)
        layer = self.layers[index] = _Layer(attention, cells)
        for prompt in self.prompts:
            layer.scores.append(self._score(index, layer, prompt, query, batch))
        if len(self.layers) == self.num_layers:
            for number, prompt in enumerate(self.prompts):
                self._evict(number, prompt, batch)

    def _score(
        self, index: int, layer: _Layer, prompt: PromptEviction, query: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """Scores of the candidates [sinks, end), float32 [kv_heads, end - sinks]."""
        plan, spec = prompt.plan, layer.attention.spec
        row = batch.block_table[prompt.request]
        key, value = layer.attention.read(layer.cells, row, 0, plan.prompt_len)
        last = int(batch.query_start_loc[prompt.request + 1])
        first = max(last - plan.window, int(batch.query_start_loc[prompt.request]))
        view = LayerView(
            keys=key,
            values=value,
            positions=torch.arange(plan.prompt_len),
            scale=spec.scale,
            window_queries=query[first:last].float().transpose(0, 1),
            request_id=prompt.request_id,
            layer=index,
        )
        return self.eviction.scorer.score(view)[:, layer.attention.layout.policy.sink_tokens : plan.end]

    def _evict(self, number: int, prompt: PromptEviction, batch: Batch) -> None:
        layers = [self.layers[index] for index in sorted(self.layers)]
        scores = torch.stack([layer.scores[number] for layer in layers])
        layout, plan = layers[0].attention.layout, prompt.plan
        sink_tokens = layout.policy.sink_tokens
        pages_per_block = scores.shape[0] * scores.shape[1] * layout.tiles_per_block
        pages = self.eviction.budget.allocate(
            scores, layout.tile_tokens, plan.kept_blocks * pages_per_block, minimum_pages=1
        )
        first_page = (pages.flatten().cumsum(0) - pages.flatten()).view_as(pages)
        kept_tokens = (pages * layout.tile_tokens).clamp(max=scores.shape[2])
        for number_of_layer, layer in enumerate(layers):
            chosen = select(scores[number_of_layer], kept_tokens[number_of_layer])
            self.observer.selected(prompt.request_id, number_of_layer, sink_tokens, plan.end, chosen)
            self._pack(layer, plan, batch.block_table[prompt.request], first_page[number_of_layer], chosen)
        evicted = (scores > -torch.inf).sum(-1) - kept_tokens
        held = kept_tokens + sink_tokens + plan.prompt_len - plan.end
        self.observer.evicted(prompt.request_id, plan.prompt_len, evicted, held)

    def _pack(
        self, layer: _Layer, plan: EvictionPlan, row: torch.Tensor, first_page: torch.Tensor, chosen: list[torch.Tensor]
    ) -> None:
        """Read the candidates of a layer again and write those that stay."""
        attention = layer.attention
        kept = Kept(plan.end, plan.kept_row, plan.kept_blocks)
        key, value = attention.read(layer.cells, row, attention.layout.policy.sink_tokens, plan.end, plan.prompt_len)
        keys = [rows[index] for rows, index in zip(key, chosen, strict=True)]
        values = [rows[index] for rows, index in zip(value, chosen, strict=True)]
        attention.write_kept(layer.cells, row, kept, first_page.tolist(), keys, values)
