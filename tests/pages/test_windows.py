"""Window layers and full layers share a pool: the arithmetic of their blocks, and whose bytes are where in one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvserve.pages.kept import arena_of, in_strips, num_layers_of
from kvserve.pages.layout import PageLayout
from kvserve.pages.windows import Hybrid, WindowGroups
from kvserve.policies.loading import load_policy


def groups_of(num_full: int, num_windows: int, window: int = 1024, head_dim: int = 128) -> WindowGroups:
    layout = PageLayout.build(load_policy("kivi-2bit"), head_dim, 64, torch.bfloat16)
    return WindowGroups.choose(Hybrid(num_full, num_windows, window), layout.cell_bytes, 4 * head_dim, 64, 32768)


@pytest.mark.parametrize(
    ("model", "num_full", "num_windows", "window", "head_dim", "most"),
    [
        ("Gemma 3 1B", 4, 22, 512, 256, 0.0), ("Gemma 3 4B", 5, 29, 1024, 256, 0.16),
        ("Gemma 3 12B", 8, 40, 1024, 256, 0.1), ("Gemma 3 27B", 10, 52, 1024, 128, 0.06),
        ("OLMo 3 7B", 8, 24, 4096, 128, 0.13), ("OLMo 3 32B, EXAONE 4 32B, Command A", 16, 48, 4096, 128, 0.13),
    ],
)  # fmt: skip
def test_little_of_the_window_layers_blocks_is_unused_in_models_that_are_served(
    model: str, num_full: int, num_windows: int, window: int, head_dim: int, most: float
) -> None:
    groups = groups_of(num_full, num_windows, window, head_dim)
    assert groups.waste <= most and groups.full_waste == 0, model


@given(
    num_full=st.integers(1, 20), num_windows=st.integers(1, 60), cell=st.integers(1, 200),
    slot=st.sampled_from([1, 2, 8]),
)  # fmt: skip
def test_a_block_holds_a_cell_of_every_full_layer_or_the_pages_of_any_group(num_full, num_windows, cell, slot) -> None:
    groups = WindowGroups.choose(Hybrid(num_full, num_windows, 100), 64 * cell, 64 * slot, 64, 1000)
    in_widest = -(-num_windows // groups.num_groups)
    assert groups.block_bytes == max(num_full * 64 * cell, in_widest * groups.page_bytes)
    assert 64 % groups.block_size == 0 and groups.page_bytes != 64 * cell
    assert 0 <= groups.waste < 1 and 0 <= groups.full_waste < 1


def test_between_steps_a_request_holds_its_window_and_what_its_first_block_has_beside_it() -> None:
    groups = WindowGroups(Hybrid(1, 1, 96), 64 * 512, 512, 16)
    assert groups.num_groups == 1
    # 96 tokens from the next one on: of 200 stored ones the last 95, and token 105 is in the block of token 96.
    assert [groups.held_blocks(count) for count in (1, 16, 17, 95, 96, 111, 112, 200)] == [1, 1, 2, 6, 6, 6, 6, 7]
    assert groups.most_blocks(1000, in_flight=128) == -(-(95 + 128) // 16) + 1
    assert groups.most_blocks(100, in_flight=128) == 7 + 1


@pytest.mark.parametrize(("num_layers", "num_heads", "padding"), [(3, 2, 0), (2, 4, 192), (1, 1, 64), (5, 1, 0)])
def test_strips_are_in_one_piece_and_no_byte_is_anybody_elses(num_layers: int, num_heads: int, padding: int) -> None:
    layout = PageLayout.build(load_policy("kivi-2bit"), 64, 64, torch.float32)
    page, num_blocks = num_heads * layout.cell_bytes, 4
    stride = num_layers * page + padding
    arena, owners = torch.zeros(num_blocks * stride, dtype=torch.uint8), 0
    for layer in range(num_layers):
        shape = (num_blocks, num_heads, 64, layout.cell_bytes // 64)
        strides = (stride, layout.cell_bytes, layout.cell_bytes // 64, 1)
        given_cells = arena.as_strided(shape, strides, layer * page)
        cells = in_strips(given_cells, num_layers)
        assert cells.shape == given_cells.shape
        assert num_layers_of(cells, layout) == (num_layers, layer)
        assert arena_of(cells, layout).strips.data_ptr() == arena.data_ptr()
        cells += 1
        owners += cells.numel()
    assert arena.max() == 1 and int(arena.sum()) == owners == num_blocks * num_layers * page
    assert not arena.view(num_blocks, stride)[:, num_layers * page :].any(), "what is over stays unused"


def test_cells_in_another_layout_are_refused() -> None:
    cells = torch.zeros(4, 2, 3, 64, 44, dtype=torch.uint8)[:, :, 1]
    with pytest.raises(ValueError, match="cells of one of 3 layers"):
        in_strips(cells, 3)
    packed = torch.zeros(4, 3, 2, 64, 44, dtype=torch.uint8)[:, 2]
    with pytest.raises(ValueError, match="cells of one of 2 layers"):
        in_strips(packed, 2)
