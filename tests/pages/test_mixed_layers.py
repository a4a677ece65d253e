"""Layers with codecs of their own: whose bytes are whose in the one arena that vLLM allocates, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.attention.base import Answers, LayerSpec, NewRows
from kvserve.attention.reference import ReferenceAttention
from kvserve.attention.registry import make_attention
from kvserve.checks import check_model
from kvserve.errors import PolicyError, UnsupportedError
from kvserve.pages.kept import num_layers_of
from kvserve.pages.layout import MixedLayout, PageLayout
from kvserve.policies.base import Policy
from kvserve.policies.loading import load_policy, policy_content, policy_from_config
from tests.accounting.test_manager import Simulation
from tests.cases.attention_cases import POISON, make_batch

CODECS = ["dense", "int8", "kivi-4bit", "kivi-2bit", "boost-2bit"]


def mixed_policy(layers: dict[int, str], base: str = "kivi-2bit") -> Policy:
    return policy_from_config({"policy": base, "set": {"layers": layers}})


def mixed(layers: dict[int, str], num_layers: int, base: str = "kivi-2bit", **sizes: int) -> MixedLayout:
    sizes = {"head_dim": 64, "block_size": 64} | sizes
    built = PageLayout.build(mixed_policy(layers, base), **sizes, model_dtype=torch.float32, num_layers=num_layers)
    assert isinstance(built, MixedLayout)
    return built


def arena_views(layout: MixedLayout, num_blocks: int, num_kv_heads: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A poisoned arena in vLLM's BHLNC layout, and what vLLM hands to each layer."""
    arena = torch.full((num_blocks, num_kv_heads, len(layout.layers), layout.cell_bytes), POISON, dtype=torch.uint8)
    return arena, [arena[:, :, layer].unflatten(-1, (layout.block_size, -1)) for layer in range(len(layout.layers))]


@given(
    codecs=st.lists(st.sampled_from(CODECS), min_size=1, max_size=6), base=st.sampled_from(CODECS),
    head_dim=st.sampled_from([64, 96, 128, 256]), block_size=st.sampled_from([64, 128]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_byte_of_the_arena_belongs_to_one_layer_at_most(codecs, base, head_dim, block_size) -> None:
    layout = mixed(dict(enumerate(codecs)), len(codecs) + 1, base, head_dim=head_dim, block_size=block_size)
    arena, views = arena_views(layout, 3, 2)
    owners = torch.zeros(arena.numel(), dtype=torch.int32)
    for layer, view in enumerate(views):
        assert num_layers_of(view, layout) == (len(views), layer)
        cells = layout.cells_of(view, layer)
        plain = PageLayout.build(load_policy((*codecs, base)[layer]), head_dim, block_size, torch.float32)
        assert cells.shape == (3, 2, plain.cell_bytes) and cells.storage_offset() % 64 == 0
        owners.as_strided(cells.shape, cells.stride(), cells.storage_offset()).add_(1)
    unused = arena.numel() - int(owners.sum())
    assert int(owners.max()) == 1
    assert 0 <= unused < 3 * 2 * len(views) * block_size


def test_all_layers_read_the_same_row_of_blocks() -> None:
    """As many blocks for the unfinished tile as 2-bit cells take, in every layer."""
    layout = mixed({0: "dense", 1: "int8"}, 3)
    alone = PageLayout.build(load_policy("kivi-2bit"), 64, 64, torch.float32)
    for length in range(0, 1000, 7):
        assert {layer.blocks_for(length) for layer in layout.layers} == {layout.blocks_for(length)}
        assert layout.blocks_for(length) == alone.blocks_for(length)
    assert {layer.tile_row(5) for layer in layout.layers} == {layout.tile_row(5)}
    assert layout.layers[0].tail_blocks == alone.tail_blocks > 1


@pytest.mark.parametrize(
    ("base", "kind"),
    [("kivi-2bit", "native"), ("dense", "native"), pytest.param("kivi-2bit", "triton", marks=pytest.mark.slow)],
)
def test_each_layer_attends_in_the_shared_arena_as_the_reference_does_in_its_own(base: str, kind: str) -> None:
    """Prefill in two chunks and decode, layer after layer in every step."""
    if kind == "triton":
        pytest.importorskip("triton")
    layout = mixed({0: "dense", 1: "boost-2bit", -1: "int8"}, 4, base)
    spec, total = LayerSpec(4, 2, 0.125), 205
    generator = torch.Generator().manual_seed(0)
    arena, views = arena_views(layout, layout.blocks_for(total) + 2, 2)
    row = torch.randperm(len(arena), generator=generator).int()[None, : layout.blocks_for(total)]
    kernels = [make_attention(kind, layer, spec) for layer in layout.layers]
    references = [ReferenceAttention(layer, spec) for layer in layout.layers]
    alone, reference_cells = (
        [torch.full((len(arena), 2, layer.cell_bytes), POISON, dtype=torch.uint8) for layer in layout.layers]
        for _ in range(2)
    )
    for computed, new in [(0, 130), (130, 70), *((length, 1) for length in range(200, total))]:
        batch, other = (make_batch(layout, [computed], [new], row.contiguous()) for _ in range(2))
        for layer, view in enumerate(views):
            query = torch.randn(new, 4, 64, generator=generator)
            key, value = (torch.randn(new, 2, 64, generator=generator) for _ in range(2))
            found, expected = torch.full_like(query, torch.nan), torch.full_like(query, torch.nan)
            kernels[layer].forward(NewRows(query, key, value), layout.cells_of(view, layer), batch, Answers(found))
            kernels[layer].store(key, value, alone[layer], batch)
            references[layer].forward(NewRows(query, key, value), reference_cells[layer], other, Answers(expected))
            torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    for layer, view in enumerate(views):
        assert torch.equal(layout.cells_of(view, layer), alone[layer])


@pytest.mark.parametrize("seed", range(3))
def test_free_and_held_blocks_add_up(seed: int) -> None:
    Simulation(mixed({0: "dense", -1: "int8"}, 5), 90, seed).run(30)


# Policies


def test_a_layers_codec_is_that_of_the_named_policy() -> None:
    policy = mixed_policy({0: "int8", -1: "dense", 2: "boost-2bit"})
    found = policy.of_layers(5)
    assert [(layer.key, layer.value) for layer in found] == [
        (load_policy(name).key, load_policy(name).value)
        for name in ("int8", "kivi-2bit", "boost-2bit", "kivi-2bit", "none")
    ]
    assert all(layer.sink_tokens == load_policy("kivi-2bit").sink_tokens for layer in found)
    assert not policy.is_dense and mixed_policy({0: "int8"}, "dense").has_pages


def test_a_policy_with_layers_survives_the_way_to_another_process(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nsummary: s\ncodec: kivi-4bit\nlayers:\n  0: int8\n  -1: dense\n"
        "  3: {key: {bits: 8, group_size: 32}, value: {bits: 8}}\n"
    )
    policy = load_policy(str(path))
    assert [layer.index for layer in policy.layers] == [0, -1, 3]
    assert policy_from_config({"policy": policy_content(policy)}) == policy
    assert load_policy("kivi-4bit", ["layers.-1=dense", "layers.0=int8"]).layers[::-1] == policy.layers[:2]


@pytest.mark.parametrize(
    ("name", "override", "part"),
    [
        ("int8", "layers={0: int9}", "layers.0: codec is 'int9', it must be the name of a shipped policy"),
        ("int8", "layers={0: snapkv}", "layers.0: codec: snapkv evicts itself"),
        ("int8", "layers={first: int8}", "layers takes the name of a policy"),
        ("int8", "layers=int8", "layers takes the name of a policy"),
        ("int8", "layers={0: 8}", "layers takes the name of a policy"),
        ("int8", "layers={0: {key: {bits: 8, group_size: 64}}}", "layers.0: give both key and value"),
        ("int8", "layers={0: {key: {bits: 2, group_size: 128}, value: {bits: 8}}}", "at most tile_tokens (64)"),
        ("none", "layers={0: int8}", "layers needs pages"),
        ("pyramidkv", "layers={0: int8}", "layers with their own codecs are evicted with budget: uniform"),
        ("kv-compress-live", "layers={0: int8}", "and schedule: end-of-prefill, without chunk_tokens"),
    ],
)
def test_layers_that_cannot_be_are_refused(name: str, override: str, part: str) -> None:
    with pytest.raises(PolicyError) as caught:
        load_policy(name, [override])
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "part"), [({8: "int8"}, "layers names layer 8"), ({0: "int8", -8: "dense"}, "names layer 0 of 8 twice")]
)
def test_a_model_without_such_layers_is_refused_by_its_config(layers: dict[int, str], part: str) -> None:
    check_model({"num_hidden_layers": 8, "head_dim": 64}, mixed_policy({0: "int8", -1: "dense"}))
    with pytest.raises(UnsupportedError, match=part):
        check_model({"num_hidden_layers": 8, "head_dim": 64}, mixed_policy(layers))


def test_kernels_take_the_pages_of_one_layer_only() -> None:
    with pytest.raises(ValueError, match="layout of one layer"):
        make_attention("native", mixed({0: "int8"}, 2), LayerSpec(2, 2, 1.0))
