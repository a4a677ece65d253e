"""Images whose tokens see each other in both directions: refused, unless the server takes text only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig

from kvserve.cli import launch
from kvserve.engine.settings import EngineSettings
from kvserve.errors import UnsupportedError
from kvserve.policies.loading import load_policy
from tests.cases.layer_cases import engine_config

TEXT = GemmaConfig(
    vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=64, max_position_embeddings=1024,
)  # fmt: skip
VISION = SiglipVisionConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14
)
# Of the models with such images one that vLLM loads without torchvision, which its CPU builds go without here.
PALIGEMMA = PaliGemmaConfig(text_config=TEXT, vision_config=VISION, projection_dim=128)


def folder_of(tmp_path: Path, **changes: Any) -> Path:
    content = {**PALIGEMMA.to_dict(), "architectures": ["PaliGemmaForConditionalGeneration"], **changes}
    (tmp_path / "config.json").write_text(json.dumps(content))
    return tmp_path


def resolve(folder: Path, *options: str, policy: str = "int8") -> None:
    args = launch._parser().parse_args(["--model", str(folder), "--skip-tokenizer-init", *options])
    launch.check_resolved_model(args, load_policy(policy))


@pytest.mark.parametrize("policy", ["none", "int8", "kivi-2bit"])
def test_a_model_whose_images_see_ahead_is_refused_with_the_option_that_leaves_them_out(
    tmp_path: Path, policy: str
) -> None:
    with pytest.raises(UnsupportedError, match=r"later ones of the same image.*--language-model-only.*stock vLLM"):
        resolve(folder_of(tmp_path), policy=policy)


@pytest.mark.parametrize("options", [("--language-model-only",), ("--limit-mm-per-prompt", '{"image": 0}')])
def test_the_same_model_serves_text(tmp_path: Path, options: tuple[str, ...]) -> None:
    resolve(folder_of(tmp_path), *options)


def test_the_plugin_refuses_it_before_a_layer_is_built(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    with pytest.raises(UnsupportedError, match="--language-model-only"):
        EngineSettings.from_vllm_config(engine_config(folder, "int8"))
    settings = EngineSettings.from_vllm_config(engine_config(folder, "int8", language_model_only=True))
    assert settings is not None


def test_text_checkpoints_and_images_seen_causally_pass(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TEXT.to_dict(), "architectures": ["GemmaForCausalLM"]}))
    resolve(tmp_path)
    resolve(folder_of(tmp_path, is_mm_prefix_lm=False))
