"""skvq-2bit against an independent reading of SKVQ (arXiv 2405.06219, section 3), in NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from kvserve.attention.base import Answers, LayerSpec, NewRows, PagedAttention, Stored
from kvserve.attention.native import NativeAttention, available_isas
from kvserve.attention.reference import ReferenceAttention
from kvserve.codecs.tile import Half, Tile
from kvserve.pages.layout import PageLayout
from kvserve.policies.loading import load_policy
from kvserve.transforms.layer import LayerTransforms
from tests.cases.attention_cases import make_batch, poisoned_cells

POLICY = load_policy("skvq-2bit")
TOKENS, KV_HEADS, GROUP_HEADS, HEAD_DIM, GROUP, SINKS = 200, 2, 3, 64, 32, 5
SEALED = TOKENS // 64 * 64
KERNELS: dict[str, Callable[..., PagedAttention]] = {"reference": ReferenceAttention} | {
    isa: lambda layout, spec, tables, isa=isa: NativeAttention(layout, spec, isa, tables) for isa in available_isas()
}


def reordered_clipped(x: np.ndarray, order: np.ndarray, clip: np.ndarray) -> np.ndarray:
    """What comes back of the rows [tokens, head_dim] of one head.

    Element i of the new order is the old channel order[i]. Scale and minimum of a group are float16 (the paper: FP8).
    """
    out = np.empty_like(x, dtype=np.float64)
    for t, row in enumerate(x.astype(np.float64)):
        for g, factor in enumerate(clip.astype(np.float64)):
            channels = order[g * GROUP : (g + 1) * GROUP]
            low, high = row[channels].min() * factor, row[channels].max() * factor
            low, scale = (float(np.float16(number)) for number in (low, max((high - low) / 3, 2.0**-20)))
            codes = np.clip(np.round((row[channels] - low) / scale), 0, 3)
            out[t, channels] = codes * scale + low
    return out


class Step:
    """One layer with random rows and tables; a request of TOKENS tokens, stored by kernels behind the transforms."""

    def __init__(self, kernels: str, seed: int, clips: tuple[float, float] = (0.6, 1.0)) -> None:
        generator = torch.Generator().manual_seed(seed)
        spread = torch.tensor([0.2, 3.0]).repeat(HEAD_DIM // 2)[torch.randperm(HEAD_DIM, generator=generator)]
        drawn = torch.randn(2, TOKENS, KV_HEADS, HEAD_DIM, generator=generator) * spread + 0.3
        self.rows = dict(zip(Half, drawn.half().float(), strict=True))  # numbers of float16, as dense slots hold
        self.query = torch.randn(TOKENS, KV_HEADS * GROUP_HEADS, HEAD_DIM, generator=generator)
        self.tables = {}
        for half in Half:
            orders = [torch.randperm(HEAD_DIM, generator=generator) for _ in range(KV_HEADS)]
            self.tables[f"{half}.permutation.order"] = torch.stack(orders).int()
            factors = torch.rand(KV_HEADS, HEAD_DIM // GROUP, generator=generator)
            self.tables[f"{half}.affine.clip"] = clips[0] + (clips[1] - clips[0]) * factors
        self.layout = PageLayout.build(POLICY, HEAD_DIM, 64, torch.float32)
        self.spec = LayerSpec(KV_HEADS * GROUP_HEADS, KV_HEADS, 0.125)
        self.kernels = KERNELS[kernels](self.layout, self.spec, self.tables)
        self.transforms = LayerTransforms(POLICY.transforms.of_layer, self.tables, KV_HEADS, HEAD_DIM)
        blocks = self.layout.blocks_for(TOKENS)
        self.cells = poisoned_cells(self.layout, blocks, KV_HEADS)
        self.table = torch.arange(blocks, dtype=torch.int32)[None]

    def expected(self, half: Half) -> torch.Tensor:
        """Float64 [kv_heads, tokens, head_dim]; sinks and the unfinished tile are as they were."""
        rows = self.rows[half].double().transpose(0, 1).clone()
        for head in range(KV_HEADS):
            order, clip = (self.tables[f"{half}.{name}"][head].numpy() for name in ("permutation.order", "affine.clip"))
            rows[head, SINKS:SEALED] = torch.from_numpy(
                reordered_clipped(rows[head, SINKS:SEALED].numpy(), order, clip)
            )
        return rows

    def forward(self, first: int) -> torch.Tensor:
        """Bring the tokens from `first` on; answers, un-reordered."""
        query = self.transforms.queries(self.query[first:])
        key, value = self.transforms.keys(self.rows[Half.KEY]), self.transforms.values(self.rows[Half.VALUE])
        output = torch.empty_like(query)
        if first:
            batch = make_batch(self.layout, [0], [first], self.table)
            past = NewRows(query[:1].expand(first, -1, -1).contiguous(), key[:first], value[:first])
            self.kernels.forward(past, self.cells, batch, Answers(torch.empty(first, *query.shape[1:])))
        batch = make_batch(self.layout, [first], [TOKENS - first], self.table)
        self.kernels.forward(NewRows(query, key[first:], value[first:]), self.cells, batch, Answers(output))
        return self.transforms.outputs(output)

    def stored(self) -> dict[Half, torch.Tensor]:
        """What is read back, in the model's order of channels, [kv_heads, tokens, head_dim]."""
        found = {}
        for half, rows in zip(
            Half, self.kernels.read(Stored(self.cells, self.table[0], TOKENS), 0, TOKENS), strict=True
        ):
            order = self.tables[f"{half}.permutation.order"].long()[:, None].expand_as(rows)
            found[half] = torch.empty_like(rows).scatter_(2, order, rows)
        return found


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kernels", KERNELS)
def test_tokens_come_back_as_the_paper_writes_them(kernels: str, seed: int) -> None:
    step = Step(kernels, seed)
    step.forward(0)
    for half, found in step.stored().items():
        expected = step.expected(half)
        assert torch.equal(found[:, :SINKS], expected[:, :SINKS].float())
        assert torch.equal(found[:, SEALED:], expected[:, SEALED:].float())
        same = (found - expected).abs() <= 1e-5
        assert same.float().mean() > 0.9995  # an element halfway between two codes may get the other one
        assert not torch.equal(expected, step.rows[half].double().transpose(0, 1))


@pytest.mark.parametrize("kernels", KERNELS)
def test_answers_are_those_of_attention_over_the_rows_that_come_back(kernels: str) -> None:
    """Queries are reordered with the keys and answers back with the values; the last token sees all the others."""
    step = Step(kernels, 7)
    found = step.forward(TOKENS - 1)[-1].double().view(KV_HEADS, GROUP_HEADS, HEAD_DIM)
    key, value = step.expected(Half.KEY), step.expected(Half.VALUE)
    query = step.query[-1].double().view(KV_HEADS, GROUP_HEADS, HEAD_DIM)
    weights = (0.125 * query @ key.transpose(1, 2)).softmax(-1)
    torch.testing.assert_close(found, weights @ value, rtol=0, atol=2e-3)


def test_a_clip_of_one_is_no_clip_and_a_smaller_one_narrows_the_range() -> None:
    codec, shape = POLICY.key, PageLayout.build(POLICY, HEAD_DIM, 64, torch.float32).tile_format.shape(Half.KEY)
    plain = load_policy("skvq-2bit", ["key.clip=false"]).key
    tile = Tile.of(torch.randn(64, HEAD_DIM, generator=torch.Generator().manual_seed(0)))
    whole, half = (codec.encode(tile, shape, {"affine.clip": torch.full((2,), clip)}) for clip in (1.0, 0.5))
    assert all(torch.equal(one, other) for one, other in zip(whole, plain.encode(tile, shape, {}), strict=True))
    torch.testing.assert_close(half[1].float(), whole[1].float() / 2, rtol=2e-3, atol=0)


def test_an_element_has_two_bits_and_its_share_of_two_float16() -> None:
    layout = PageLayout.build(POLICY, HEAD_DIM, 64, torch.float32)
    assert layout.bits_per_element() == pytest.approx(2 + 32 / GROUP)
