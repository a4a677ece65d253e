"""What can go wrong between a layer's rows and its answer: each kind breaks one layer of a Machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from kvserve.attention.base import Answers, LayerSpec, NewRows
from kvserve.attention.native import NativeAttention
from kvserve.codecs.tile import Half
from kvserve.pages.kept import HEADER_BYTES
from kvserve.pages.layout import PageLayout
from kvserve.pages.reference import hadamard
from kvserve.policies.base import Policy
from kvserve.scorers.rotary import Rotary
from tests.cases.attention_cases import copy_cells
from tests.cases.doctor_cases import DAMAGED_LAYER, GROUP, HEAD_DIM, Damage, Machine, Request, Step

NAN = 0x7E  # the high byte of a float16 NaN
TILE, HEAD = 1, 0  # the damaged page


@dataclass
class InArena(Damage):
    """Changes what is stored, once, when the second request's prompt is there."""

    change: Callable[[Machine, Request], None]

    def stored(self, machine: Machine, request: Request) -> None:
        if request.name == "second" and request.num_tokens == request.prompt_len:
            self.change(machine, request)


@dataclass
class Before(Damage):
    """Changes what the kernels are given, at every step."""

    change: Callable[[Step], None]

    def before(self, step: Step) -> None:
        self.change(step)


@dataclass
class After(Damage):
    """Changes what the kernels answered, at every step."""

    change: Callable[[Step], None]

    def after(self, step: Step) -> None:
        self.change(step)


# -- stored pages ---------------------------------------------------------------------------------------------------


def page(machine: Machine, request: Request, tile: int = TILE, head: int = HEAD, layer: int = DAMAGED_LAYER):
    """The bytes of one sealed page, writable."""
    layout = machine.layout
    return machine.arena[request.row[layout.tile_row(tile)], head, layer, : layout.tile_format.tile_bytes]


def section(name: str, change: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype = torch.uint8) -> Damage:
    """Changes one section of the page ("key_codes"): `change` gets its elements and returns them damaged."""
    half, _, own = name.partition("_")

    def apply(machine: Machine, request: Request) -> None:
        _, places = machine.layout.tile_format.half(Half(half))
        (place,) = [place for place in places if place.section.name == own]
        part = page(machine, request)[place.offset :][: place.section.size_bytes]
        part[:] = change(part.clone().view(dtype)).contiguous().view(torch.uint8)

    return InArena(apply)


def key_scales(change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """`change` gets float16 [groups, (scale, min), head_dim]."""
    return section("key_scales", lambda part: change(part.view(-1, 2, HEAD_DIM)).flatten(), torch.float16)


def value_scales(change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """`change` gets float16 [groups, (scale, min), tokens]."""
    return section("value_scales", lambda part: change(part.view(-1, 2, 64)).flatten(), torch.float16)


def without(index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda scales: scales.index_fill(1, torch.tensor([index]), 0)


def swapped(pair: torch.Tensor) -> torch.Tensor:
    """The first two of the last dim exchanged."""
    return pair.index_select(-1, torch.tensor([1, 0, *range(2, pair.shape[-1])]))


def exchange(first: torch.Tensor, second: torch.Tensor) -> None:
    first[:], second[:] = second.clone(), first.clone()


def blocks_of(machine: Machine, request: Request, first: int, count: int) -> torch.Tensor:
    """Cells of consecutive blocks of the row in the damaged layer, all heads; a copy."""
    return torch.tensor(request.row[first : first + count])


def zero_blocks(first: Callable[[Machine], int], count: Callable[[Machine], int]) -> Damage:
    def apply(machine: Machine, request: Request) -> None:
        machine.arena[blocks_of(machine, request, first(machine), count(machine)), :, DAMAGED_LAYER] = 0

    return InArena(apply)


def header(change: Callable[[list[int]], list[int]]) -> Damage:
    """Changes the header of the first KV head's kept pages, the numbers of a `Header`."""

    def apply(machine: Machine, request: Request) -> None:
        data = machine.arena[request.row[0], HEAD, DAMAGED_LAYER, :HEADER_BYTES]
        data[:] = torch.tensor(change(data.clone().view(torch.int32).tolist()), dtype=torch.int32).view(torch.uint8)

    return InArena(apply)


def exchange_headers(machine: Machine, request: Request) -> None:
    exchange(*(machine.arena[request.row[0], head, DAMAGED_LAYER, :HEADER_BYTES] for head in (0, 1)))


# -- what kernels are given, and what they answer -------------------------------------------------------------------


def decodes(change: Callable[[Step], None]) -> Callable[[Step], None]:
    """Only in steps of one token."""
    return lambda step: change(step) if len(step.query) == 1 else None


def moved_keys(step: Step) -> None:
    """Keys as if every token stood one position later."""
    rotary = Rotary(1e4 ** -(torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2)))
    step.key = rotary.rotate(step.key.transpose(0, 1), torch.ones(len(step.key))).transpose(0, 1).contiguous()


def shorter(step: Step) -> None:
    step.batch = replace(step.batch, seq_lens=step.batch.seq_lens - 1)


def shifted_table(step: Step) -> None:
    """Every block of the row is the one behind it, but for the request's own."""
    first = step.attention.layout.private_blocks
    row = step.batch.block_table[0]
    table = torch.cat([row[:first], row[first:].roll(-1)])[None].contiguous()
    step.batch = replace(step.batch, block_table=table)


def shifted_table_of_a_head(step: Step) -> None:
    """One head reads the second block for the first, the third one for the second."""
    row = step.batch.block_table[0]
    batch = replace(step.batch, block_table=torch.cat([row[1:3], row[2:]])[None].contiguous())
    output = torch.zeros_like(step.output)
    step.attention.forward(NewRows(step.query, step.key, step.value), copy_cells(step.cells), batch, Answers(output))
    step.output[:, :GROUP] = output[:, :GROUP]


def with_spec(**changes: float | None) -> Callable[[Step], None]:
    def apply(step: Step) -> None:
        spec: LayerSpec = replace(step.attention.spec, **changes)
        step.attention = NativeAttention(step.attention.layout, spec)

    return apply


def not_causal(step: Step) -> None:
    """Every query of a request's first chunk sees the whole chunk."""
    if int(step.batch.seq_lens[0]) != len(step.query):
        return
    key, value = (rows.repeat_interleave(GROUP, 1).transpose(0, 1) for rows in (step.key, step.value))
    scores = step.query.transpose(0, 1) @ key.transpose(1, 2) * step.attention.spec.scale
    step.output[:] = (scores.softmax(-1) @ value).transpose(0, 1)


def heads_flipped(step: Step) -> None:
    step.key, step.value = step.key.flip(1), step.value.flip(1)


def keys_for_values(step: Step) -> None:
    step.key, step.value = step.value, step.key


def output_flipped(step: Step) -> None:
    step.output[:] = step.output.flip(1)


def not_rotated_back(step: Step) -> None:
    step.output[:] = step.output @ hadamard(HEAD_DIM)


def dense_part_ignored(step: Step) -> None:
    """A merge of partial softmaxes that drops the newest, dense tokens: the answer of the sealed pages alone."""
    history = step.history
    mask = torch.ones(len(step.query), history.sealed.shape[1], dtype=torch.bool)
    step.output[:] = history._rotate(history._attend(step.query, history.sealed, [mask]))


def later_end(step: Step) -> None:
    if step.batch.kept:
        kept = step.batch.kept
        step.batch = replace(step.batch, kept=kept._replace(ends=kept.ends - 64))


# Name: (policy, damage).
DAMAGES: dict[str, tuple[str, Damage]] = {
    "key scales swapped between two channels": ("kivi-2bit", key_scales(swapped)),
    "key scales shifted by a channel": ("boost-2bit", key_scales(lambda scales: scales.roll(1, -1))),
    "value scales swapped between two tokens": ("kivi-2bit", value_scales(swapped)),
    "value scales shifted by a token": ("int8", value_scales(lambda scales: scales.roll(1, -1))),
    "key minima zeroed": ("kivi-4bit", key_scales(without(1))),
    "value minima zeroed": ("kivi-2bit", value_scales(without(1))),
    "key scales zeroed": ("kivi-2bit", key_scales(without(0))),
    "key codes shifted by a nibble": ("kivi-4bit", section("key_codes", lambda codes: codes << 4 | codes >> 4)),
    "value codes shifted by a byte": ("boost-2bit", section("value_codes", lambda codes: codes.roll(1))),
    "a bit flipped in every value code byte": ("kivi-2bit", section("value_codes", lambda codes: codes ^ 2)),
    "boosted channels off by one": ("boost-2bit", section("key_boost_index", lambda index: index.roll(1))),
    "NaN in a used page": ("int8", section("value_scales", lambda part: part.fill_(NAN))),
    "a page that was never written": ("int8", InArena(lambda m, r: page(m, r).zero_())),
    "a stale page of other tokens": ("int8", InArena(lambda m, r: page(m, r).copy_(page(m, r, TILE + 1)))),
    "pages of two heads exchanged": ("int8", InArena(lambda m, r: exchange(page(m, r), page(m, r, head=1)))),
    "a page of another layer": ("int8", InArena(lambda m, r: page(m, r).copy_(page(m, r, layer=0)))),
    "tail tokens lost": (
        "kivi-2bit", zero_blocks(lambda m: m.layout.state_blocks, lambda m: m.layout.tail_blocks),
    ),
    "sinks lost": ("kivi-2bit", zero_blocks(lambda m: m.layout.tile_row(0) + 1, lambda m: m.layout.sink_blocks)),
    "block table shifted by a block": ("kivi-4bit", Before(shifted_table)),
    "one head's block table shifted by a block": ("none", After(decodes(shifted_table_of_a_head))),
    "KV heads exchanged": ("boost-2bit", Before(heads_flipped)),
    "query heads exchanged": ("none", After(output_flipped)),
    "keys and values exchanged": ("int8", Before(keys_for_values)),
    "keys of another position": ("int8", Before(moved_keys)),
    "keys of another position while decoding": ("kivi-2bit", Before(decodes(moved_keys))),
    "sequence length off by one": ("int8", Before(decodes(shorter))),
    "softmax scale 10 % too large": ("boost-2bit", Before(with_spec(scale=1.1 * HEAD_DIM**-0.5))),
    "logits not capped": ("int8", Before(with_spec(soft_cap=None))),
    "learned sinks left out": ("kivi-2bit", Before(with_spec(sink_logits=None))),
    "mask not causal": ("none", After(not_causal)),
    "a sliding window that the model lacks": ("int8", Before(with_spec(sliding_window=100))),
    "values not rotated back": ("boost-2bit", After(not_rotated_back)),
    "a part ignored when partial softmaxes are merged": ("kivi-4bit", After(decodes(dense_part_ignored))),
    "kept pages off by one": ("kv-compress-2bit", header(lambda h: [*h[:3], h[3] + 1, *h[4:]])),
    "kept tokens off by one": ("kv-compress", header(lambda h: [*h[:4], h[4] - 1, *h[5:]])),
    "kept pages of two heads exchanged": ("kv-compress-2bit", InArena(exchange_headers)),
    "an evicted request's cut a tile too early": ("kv-compress", Before(later_end)),
}  # fmt: skip
# What the layers of a Machine need, for the damage of this name to be one.
LAYERS_OF = {"logits not capped": {"soft_cap": 1.0}, "learned sinks left out": {"sinks": True}}


def shifted_sections(policy: Policy) -> dict[str, Damage]:
    """For each section of a page, the damage that moves its elements on by one."""
    tile_format = PageLayout.build(policy, HEAD_DIM, policy.tile_tokens, torch.float32, num_layers=2).tile_format
    return {
        name: section(name, lambda part: part.roll(1), place.section.dtype)
        for half in Half
        for place in tile_format.half(half)[1]
        for name in (f"{half}_{place.section.name}",)
    }


def tables_of_another_head(step: Step) -> None:
    """Every KV head reads the calibrated tables of the one before it."""
    tables = {name: table.roll(1, 0) for name, table in step.attention.tables.items() if not name.endswith(".rotary")}
    step.attention = NativeAttention(step.attention.layout, step.attention.spec, tables=step.attention.tables | tables)
