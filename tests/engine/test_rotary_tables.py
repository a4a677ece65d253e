"""Tables of a model's own rotary embedding: what turns keys back to where they were, factors and rounding included."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from transformers import GPTNeoXConfig, LlamaConfig
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from kvserve.codecs.before_rope import BeforeRope
from kvserve.codecs.table import Table
from kvserve.codecs.tile import Half, Tile, TileShape
from kvserve.engine import rotary
from kvserve.engine.rotary import NoRotaryError, rotary_table, transformers_table
from kvserve.scorers.rotary import RotaryTable
from tests.engine.test_model_checks import ROPES, YARN

OWN_CODE = SimpleNamespace(using_transformers_backend=lambda: False)
TOKENS, HEAD_DIM = 20, 64


@pytest.fixture
def vllm_config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("name", ROPES)
def test_what_vllm_turns_is_turned_back_exactly(name, neox, dtype, vllm_config, monkeypatch) -> None:
    """Rounded cosines and a factor are part of what the embedding does, so they are undone too."""
    rope = get_rope(HEAD_DIM, 512, neox, {"rope_theta": 10000.0, **ROPES[name]}, dtype)
    monkeypatch.setattr(rotary, "_ROPE_DICT", {"one": rope})
    table = rotary_table(OWN_CODE, 512)
    rope.cos_sin_cache = rope.cos_sin_cache.float()  # so that products are not rounded
    keys, positions = torch.randn(TOKENS, 3 * HEAD_DIM), torch.arange(TOKENS) * 25
    turned = rope.forward_native(positions, keys)[0].view(TOKENS, 3, HEAD_DIM)
    back = table.turn_back(turned.transpose(0, 1), positions).transpose(0, 1)
    torch.testing.assert_close(back, keys.view(TOKENS, 3, HEAD_DIM), atol=2e-5, rtol=1e-5)


def test_fewer_positions_than_requests_may_have_are_refused(vllm_config, monkeypatch) -> None:
    rope = get_rope(HEAD_DIM, 512, True, {"rope_theta": 10000.0}, torch.float32)
    monkeypatch.setattr(rotary, "_ROPE_DICT", {"one": rope})
    assert rotary_table(OWN_CODE, 512).angles.shape == (2, HEAD_DIM // 2, 512)
    with pytest.raises(NoRotaryError, match="has 512 positions and requests may have 513"):
        rotary_table(OWN_CODE, 513)


@pytest.mark.parametrize(
    ("config", "module", "rope_class"),
    [
        (GPTNeoXConfig(hidden_size=256, num_attention_heads=4), modeling_gpt_neox, "GPTNeoXRotaryEmbedding"),
        (LlamaConfig(hidden_size=256, num_attention_heads=4), modeling_llama, "LlamaRotaryEmbedding"),
        (
            LlamaConfig(hidden_size=256, num_attention_heads=4, max_position_embeddings=256, rope_parameters=YARN),
            modeling_llama,
            "LlamaRotaryEmbedding",
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_transformers_turns_is_turned_back_exactly(config, module, rope_class, dtype) -> None:
    rope = getattr(module, rope_class)(config=config)
    keys, positions = torch.randn(1, 2, TOKENS, HEAD_DIM), torch.arange(TOKENS) * 10
    cosines, sines = (part.float() for part in rope(torch.zeros(1, dtype=dtype), positions[None]))
    turned = module.apply_rotary_pos_emb(keys, keys, cosines, sines)[1]
    back = transformers_table(config, 200, dtype).turn_back(turned[0], positions)
    torch.testing.assert_close(back, keys[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rotary_dim", [HEAD_DIM, HEAD_DIM // 2])
def test_gradients_go_the_way_of_the_rows(interleaved: bool, rotary_dim: int) -> None:
    """A linear map written out row by row, with a factor of 1.3, and autograd through it."""
    angles = torch.rand(rotary_dim // 2, 300) * 6
    table = RotaryTable(torch.stack([angles.cos(), angles.sin()]) * 1.3, interleaved)
    positions = torch.randint(0, 300, (TOKENS,))
    before = torch.randn(2, TOKENS, HEAD_DIM, requires_grad=True)
    channels = list(before.unbind(-1))
    for pair in range(rotary_dim // 2):
        one, two = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + rotary_dim // 2)
        cosine, sine = table.angles[:, pair, positions]
        channels[one], channels[two] = (
            before[..., one] * cosine - before[..., two] * sine,
            before[..., two] * cosine + before[..., one] * sine,
        )
    after = torch.stack(channels, -1)
    gradient = torch.randn_like(after)
    after.backward(gradient)
    torch.testing.assert_close(table.turn_back(after.detach(), positions), before.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(table.gradient_before(gradient, positions), before.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("interleaved", [True, False])
def test_calibrations_look_at_the_rows_that_the_codec_writes(interleaved: bool) -> None:
    """A codec before the embedding whose levels are exact for the rows that were turned back gives the keys back."""
    angles = torch.rand(HEAD_DIM // 2, 64) * 6
    table = RotaryTable(torch.stack([angles.cos(), angles.sin()]) * 1.2, interleaved)
    levels, positions = torch.tensor([-1.0, -0.5, 0.25, 1.0]), torch.arange(64)
    before = levels[torch.randint(0, 4, (64, HEAD_DIM))] * 3 + 1
    codec, shape = BeforeRope(interleaved=interleaved, inner=Table(bits=2)), TileShape(Half.KEY, 64, HEAD_DIM)
    half_range, middle = torch.full((HEAD_DIM,), 3.0), torch.ones(HEAD_DIM)
    tables = {"table.levels": levels, "table.range": torch.stack([half_range, middle])}
    tables["before-rope.rotary"] = table.angles
    keys = _turned(table, before, positions)
    decoded = codec.decode(codec.encode(Tile.of(keys), shape, tables), shape, tables, positions)
    torch.testing.assert_close(decoded, keys, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(table.turn_back(keys, positions), before, atol=1e-5, rtol=1e-5)


def _turned(table: RotaryTable, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rows behind the embedding."""
    negated = RotaryTable(table.angles * torch.tensor([1.0, -1.0])[:, None, None], table.interleaved)
    return negated.gradient_before(rows, positions)
