"""How many blocks a request holds whose kept tokens have several formats, against pages filled token by token.

Tokens that are demoted, and layers with pages of their own.
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.accounting.plan import plan_eviction, policy_plan, widest_request, widest_under
from kvserve.codecs.affine import Affine
from kvserve.pages.layout import PageLayout
from kvserve.policies.base import Eviction, LayerCodec
from kvserve.policies.loading import load_policy
from kvserve.schedules.base import Limit
from tests.accounting.test_eviction_manager import EvictingSimulation
from tests.cases.attention_cases import make_policy
from tests.cases.kept_cases import demoting

KV_HEADS = 3
LOW = {"2 bits": (Affine(bits=2, group_size=32), Affine(bits=2, group_size=64)),
       "4 and 2 bits": (Affine(bits=4, group_size=64), Affine(bits=2, group_size=64))}  # fmt: skip


@st.composite
def cases(draw) -> tuple[PageLayout, Limit]:
    tile_tokens, sinks, recent = (draw(st.sampled_from(of)) for of in ([64, 128], [0, 4, 63], [0, 8, 200]))
    own = make_policy(draw(st.sampled_from(["int8", "kivi-4"])), tile_tokens, sinks)
    if draw(st.booleans()):
        policy = demoting(own, *LOW[draw(st.sampled_from(list(LOW)))])
    else:
        eviction = Eviction(scorer="random", budget="uniform", rate=2)
        layers = [LayerCodec(index=0), LayerCodec(index=-1, key=LOW["2 bits"][0], value=LOW["2 bits"][1])]
        policy = own.model_copy(update={"eviction": eviction, "layers": layers[draw(st.integers(0, 1)) :]})
    layout = PageLayout.build(
        policy, draw(st.sampled_from([64, 128])), tile_tokens * draw(st.integers(1, 3)), torch.float32,
        num_layers=draw(st.sampled_from([7, 28])),
    )  # fmt: skip
    if draw(st.booleans()):
        return layout, Limit(max_tokens=draw(st.integers(max(sinks + recent, 1), 700)), protected=sinks + recent)
    return layout, Limit(draw(st.sampled_from([1, 1.02, 1.5, 5, 64]) | st.floats(1, 9)), protected=sinks + recent)


def pages_filled(num_tokens: int, tile_bytes: int, layout: PageLayout) -> int:
    """Pages of one head for tokens that come one by one: a tile per tile_tokens of them, as long as tiles fit."""
    pages, room, left = 0, 0, 0
    for _ in range(num_tokens):
        if not left:
            if room < tile_bytes:
                pages, room = pages + 1, layout.kept_page_bytes
            room, left = room - tile_bytes, layout.tile_tokens
        left -= 1
    return pages


def kept_by_hand(layout: PageLayout, limit: Limit, point: int) -> int:
    """Blocks of a cut at `point`: every head of every layer fills its pages, and strips hold whole pages."""
    size, sinks, target = layout.block_size, layout.policy.sink_tokens, limit.target(point)
    if target >= point:
        return point // size
    end = point // size * size
    held, page, demotes = max(end - sinks, 0), layout.tile_tokens, bool(layout.other_formats)
    if demotes:
        page *= layout.kept_page_bytes // layout.formats[0].tile_bytes
    elsewhere = Fraction(target - sinks - (point - end), page)
    protected = ceil(Fraction(limit.protected - sinks - (point - end), page))
    chosen = min(max(ceil(elsewhere) if limit.rate else floor(elsewhere), protected, 1) * page, held)
    layers = (layout,) * layout.num_layers if demotes else layout.layers
    pages = {size: pages_filled(chosen, size, layout) for size in {layer.formats[0].tile_bytes for layer in layers}}
    total = sum(pages[layer.formats[0].tile_bytes] for layer in layers)
    if demotes:
        total += pages_filled(held - chosen, layout.formats[1].tile_bytes, layout) * layout.num_layers
    strip = layout.num_layers * layout.cell_bytes // layout.kept_page_bytes
    return ceil(Fraction(total * KV_HEADS, strip * KV_HEADS))


def grow(layout: PageLayout, limit: Limit, prompt_len: int, max_len: int) -> tuple[int, list[int], list[int]]:
    """Where it is cut (0: nowhere), and by length the blocks held and the most held on the way."""
    cut, held, peak, saved = 0, [layout.private_blocks], [layout.private_blocks], 0
    for length in range(1, max_len + 1):
        row = layout.blocks_for(length)
        now = most = row - saved
        if length == prompt_len:
            kept, blocks = kept_by_hand(layout, limit, length), length // layout.block_size
            if kept < blocks:
                cut, saved = length, blocks - kept
                now, most = row - saved, row + kept
        held.append(now)
        peak.append(max(peak[-1], most))
    return cut, held, peak


@given(case=cases(), prompt_len=st.integers(1, 1500), max_len=st.integers(1, 1500))
@settings(max_examples=100, deadline=None)
def test_a_plan_is_that_of_pages_filled_token_by_token(case, prompt_len: int, max_len: int) -> None:
    layout, limit = case
    prompt_len = min(prompt_len, max_len)
    point, held, peak = grow(layout, limit, prompt_len, max_len)
    plan = plan_eviction(layout, limit, prompt_len, max_len)
    assert (plan is not None) == (point > 0)
    if plan is None:
        return
    cut = plan.next_cut(0)
    assert (cut.point, cut.end) == (prompt_len, prompt_len // layout.block_size * layout.block_size)
    assert cut.chosen_pages > 0 and plan.next_cut(prompt_len) is None
    for length in [prompt_len, *range(max_len, 0, -97), *range(1, max_len + 1, 53)]:
        assert (plan.held_blocks(length), plan.peak_blocks(length)) == (held[length], peak[length])


@given(case=cases(), max_len=st.integers(1, 700))
@settings(max_examples=25, deadline=None)
def test_the_widest_request_is_the_widest_of_all_prompts_at_all_lengths(case, max_len: int) -> None:
    layout, limit = case
    widest = max(grow(layout, limit, prompt_len, max_len)[2][-1] for prompt_len in range(1, max_len + 1))
    assert widest_under(layout, limit, max_len) == widest


@given(case=cases(), point=st.integers(1, 5000))
@settings(max_examples=100, deadline=None)
def test_the_chosen_tokens_are_the_limits_to_a_page(case, point: int) -> None:
    layout, limit = case
    plan = plan_eviction(layout, limit, point, point)
    if plan is None:
        return
    cut, page = plan.last_cut(point), layout.chosen_unit
    chosen = min(cut.chosen_pages * page, cut.end - layout.policy.sink_tokens)
    others = layout.policy.sink_tokens + point - cut.end
    if chosen > page and chosen + others > limit.protected + page:
        assert abs(chosen + others - limit.target(point)) < page


@pytest.mark.parametrize("prompt_len", [1000, 4096, 32000])
def test_mikv_holds_about_half_of_what_int8_does(prompt_len: int) -> None:
    """A fifth of the tokens at 8 bits, and three tiles of the others in the room of one."""
    layout = PageLayout.build(load_policy("mikv"), 128, 64, torch.bfloat16, num_layers=28)
    plain = PageLayout.build(load_policy("int8"), 128, 64, torch.bfloat16)
    held, tiles = policy_plan(layout, prompt_len).held_blocks(prompt_len), prompt_len // 64
    assert held <= ceil(tiles / 5) + ceil(tiles * 4 / 5 / 3) + 1 + layout.private_blocks
    assert held / plain.blocks_for(prompt_len) < 0.6
    assert widest_request(layout, 131072) < 1.5 * plain.blocks_for(131072)


@pytest.mark.parametrize("seed", range(2))
def test_free_and_held_blocks_add_up_where_layers_differ(seed: int) -> None:
    policy = load_policy("snapkv", ["codec=kivi-4bit", "layers={-1: int8}"])
    simulation = EvictingSimulation(PageLayout.build(policy, 64, 64, torch.float32, num_layers=12), 120, seed)
    simulation.run(30)
    assert simulation.num_cuts > 0
