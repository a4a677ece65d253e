"""Steps that check drafts have a few query rows a request, which count as more heads of its group."""

from __future__ import annotations

import functools

import pytest
import torch

from kvserve.attention.native import NativeAttention, available_isas
from kvserve.attention.reference import ReferenceAttention
from tests.cases.attention_cases import Case, build_case, make_policy
from tests.cases.kept_cases import LAYERS, Ask, KeptCase, build_kept_case

ISAS = available_isas()
FAMILIES = ["int8", "kivi-4", "kivi-2", "boosted", "dense-pages"]
TOLERANCE = 3e-4  # the kernel rounds its factors to integers, those of several rows by one scale
EXTEND = 3e-6  # what the kernel of many rows leaves, which does not
MANY = 16  # rows that it takes at most
# Within a tile, up to its end, over it, from its start, and with nothing before.
STEPS = ((61, 2), (61, 3), (61, 5), (64, 4), (0, 5), (190, 3), (200, 1))

pytestmark = pytest.mark.skipif(not ISAS, reason="no kernel library is built")


@functools.cache
def answered(
    family: str, steps: tuple[tuple[int, int], ...], tile_tokens: int = 64, sinks: int = 4, **options
) -> tuple[Case, torch.Tensor, torch.Tensor]:
    """A step of (computed, new) tokens of each request, with the reference's output and lse."""
    computed, new = map(list, zip(*steps, strict=True))
    options = {"draft_tokens": max(new) - 1} | options
    case = build_case(make_policy(family, tile_tokens, sinks), computed=computed, new_tokens=new, **options)
    return case, *case.run(ReferenceAttention(case.layout, case.spec))


def error(isa: str, *arguments, **options) -> float:
    case, expected, expected_lse = answered(*arguments, **options)
    output, lse = case.run(NativeAttention(case.layout, case.spec, isa))
    assert output.isfinite().all()
    assert (lse - expected_lse).abs().max() <= TOLERANCE
    return float((output.float() - expected.float()).abs().max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("head_dim", [64, 96, 160])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_sees_what_came_before_it(family: str, head_dim: int, isa: str):
    assert error(isa, family, STEPS, head_dim=head_dim) <= TOLERANCE


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("group", [1, 2, 5, 8])
@pytest.mark.parametrize("family", ["kivi-2", "dense-pages"])
def test_every_group_size_matches_the_reference(family: str, group: int, isa: str):
    assert error(isa, family, ((70, 3), (63, 2), (100, 7)), group=group, num_kv_heads=1) <= TOLERANCE


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("tile_tokens", "tiles_per_block", "sinks"), [(64, 2, 16), (128, 1, 0), (128, 2, 4)])
@pytest.mark.parametrize("family", ["kivi-4", "dense-pages"])
def test_every_geometry_matches_the_reference(family, tile_tokens, tiles_per_block, sinks, isa):
    steps = tuple((base * tile_tokens + rest, 6) for base in (0, 1, 3) for rest in (tile_tokens - 3, 0, 7))
    assert error(isa, family, steps, tile_tokens, sinks, tiles_per_block=tiles_per_block) <= TOLERANCE


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", ["kivi-2", "dense-pages"])
def test_contexts_of_several_chunks_merge(family: str, isa: str):
    assert error(isa, family, ((2046, 5), (4200, 3)), num_kv_heads=1, group=2) <= TOLERANCE


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", ["kivi-2", "dense-pages"])
def test_capped_logits_and_learned_sinks_match_the_reference(family: str, isa: str):
    assert error(isa, family, STEPS, soft_cap=5.0, sinks=True) <= TOLERANCE


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_models_round_only_the_output(dtype: torch.dtype, isa: str):
    assert error(isa, "kivi-2", STEPS, model_dtype=dtype) <= 1.6e-2


@pytest.mark.parametrize("isa", ISAS)
def test_only_the_rows_that_a_step_of_drafts_has_go_this_way(isa: str):
    """Rows of prompts keep the kernel whose numbers do not show how a prompt was divided."""
    for steps, drafts in ((((130, 5),), 3), (((130, 5),), 0), (((130, MANY + 1),), MANY + 4)):
        assert error(isa, "int8", steps, draft_tokens=drafts) <= EXTEND
    for steps, drafts in ((((130, 5),), 4), (((130, MANY),), MANY - 1)):
        assert EXTEND < error(isa, "int8", steps, draft_tokens=drafts) <= TOLERANCE


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_evicted_requests_see_what_each_head_keeps(family: str, sinks: int, isa: str):
    asks = [Ask(128, 190, 5, (70, 3, 0, 124)), Ask(0, 70, 3), Ask(64, 64, 4, (60, 17, 1, 40)), Ask(64, 80, 1, (9,))]
    case: KeptCase = build_kept_case(make_policy(family, 64, sinks), asks, draft_tokens=4)
    for layer in LAYERS:
        output, lse = case.run(NativeAttention(case.layout, case.spec, isa), layer)
        expected, expected_lse = case.expected(layer)
        assert (output - expected).abs().max() <= TOLERANCE
        assert (lse - expected_lse).abs().max() <= TOLERANCE
