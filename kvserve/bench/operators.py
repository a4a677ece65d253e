"""Decode attention alone: the kernels on a filled arena, layer after layer, as one decode step reads them.

Every layer has its own pages, so a layer's cache has left the CPU caches when its turn comes again, as in a model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from kvserve.attention.base import Answers, Batch, LayerSpec, NewRows
from kvserve.attention.native import NativeAttention
from kvserve.bench.stock_attention import StockAttention
from kvserve.measuring.engines import STOCK
from kvserve.measuring.shape import ModelShape
from kvserve.pages.layout import PageLayout
from kvserve.policies.loading import load_policy


class Rows:
    """Random Q, K and V, the same for every cache; keys have some wide channels, as in real models."""

    def __init__(self, shape: ModelShape, dtype: torch.dtype, num_seqs: int, num_tokens: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator).to(dtype)

        dim = shape.head_dim
        self.num_seqs, self.num_tokens = num_seqs, num_tokens
        self.key = [normal(num_tokens, shape.num_kv_heads, dim) for _ in range(num_seqs)]
        self.value = [normal(num_tokens, shape.num_kv_heads, dim) for _ in range(num_seqs)]
        for key in self.key:
            key[..., :4] *= 4
        self.query = normal(num_tokens, shape.num_heads, dim)

    def new(self, position: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value of the token at `position` of every sequence."""
        key = torch.stack([rows[position] for rows in self.key])
        return self.query[: self.num_seqs], key, torch.stack([rows[position] for rows in self.value])


class StockCache:
    """vLLM's dense cache."""

    def __init__(self, shape: ModelShape, dtype: torch.dtype, rows: Rows) -> None:
        self.rows, self.dtype = rows, dtype
        self.attention = StockAttention(shape, dtype, shape.num_layers, rows.num_seqs, rows.num_tokens)
        for seq in range(rows.num_seqs):
            step = self.attention.step([seq], [rows.num_tokens], [rows.num_tokens])
            self.attention.store(0, rows.key[seq], rows.value[seq], step)
        for layer in self.attention.layers[1:]:
            layer.copy_(self.attention.layers[0])

    def decoder(self, seq_len: int) -> Callable[[], torch.Tensor]:
        """One step of all layers, its inputs and metadata made beforehand; returns the last layer's output."""
        count = self.rows.num_seqs
        query, key, value = self.rows.new(seq_len - 1)
        step = self.attention.step(list(range(count)), [1] * count, [seq_len] * count)
        output = torch.empty_like(query)

        def decode() -> torch.Tensor:
            for layer in range(len(self.attention.layers)):
                self.attention.store(layer, key, value, step)
                self.attention.attend(layer, query, output, step)
            return output

        return decode

    def prefill(self, num_tokens: int) -> None:
        """One layer, sequence 0."""
        step = self.attention.step([0], [num_tokens], [num_tokens])
        query = self.rows.query[:num_tokens]
        self.attention.store(0, self.rows.key[0][:num_tokens], self.rows.value[0][:num_tokens], step)
        self.attention.attend(0, query, torch.empty_like(query), step)


class PageCache:
    """A policy's arena, in the layout (block, KV head, layer, bytes) that the engine uses."""

    def __init__(self, policy: str, shape: ModelShape, dtype: torch.dtype, rows: Rows) -> None:
        loaded = load_policy(policy)
        self.rows = rows
        self.layout = PageLayout.build(loaded, shape.head_dim, loaded.tile_tokens, dtype)
        self.attention = NativeAttention(
            self.layout, LayerSpec(shape.num_heads, shape.num_kv_heads, shape.head_dim**-0.5)
        )
        per_seq = self.layout.blocks_for(rows.num_tokens)
        size = (1 + rows.num_seqs * per_seq, shape.num_kv_heads, shape.num_layers, self.layout.cell_bytes)
        self.arena = torch.zeros(size, dtype=torch.uint8)
        self.block_table = torch.arange(1, size[0], dtype=torch.int32).reshape(rows.num_seqs, per_seq)
        for seq in range(rows.num_seqs):
            batch = self._batch([seq], rows.num_tokens, rows.num_tokens)
            self.attention.store(rows.key[seq], rows.value[seq], self.arena[:, :, 0], batch)
        for layer in range(1, shape.num_layers):
            self.arena[:, :, layer] = self.arena[:, :, 0]

    def _rewind(self, num_tokens: int) -> None:
        """Bring every layer's tails to the state of `num_tokens` tokens."""
        start = num_tokens // self.layout.tile_tokens * self.layout.tile_tokens
        if start == num_tokens:
            return
        batch = self._batch(list(range(self.rows.num_seqs)), num_tokens - start, num_tokens)
        key = torch.cat([rows[start:num_tokens] for rows in self.rows.key])
        value = torch.cat([rows[start:num_tokens] for rows in self.rows.value])
        for layer in range(self.arena.shape[2]):
            self.attention.store(key, value, self.arena[:, :, layer], batch)

    def _batch(self, seqs: list[int], query_len: int, seq_len: int) -> Batch:
        starts = torch.arange(0, len(seqs) + 1, dtype=torch.int32) * query_len
        return Batch(starts, torch.full((len(seqs),), seq_len, dtype=torch.int32), self.block_table[seqs])

    def decoder(self, seq_len: int) -> Callable[[], torch.Tensor]:
        """As StockCache.decoder; brings the tails to where the step starts first."""
        self._rewind(seq_len - 1)
        query, key, value = self.rows.new(seq_len - 1)
        batch = self._batch(list(range(self.rows.num_seqs)), 1, seq_len)
        output = torch.empty_like(query)

        def decode() -> torch.Tensor:
            for layer in range(self.arena.shape[2]):
                self.attention.forward(NewRows(query, key, value), self.arena[:, :, layer], batch, Answers(output))
            return output

        return decode

    def prefill(self, num_tokens: int) -> None:
        """One layer, sequence 0."""
        query, batch = self.rows.query[:num_tokens], self._batch([0], num_tokens, num_tokens)
        key, value = self.rows.key[0][:num_tokens], self.rows.value[0][:num_tokens]
        self.attention.forward(NewRows(query, key, value), self.arena[:, :, 0], batch, Answers(torch.empty_like(query)))


class OperatorHost:
    """Holds the caches of all policies in one process, so that their runs can alternate."""

    def __init__(self, shape: ModelShape, dtype: str, num_seqs: int, context: int, seed: int) -> None:
        self.shape, self.dtype, self.context = shape, getattr(torch, dtype), context
        self.rows = Rows(shape, self.dtype, num_seqs, context, seed)
        self.caches: dict[str, StockCache | PageCache] = {}

    def fill(self, name: str) -> dict[str, Any]:
        """Create one cache; returns what runs it."""
        if name == STOCK:
            cache = self.caches[name] = StockCache(self.shape, self.dtype, self.rows)
            return {"isa": cache.attention.isa, "threads": torch.get_num_threads()}
        pages = self.caches[name] = PageCache(name, self.shape, self.dtype, self.rows)
        return {
            "isa": pages.attention.isa,
            "threads": pages.attention.num_threads,
            "bits_per_element": pages.layout.bits_per_element(),
        }

    def decode(self, name: str, seq_len: int, steps: int) -> float:
        """Median seconds of one layer's call, all layers in turn, over `steps` steps."""
        return _median_seconds(self.caches[name].decoder(seq_len), steps) / self.shape.num_layers

    def prefill(self, name: str, num_tokens: int) -> float:
        """Seconds of one layer's prefill of one sequence."""
        return _median_seconds(lambda: self.caches[name].prefill(num_tokens), 1)

    def output(self, name: str, seq_len: int) -> list[float]:
        """The attention output of a decode step, flat."""
        return self.caches[name].decoder(seq_len)().float().flatten().tolist()


def _median_seconds(action: Callable[[], object], count: int) -> float:
    """Median wall time of `count` calls."""
    samples = []
    for _ in range(count):
        start = time.perf_counter()
        action()
        samples.append(time.perf_counter() - start)
    return sorted(samples)[len(samples) // 2]
