"""Watches attention layers while a test request runs alone, and compares every answer.

A backend shows each step of each layer to `LayerProbe.observe`; evictions are heard as an `EvictionObserver`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from kvserve.attention.base import Batch, PagedAttention
from kvserve.eviction.observer import EvictionObserver, Selection
from kvserve.pages.kept import num_layers_of
from kvserve.probe.distances import LayerDistances, LayerReport, ProbeReport, codec_limit
from kvserve.probe.history import LayerHistory


class LayerProbe:
    """One layer.

    Args:
        layer: index in the model.
        attention: of the layer; only its layout, spec and tables are used.
        target: index of the layer whose cache this one reads; None: it has its own.

    Attributes:
        answers_densely: whether `observe` replaces the layer's answer by that of a dense cache.
        place: index of the layer among those that are cut, once it has been seen there.
    """

    def __init__(self, layer: int, attention: PagedAttention, target: int | None = None) -> None:
        self.layer, self.target = layer, target
        tables = {name: table.cpu() for name, table in attention.tables.items()}
        self.history = LayerHistory(attention.layout, attention.spec, tables)
        self.distances = LayerDistances(attention.spec.num_kv_heads)
        self.num_rows = 0
        self.answers_densely = False
        self.place: int | None = None
        self.problems: list[str] = []
        self._is_new = True

    def begin(self) -> None:
        """The next step begins another request."""
        self._is_new = True

    def observe(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor, cells: torch.Tensor,
        batch: Batch,
    ) -> None:  # fmt: skip
        """Take in a step that this layer has just answered: rows as of `PagedAttention.forward`."""
        if batch.num_reqs != 1:
            self._note(f"{batch.num_reqs} requests ran at once, the self-test has to run alone")
            return
        self._continue(int(batch.seq_lens[0]) - len(query))
        if self.history.layout.policy.eviction:
            self.place = num_layers_of(cells, self.history.layout)[1]
        self.history.append(key, value)
        self.num_rows += len(query)
        dense = self.history.dense(query)
        wanted = (self.history.expected(query), self.history.uncoded(query), dense)
        self.distances.add(output, *wanted, is_cut=self.history.end > 0)
        if self.answers_densely:
            output.copy_(dense.to(output.dtype))

    def _continue(self, computed: int) -> None:
        """Check what the engine says about the tokens before this step; only a new request may find some cached."""
        if self._is_new and computed % self.history.layout.tile_tokens == 0 and computed <= self.history.num_tokens:
            self.history.restart(computed)
        elif not self._is_new and 0 < self.history.num_tokens - computed <= self.history.layout.draft_tokens:
            self.num_rows -= self.history.num_tokens - computed
            self.history.reject(computed)
        elif self._is_new or computed != self.history.num_tokens:
            self._note(f"a step begins behind token {computed}, and {self.history.num_tokens} tokens were seen")
            if self._is_new:
                self.history.restart(0)
        self._is_new = False

    def _note(self, problem: str) -> None:
        if not self.problems:  # what follows from the first one is no news
            self.problems.append(f"layer {self.layer}: {problem}")

    def report(self) -> LayerReport:
        """What was seen since the probe was made."""
        found = self.distances.report(self.layer, self.num_rows, codec_limit(self.history.layout.policy))
        return replace(found, target=self.target)


class Probe(EvictionObserver):
    """All layers of one worker."""

    def __init__(self, layers: Sequence[LayerProbe]) -> None:
        self.layers = list(layers)

    def begin(self) -> None:
        """The next step begins another request."""
        for layer in self.layers:
            layer.begin()

    def selected(self, request_id: str, layer: int, selection: Selection) -> None:
        for probe in self.layers:
            if probe.place == layer:
                probe.history.cut(selection)

    def report(self) -> ProbeReport:
        """Everything since the probe was made."""
        layers = [probe.report() for probe in self.layers]
        return ProbeReport(layers, [problem for probe in self.layers for problem in probe.problems])
