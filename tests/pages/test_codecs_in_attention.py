"""Reference attention and the probe's history over pages of every codec, against dense attention over stored rows."""

from __future__ import annotations

import pytest
import torch

from kvserve.attention.base import Answers, LayerSpec, NewRows, Stored
from kvserve.attention.reference import ReferenceAttention
from kvserve.codecs.tile import Half, Tile, TileShape
from kvserve.pages.kept import Kept, KeptRows
from kvserve.pages.layout import PageLayout
from kvserve.pages.reference import hadamard
from kvserve.policies.base import Policy
from kvserve.probe.history import LayerHistory
from tests.cases.attention_cases import make_batch, make_table, poisoned_cells
from tests.cases.codec_cases import CASES, KEYS, VALUES, codec_of, random_tables

HEADS, GROUP, HEAD_DIM, TILE, SINKS = 2, 2, 64, 64, 4
SPEC = LayerSpec(HEADS * GROUP, HEADS, HEAD_DIM**-0.5)
PROMPT, LENGTH = 190, 195  # decoding seals the third tile


def policy_of(key: str, value: str) -> Policy:
    return Policy(name="p", summary="", sink_tokens=SINKS, key=KEYS[key], value=VALUES[value])


def rows_of(num_tokens: int, heads: int, seed: int) -> torch.Tensor:
    """Float32 rows that float16 has exactly, [num_tokens, heads, HEAD_DIM]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, heads, HEAD_DIM, generator=generator).half().float()


def layer_tables(policy: Policy, rows: dict[Half, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tables of a layer: those of KV heads differ, and shared ones are the first head's."""
    tables: dict[str, torch.Tensor] = {}
    for half, codec in policy.codecs:
        shape = TileShape(half, TILE, HEAD_DIM)
        own = [random_tables(codec, shape, rows[half][:, head], seed=head) for head in range(HEADS)]
        for name, spec in codec.tables(shape).items():
            each = [tables_of_head[name] for tables_of_head in own]
            tables[f"{half}.{name}"] = torch.stack(each) if "kv_heads" in spec.axes else each[0]
    return tables


def stored(policy: Policy, half: Half, rows: torch.Tensor, head: int, tables: dict[str, torch.Tensor]) -> torch.Tensor:
    """One KV head's rows as the last query finds them: whole tiles as their codec leaves them, except sinks."""
    codec, sinks = dict(policy.codecs)[half], policy.sink_tokens
    shape, found = TileShape(half, TILE, HEAD_DIM), rows.clone()
    own = {
        name: tables[f"{half}.{name}"][head] if "kv_heads" in spec.axes else tables[f"{half}.{name}"]
        for name, spec in codec.tables(shape).items()
    }
    for first in range(0, len(rows) // TILE * TILE, TILE):
        tile = Tile.of(rows[first : first + TILE], sinks if first == 0 else 0, first)
        found[first : first + TILE] = codec.decode(codec.encode(tile, shape, own), shape, own, tile.positions)
    found[:sinks] = rows[:sinks]
    return found


@pytest.mark.parametrize(
    ("key", "value"),
    [(name, "affine") for half, name in CASES if half is Half.KEY]
    + [("affine", name) for half, name in CASES if half is Half.VALUE],
)
def test_attention_over_pages_of_any_codec_is_attention_over_the_rows_they_hold(key: str, value: str):
    policy = policy_of(key, value)
    layout = PageLayout.build(policy, HEAD_DIM, TILE, torch.float32)
    query, keys, values = rows_of(LENGTH, SPEC.num_heads, 1), rows_of(LENGTH, HEADS, 2), rows_of(LENGTH, HEADS, 3)
    turned = (values @ hadamard(HEAD_DIM)).half().float() if layout.rotates else values
    tables = layer_tables(policy, {Half.KEY: keys, Half.VALUE: turned})
    attention, history = ReferenceAttention(layout, SPEC, tables), LayerHistory(layout, SPEC, tables)
    table, num_blocks = make_table(layout, [LENGTH], torch.Generator().manual_seed(0))
    cells = poisoned_cells(layout, num_blocks, HEADS)
    for first, last in ((0, PROMPT), *((t, t + 1) for t in range(PROMPT, LENGTH))):
        new, batch = slice(first, last), make_batch(layout, [first], [last - first], table)
        output = torch.empty_like(query[new])
        attention.forward(NewRows(query[new], keys[new], values[new]), cells, batch, Answers(output))
        history.append(keys[new], values[new])
    expected = torch.empty(SPEC.num_heads, HEAD_DIM)
    for head in range(SPEC.num_heads):
        k = stored(policy, Half.KEY, keys[:, head // GROUP], head // GROUP, tables)
        v = stored(policy, Half.VALUE, turned[:, head // GROUP], head // GROUP, tables)
        answer = (k @ query[-1, head] * SPEC.scale).softmax(0) @ v
        expected[head] = answer @ hadamard(HEAD_DIM) if layout.rotates else answer
    assert torch.allclose(output[-1], expected, atol=2e-5)
    assert torch.allclose(history.expected(query[-1:])[0], expected, atol=2e-5)
    read_keys, _ = attention.read(Stored(cells, table[0], LENGTH), 0, LENGTH)
    assert torch.allclose(read_keys[1], stored(policy, Half.KEY, keys[:, 1], 1, tables), atol=1e-6)


@pytest.mark.parametrize(("half", "name"), [c for c in CASES if not codec_of(*c).needs_positions])
def test_kept_pages_of_any_codec_hold_what_it_leaves_of_the_rows(half: Half, name: str):
    policy = policy_of(name, "affine") if half is Half.KEY else policy_of("affine", name)
    layout = PageLayout.build(policy, HEAD_DIM, TILE, torch.float32, state_blocks=1)
    keys, values = rows_of(TILE, HEADS, 2), rows_of(TILE, HEADS, 3)
    turned = values @ hadamard(HEAD_DIM) if layout.rotates else values
    tables = layer_tables(policy, {Half.KEY: keys, Half.VALUE: turned})
    attention = ReferenceAttention(layout, SPEC, tables)
    cells, kept = poisoned_cells(layout, 6, HEADS), Kept(2 * TILE, (4, 5))
    attention.write_kept(cells, 0, kept, [0, 1], KeptRows(keys.unbind(1), values.unbind(1)))
    found_keys, found_values, *_ = attention.read_kept(cells, 0, kept)
    policy = policy.model_copy(update={"sink_tokens": 0})
    for head in range(HEADS):
        key = stored(policy, Half.KEY, keys[:, head], head, tables)
        value = stored(policy, Half.VALUE, turned[:, head], head, tables)
        assert torch.allclose(found_keys[head], key, atol=1e-6)
        assert torch.allclose(found_values[head], value @ hadamard(HEAD_DIM) if layout.rotates else value, atol=1e-5)


def test_attention_without_the_tables_of_its_codecs_is_refused():
    layout = PageLayout.build(policy_of("table-3", "affine"), HEAD_DIM, TILE, torch.float32)
    with pytest.raises(ValueError, match=r"need a table key\.table\.levels"):
        ReferenceAttention(layout, SPEC)
