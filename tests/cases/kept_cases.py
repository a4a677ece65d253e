"""Steps of evicted and whole requests over three layers of one poisoned arena, and what they should answer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

import torch

from kvserve.attention.base import Answers, Batch, LayerSpec, NewRows, PagedAttention, Received, Stored
from kvserve.attention.reference import ReferenceAttention
from kvserve.codecs.base import Codec
from kvserve.codecs.registry import codec_content
from kvserve.codecs.tile import Tile
from kvserve.pages.kept import Kept, KeptRows, KeptTable, pages_per_block
from kvserve.pages.layout import PageLayout
from kvserve.pages.reference import decode_page, encode_page, hadamard
from kvserve.policies.base import Eviction, Policy
from tests.cases.attention_cases import POISON, make_batch, plain_logits, plain_softmax, random_sinks

NUM_LAYERS = 3
LAYERS = (0, 2)  # attended to; the middle layer's cells hold nothing but kept pages of the others
SPARE = 7  # columns behind all tokens
ABSURD = 1 << 30  # a block id that crashes whoever follows it


class Ask(NamedTuple):
    """One request: evicted at `end` (0: never), `computed` tokens stored before the step, `new` in it.

    `counts`: kept tokens by (layer of LAYERS, kv_head), cyclic; empty: all of them.
    """

    end: int
    computed: int
    new: int
    counts: tuple[int, ...] = ()


@dataclass
class KeptCase:
    layout: PageLayout
    spec: LayerSpec
    asks: list[Ask]
    arena: torch.Tensor  # uint8 [blocks, kv_heads, NUM_LAYERS, cell_bytes]
    batch: Batch
    full_table: torch.Tensor  # the block table with every id, stale ones included
    key: dict[int, list[torch.Tensor]]  # by layer, per request [computed + new, kv_heads, head_dim]
    value: dict[int, list[torch.Tensor]]
    query: dict[int, list[torch.Tensor]]  # [new, heads, head_dim]
    chosen: dict[tuple[int, int], list[torch.Tensor]]  # by (layer, request), per kv_head: positions kept
    kept_rows: dict[tuple[int, int], KeptRows]  # by (layer, request)
    first_pages: dict[tuple[int, int], list[int]]

    def run(
        self, attention: PagedAttention, layer: int, arena: torch.Tensor | None = None, batch: Batch | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and lse of one layer on a copy of the arena (or on `arena`, in place)."""
        arena = self.arena.clone() if arena is None else arena
        query = torch.cat(self.query[layer])
        output, lse = torch.full_like(query, torch.nan), torch.full(query.shape[:2], torch.nan)
        key, value = (self.new_rows(rows) for rows in (self.key[layer], self.value[layer]))
        attention.forward(NewRows(query, key, value), arena[:, :, layer], batch or self.batch, Answers(output, lse))
        return output, lse

    def received(
        self, attention: PagedAttention, layer: int, power: int, asked: list[int], batch: Batch | None = None
    ) -> dict[int, torch.Tensor]:
        """What the tokens of the requests `asked` received, on top of ones, and SPARE columns behind them.

        Args:
            batch: this case's, on the device to run on; None: on the CPU.
        """
        batch = batch or self.batch
        device, query = batch.seq_lens.device, torch.cat(self.query[layer])
        columns = {r: self.asks[r].computed + self.asks[r].new + SPARE for r in asked}
        sums = {r: torch.ones(self.spec.num_kv_heads, n, device=device) for r, n in columns.items()}
        key, value = (self.new_rows(rows).to(device) for rows in (self.key[layer], self.value[layer]))
        cells, query = self.arena.clone().to(device)[:, :, layer], query.to(device)
        answers = Answers(torch.empty_like(query))
        attention.forward(NewRows(query, key, value), cells, batch, answers, Received(power, sums))
        return {r: table.cpu() for r, table in sums.items()}

    def new_rows(self, rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([r[ask.computed :] for r, ask in zip(rows, self.asks, strict=True)])

    def alone(self, r: int) -> tuple[Batch, slice]:
        """The batch of request r by itself, and its query rows in the whole step."""
        ask, start = self.asks[r], sum(ask.new for ask in self.asks[:r])
        batch = make_batch(self.layout, [ask.computed], [ask.new], self.batch.block_table[r : r + 1])
        batch.kept = KeptTable.of([self.kept_of(r)]) if self.batch.kept is not None else None
        return batch, slice(start, start + ask.new)

    def kept_of(self, r: int) -> Kept:
        return self.batch.kept.of_request(r)

    def expected(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax over the decoded tokens each query should see, without any page table: output and lse, float64."""
        outputs, sums = [], []
        for r in range(len(self.asks)):
            heads = [self._expected_head(layer, r, kv_head) for kv_head in range(self.spec.num_kv_heads)]
            outputs.append(torch.cat([output for output, _ in heads], 1))
            sums.append(torch.cat([lse for _, lse in heads], 1))
        return torch.cat(outputs), torch.cat(sums)

    def _expected_head(self, layer: int, r: int, kv_head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One request's query heads of one KV head: [new, group, head_dim] and [new, group]."""
        layout, ask, group = self.layout, self.asks[r], self.spec.group
        sinks, size = layout.policy.sink_tokens, layout.tile_tokens
        reference = ReferenceAttention(layout, self.spec)
        rows = reference.stage(self.key[layer][r], self.value[layer][r])[:, kv_head]
        before, mass = [], torch.zeros((), dtype=torch.float64)
        if ask.end:
            keys, values, masses, runs = self.kept_rows[layer, r]
            both = torch.stack([keys[kv_head], reference._rotate(values[kv_head])], 1)
            before.append(coded(both, layout, runs[kv_head] if runs else ()))
            mass = mass if masses is None else masses[kv_head].double()
        tiles = []
        for start in range(ask.end, len(rows) // size * size, size):
            tile, skipped = rows[start : start + size], 0 if start else sinks
            decoded = decode_page(encode_page(tile[:, 0], tile[:, 1], layout, skipped), layout)
            tiles.append(torch.stack(decoded, 1)[skipped:])
        outputs, sums = [], []
        for p in range(ask.computed, len(rows)):
            full = p // size
            dense = rows[: sinks if full else 0], rows[full * size : p + 1]
            key, value = torch.cat([dense[0], *before, *tiles[: full - ask.end // size], dense[1]]).double().unbind(1)
            query = self.query[layer][r][p - ask.computed, kv_head * group : (kv_head + 1) * group].double()
            masses = torch.zeros(len(key), dtype=torch.float64)
            if before:
                masses[len(dense[0]) : len(dense[0]) + len(before[0])] += mass
            learned = None if self.spec.sink_logits is None else self.spec.sink_logits.view(-1, group)[kv_head]
            logits = plain_logits(query @ key.T * self.spec.scale, self.spec, masses)
            weights, lse = plain_softmax(logits, learned)
            outputs.append(weights @ value)
            sums.append(lse)
        output = torch.stack(outputs)
        if rotated(layout.policy):
            output = output @ hadamard(layout.head_dim).double()
        return output, torch.stack(sums)


def rotated(policy: Policy) -> bool:
    return policy.value is not None and policy.value.rotates


def coded(rows: torch.Tensor, layout: PageLayout, runs: tuple[int, ...] = ()) -> torch.Tensor:
    """Rows [tokens, 2, head_dim] through the codec, tile by tile, the last one filled up with its last token.

    Args:
        runs: how many of them are in each format; empty: all are in the first one.
    """
    parts = [torch.zeros(0, *rows.shape[1:])]
    for run, tile_format in zip(rows.split(list(runs or [len(rows)])), layout.formats, strict=False):
        for tile in run.split(layout.tile_tokens) if len(run) else ():
            filled = torch.cat([tile, tile[-1:].repeat(layout.tile_tokens - len(tile), 1, 1)])
            data = tile_format.encode_tile(Tile.of(filled[:, 0]), Tile.of(filled[:, 1]))
            parts.append(torch.stack(tile_format.decode_tile(data), 1)[: len(tile)])
    return torch.cat(parts)


def random_rows(count: int, heads: int, head_dim: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(count, heads, head_dim, generator=generator)


def grid_rows(count: int, heads: int, head_dim: int, generator: torch.Generator) -> torch.Tensor:
    """Four equidistant levels, both extremes in every 16 tokens of a channel and every 16 channels of a token.

    Every affine codec represents them exactly, in whatever groups they are.
    """
    levels = torch.randint(0, 4, (count, heads, head_dim), generator=generator)
    phase = (torch.arange(count)[:, None, None] + torch.arange(head_dim)) % 16
    levels = levels.masked_fill(phase == 0, 0).masked_fill(phase == 8, 3)
    return (levels - 1.5) * (85 / 256)


def build_kept_case(
    policy: Policy,
    asks: list[Ask],
    *,
    head_dim: int = 64,
    num_kv_heads: int = 2,
    group: int = 3,
    tiles_per_block: int = 1,
    model_dtype: torch.dtype = torch.float32,
    exact: bool = False,
    evict: bool = True,
    poison: int = POISON,
    mass: float | None = None,
    soft_cap: float | None = None,
    sinks: bool = False,
    draft_tokens: int = 0,
) -> KeptCase:
    """A step whose past, evictions included, the reference stored. The same arguments give the same rows.

    Args:
        exact: rows that the codec represents exactly.
        evict: False: every request keeps its tokens as they are.
        mass: pages have log-masses, those of kept tokens up to so much; None: pages have none.
        sinks: learned ones.
    """
    policy = policy if mass is None else with_masses(policy)
    generator = torch.Generator().manual_seed(1)
    layout = PageLayout.build(
        policy, head_dim, tiles_per_block * policy.tile_tokens, model_dtype, state_blocks=1, num_layers=NUM_LAYERS
    ).with_drafts(draft_tokens)
    learned = random_sinks(group * num_kv_heads) if sinks else None
    spec = LayerSpec(group * num_kv_heads, num_kv_heads, head_dim**-0.5, None, 0, soft_cap, learned)

    def rows(heads: int, coded: bool, counts: list[int]) -> dict[int, list[torch.Tensor]]:
        make = grid_rows if coded else random_rows
        return {i: [make(n, heads, head_dim, generator).to(model_dtype) for n in counts] for i in LAYERS}

    lengths = [ask.computed + ask.new for ask in asks]
    key, value = rows(num_kv_heads, exact, lengths), rows(num_kv_heads, exact, lengths)
    if not exact:  # per-channel offset and spread, as real keys have
        offset, spread = (torch.randn(num_kv_heads, head_dim, generator=generator) for _ in range(2))
        key = {i: [(k * (0.2 + spread.abs()) + offset).to(model_dtype) for k in key[i]] for i in LAYERS}
    query = rows(group * num_kv_heads, False, [ask.new for ask in asks])
    if exact and rotated(policy):
        value = {i: [v @ hadamard(head_dim) for v in per_layer] for i, per_layer in value.items()}
    asks = asks if evict else [ask._replace(end=0) for ask in asks]
    case = KeptCase(layout, spec, asks, *_empty(layout, num_kv_heads, asks, poison), key, value, query, {}, {}, {})
    _store_past(case, poison, mass)
    return case


def with_masses(policy: Policy) -> Policy:
    """A policy whose pages have log-masses."""
    eviction = Eviction(scorer="random", budget="uniform", retention="merge", rate=2)
    return policy.model_copy(update={"eviction": eviction})


def run_counts(layout: PageLayout, count: int) -> tuple[int, ...]:
    """How kept tokens are divided among formats: a third to each but the last."""
    others = len(layout.other_formats)
    return (count // 3,) * others + (count - count // 3 * others,)


def _pages(layout: PageLayout, count: int) -> int:
    return sum(layout.run_pages(n, number) for number, n in enumerate(run_counts(layout, count)))


def demoting(policy: Policy, key: Codec, value: Codec, **eviction: Any) -> Policy:
    """A policy that demotes to these codecs what it does not choose."""
    parts = {"scorer": "random", "budget": "uniform", "rate": 2} | eviction
    demote = {"name": "demote", "key": codec_content(key), "value": codec_content(value)}
    return Policy.model_validate(dict(policy) | {"eviction": Eviction(**parts, retention=demote)})


def _counts(ask: Ask, num_kv_heads: int, sinks: int) -> list[int]:
    """Kept tokens by (layer, kv_head) in that order."""
    owners = len(LAYERS) * num_kv_heads
    return [ask.counts[i % len(ask.counts)] if ask.counts else ask.end - sinks for i in range(owners)]


def _empty(
    layout: PageLayout, num_kv_heads: int, asks: list[Ask], poison: int
) -> tuple[torch.Tensor, Batch, torch.Tensor]:
    """The arena, the batch with its final rows, and the table with every id."""
    sinks = layout.policy.sink_tokens
    sizes, lengths = [], [ask.computed + ask.new for ask in asks]
    for ask in asks:
        pages = 1 + sum(_pages(layout, n) for n in _counts(ask, num_kv_heads, sinks))  # the first one stays unused
        sizes.append(ceil(pages / pages_per_block(layout, num_kv_heads, NUM_LAYERS)) if ask.end else 0)
    counts = [layout.blocks_for(n) for n in lengths]
    num_blocks = sum(counts) + sum(sizes) + 2
    ids = iter(torch.randperm(num_blocks, generator=torch.Generator().manual_seed(2)).tolist())
    kept = [Kept(ask.end, tuple(itertools.islice(ids, n))) for ask, n in zip(asks, sizes, strict=True)]
    full = torch.full((len(asks), max(counts) + 3), ABSURD, dtype=torch.int32)
    for row, count in zip(full, counts, strict=True):
        row[:count] = torch.tensor([next(ids) for _ in range(count)])
    table = full.clone()
    for row, ask in zip(table, asks, strict=True):
        if not ask.end:
            row[0] = ABSURD
        for tile_block in range(ask.end // layout.block_size):
            row[layout.tile_row(tile_block)] = ABSURD
    batch = make_batch(layout, [a.computed for a in asks], [a.new for a in asks], table[:, :-3])
    if any(ask.end for ask in asks):
        batch.kept = KeptTable.of(kept)
    shape = (num_blocks, num_kv_heads, NUM_LAYERS, layout.cell_bytes)
    return torch.full(shape, poison, dtype=torch.uint8), batch, full[:, :-3]


def _store_past(case: KeptCase, poison: int, mass: float | None) -> None:
    """Tokens before `end`, the eviction, and then the tokens up to `computed`."""
    reference, asks = ReferenceAttention(case.layout, case.spec), case.asks
    first = [ask.end or ask.computed for ask in asks]
    before = make_batch(case.layout, [0] * len(asks), first, case.full_table)
    after = make_batch(
        case.layout, first, [ask.computed - n for ask, n in zip(asks, first, strict=True)], case.batch.block_table
    )
    after.kept = case.batch.kept
    for layer in LAYERS:
        cells = case.arena[:, :, layer]
        key, value = (
            torch.cat([x[:n] for x, n in zip(rows[layer], first, strict=True)]) for rows in (case.key, case.value)
        )
        reference.store(key, value, cells, before)
    for r, ask in enumerate(asks):
        if ask.end:
            _choose(case, reference, r)
            if mass is not None:
                _weigh(case, r, mass)
    stale = case.full_table[(case.batch.block_table == ABSURD) & (case.full_table != ABSURD)]
    case.arena[stale.long()] = poison
    for layer in LAYERS:
        for r, ask in enumerate(asks):
            if ask.end:
                write_kept(case, reference, layer, r, case.arena)
        later = (
            torch.cat([x[n : ask.computed] for x, n, ask in zip(rows[layer], first, asks, strict=True)])
            for rows in (case.key, case.value)
        )
        reference.store(*later, case.arena[:, :, layer], after)


def _choose(case: KeptCase, reference: ReferenceAttention, r: int) -> None:
    """Draws what each (layer, head) of request r keeps, reads it, and deals out its pages in a mixed order."""
    generator = torch.Generator().manual_seed(10 + r)
    ask, heads, sinks = case.asks[r], case.spec.num_kv_heads, case.layout.policy.sink_tokens
    counts = _counts(ask, heads, sinks)
    first_pages, page = [0] * len(counts), 1
    for owner in torch.randperm(len(counts), generator=generator).tolist():
        first_pages[owner] = page
        page += _pages(case.layout, counts[owner])
    for i, layer in enumerate(LAYERS):
        mine = slice(i * heads, (i + 1) * heads)
        key, value = reference.read(Stored(case.arena[:, :, layer], case.full_table[r], ask.end), 0, ask.end)
        runs = [run_counts(case.layout, min(count, ask.end - sinks)) for count in counts[mine]]
        chosen = []
        for of_head in runs:
            drawn = sinks + torch.randperm(ask.end - sinks, generator=generator)[: sum(of_head)]
            chosen.append(torch.cat([run.sort().values for run in drawn.split(list(of_head))]))
        case.chosen[layer, r], case.first_pages[layer, r] = chosen, first_pages[mine]
        case.kept_rows[layer, r] = KeptRows(
            *([rows[h][index] for h, index in enumerate(chosen)] for rows in (key, value)),
            runs=runs if case.layout.other_formats else None,
        )


def _weigh(case: KeptCase, r: int, mass: float) -> None:
    generator = torch.Generator().manual_seed(20 + r)
    for layer in LAYERS:
        rows = case.kept_rows[layer, r]
        masses = [mass * torch.rand(len(head), generator=generator) for head in rows.keys]
        case.kept_rows[layer, r] = rows._replace(log_mass=masses)


def write_kept(case: KeptCase, attention: PagedAttention, layer: int, r: int, arena: torch.Tensor) -> None:
    """The kept pages and headers of request r in one layer."""
    attention.write_kept(
        arena[:, :, layer],
        int(case.batch.block_table[r, 0]),
        case.kept_of(r),
        case.first_pages[layer, r],
        case.kept_rows[layer, r],
    )
