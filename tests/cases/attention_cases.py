"""Random steps of one attention layer over a poisoned arena, shared by the kernel tests."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from kvserve.attention.base import Answers, Batch, LayerSpec, NewRows, PagedAttention
from kvserve.attention.reference import ReferenceAttention
from kvserve.codecs.affine import Affine
from kvserve.codecs.layer_tables import LayerTables
from kvserve.codecs.symmetric import Symmetric
from kvserve.codecs.tile import Half
from kvserve.pages.layout import PageLayout
from kvserve.policies.base import Policy
from tests.cases.codec_cases import codec_of, random_layer_tables

NUM_LAYERS = 2  # cells of another layer lie between this layer's, as in vLLM's BHLNC layout
POISON = 0xFF  # a NaN in every dtype


def make_policy(family: str, tile_tokens: int = 64, sink_tokens: int = 4) -> Policy:
    """One policy of each codec family: int8, kivi-4, kivi-2, boosted, dense-pages; dense is the one without pages.

    "key+value" names two codecs of codec_cases.py.
    """
    if family == "dense":
        return Policy(name="dense", summary="dense", tile_tokens=tile_tokens)
    if family == "dense-pages":
        return Policy(name=family, summary="", tile_tokens=tile_tokens, sink_tokens=sink_tokens, dense_pages=True)
    if "+" in family:
        names = dict(zip(Half, family.split("+"), strict=True))
        codecs = {str(half): codec_of(half, name) for half, name in names.items()}
        return Policy(name="pair", summary=family, tile_tokens=tile_tokens, sink_tokens=sink_tokens, **codecs)
    key, value = {
        "int8": (Affine(bits=8, group_size=64), Affine(bits=8)),
        "kivi-4": (Affine(bits=4, group_size=64), Affine(bits=4, group_size=64)),
        "kivi-2": (Affine(bits=2, group_size=32), Affine(bits=2, group_size=64)),
        "boosted": (Affine(bits=2, group_size=64, boost_fraction=0.25), Symmetric(bits=2)),
    }[family]
    return Policy(name=family, summary=family, tile_tokens=tile_tokens, sink_tokens=sink_tokens, key=key, value=value)


@dataclass
class Case:
    """One step: the arena holds `computed` tokens of each request, and key/value/query are the step's new rows."""

    layout: PageLayout
    spec: LayerSpec
    batch: Batch
    cells: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    past_key: list[torch.Tensor]  # per request, [computed, num_kv_heads, head_dim]
    past_value: list[torch.Tensor]
    tables: LayerTables  # of the codecs, random

    @property
    def reference(self) -> ReferenceAttention:
        return ReferenceAttention(self.layout, self.spec, self.tables)

    def run(self, attention: PagedAttention, cells: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and lse of `attention` on a copy of the arena (or on `cells`, in place)."""
        output = torch.full_like(self.query, torch.nan)
        lse = torch.full(self.query.shape[:2], torch.nan)
        cells = copy_cells(self.cells) if cells is None else cells
        attention.forward(NewRows(self.query, self.key, self.value), cells, self.batch, Answers(output, lse))
        return output, lse


def random_sinks(num_heads: int) -> torch.Tensor:
    """Learned sinks from far below to above what random rows' logits are, float32 [num_heads]."""
    return torch.linspace(-6, 5, num_heads)[torch.randperm(num_heads, generator=torch.Generator().manual_seed(3))]


def plain_logits(logits: torch.Tensor, spec: LayerSpec, masses: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Scaled logits as the layer counts them, by the definition."""
    if spec.soft_cap is not None:
        logits = spec.soft_cap * (1 - 2 / ((2 * logits / spec.soft_cap).exp() + 1))
    return logits + masses


def plain_softmax(logits: torch.Tensor, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of logits [heads, n] beside learned sinks [heads], and the log of the denominators, float64."""
    weights = logits.double().exp()
    total = weights.sum(-1) + (0.0 if sinks is None else sinks.double().exp())
    return weights / total[:, None], total.log()


def copy_cells(cells: torch.Tensor) -> torch.Tensor:
    """A copy of a layer's arena with the same strides, poisoned between its cells."""
    size = cells.untyped_storage().nbytes()
    storage = torch.full((size,), POISON, dtype=torch.uint8)
    copy = storage.as_strided(cells.shape, cells.stride(), cells.storage_offset())
    return copy.copy_(cells)


def poisoned_cells(layout: PageLayout, num_blocks: int, num_kv_heads: int) -> torch.Tensor:
    """One layer of an arena whose every byte is poison, uint8 [num_blocks, num_kv_heads, cell_bytes]."""
    arena = torch.full((num_blocks, num_kv_heads, NUM_LAYERS, layout.cell_bytes), POISON, dtype=torch.uint8)
    return arena[:, :, 1]


def make_batch(layout: PageLayout, computed: list[int], new_tokens: list[int], table: torch.Tensor) -> Batch:
    """Batch of requests that have `computed` tokens stored and bring `new_tokens`."""
    starts = torch.tensor([0, *accumulate(new_tokens)], dtype=torch.int32)
    lengths = torch.tensor([c + n for c, n in zip(computed, new_tokens, strict=True)], dtype=torch.int32)
    return Batch(starts, lengths, table)


def make_table(layout: PageLayout, lengths: list[int], generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """Shuffled block ids, int32 [requests, width] as a view of a wider table; unused entries are an absurd id."""
    counts = [layout.blocks_for(length) for length in lengths]
    width = max(counts)
    wide = torch.full((len(lengths), width + 3), 1 << 30, dtype=torch.int32)
    ids = torch.randperm(sum(counts) + 2, generator=generator).int()
    for row, (start, count) in enumerate(zip(accumulate([0, *counts[:-1]]), counts, strict=True)):
        wide[row, :count] = ids[start : start + count]
    return wide[:, :width], sum(counts) + 2


def build_case(
    policy: Policy,
    *,
    computed: list[int],
    new_tokens: list[int],
    head_dim: int = 64,
    num_kv_heads: int = 2,
    group: int = 3,
    tiles_per_block: int = 1,
    sliding_window: int | None = None,
    model_dtype: torch.dtype = torch.float32,
    block_size: int | None = None,
    soft_cap: float | None = None,
    sinks: bool = False,
    draft_tokens: int = 0,
    seed: int = 0,
) -> Case:
    """A step with `computed[r]` stored and `new_tokens[r]` new tokens of request r; unit-scale random rows.

    Keys have a per-channel offset and spread, as real ones do. `block_size` overrides the dense policy's 16. `sinks`:
    learned ones.
    """
    generator = torch.Generator().manual_seed(seed)
    sealed_block_size = tiles_per_block * policy.tile_tokens
    layout = PageLayout.build(
        policy, head_dim, sealed_block_size if policy.has_pages else (block_size or 16), model_dtype, query_group=group,
        num_layers=NUM_LAYERS,
    ).with_drafts(draft_tokens)  # fmt: skip
    num_heads = group * num_kv_heads
    learned = random_sinks(num_heads) if sinks else None
    spec = LayerSpec(num_heads, num_kv_heads, head_dim**-0.5, sliding_window, 0, soft_cap, learned)
    tables = random_layer_tables(layout.tile_format, num_kv_heads)
    lengths = [c + n for c, n in zip(computed, new_tokens, strict=True)]
    table, num_blocks = make_table(layout, lengths, generator)
    cells = poisoned_cells(layout, num_blocks, num_kv_heads)

    def rows(count: int, heads: int) -> torch.Tensor:
        return torch.randn(count, heads, head_dim, generator=generator)

    offset, spread = torch.randn(num_kv_heads, head_dim, generator=generator), 0.2 + rows(1, num_kv_heads)[0].abs()

    def keys(count: int) -> torch.Tensor:
        return (rows(count, num_kv_heads) * spread + offset).to(model_dtype)

    past_key, past_value = [keys(c) for c in computed], [rows(c, num_kv_heads).to(model_dtype) for c in computed]
    if sum(computed):
        past = make_batch(layout, [0] * len(computed), computed, table)
        ReferenceAttention(layout, spec, tables).store(torch.cat(past_key), torch.cat(past_value), cells, past)
    total = sum(new_tokens)
    return Case(
        layout=layout,
        spec=spec,
        batch=make_batch(layout, computed, new_tokens, table),
        cells=cells,
        query=rows(total, spec.num_heads).to(model_dtype),
        key=keys(total),
        value=rows(total, num_kv_heads).to(model_dtype),
        past_key=past_key,
        past_value=past_value,
        tables=tables,
    )
