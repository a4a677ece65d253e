"""Tiny random models, one per family, made on the spot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo3Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 512
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,
}

FAMILIES: dict[str, PretrainedConfig] = {
    "llama-gqa-64": LlamaConfig(
        **{**COMMON, "hidden_size": 192}, num_attention_heads=6, num_key_value_heads=2, head_dim=64
    ),
    "phi3-mha-96": Phi3Config(
        **{**COMMON, "hidden_size": 192}, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0
    ),
    "llama-mha-256": LlamaConfig(**COMMON, num_attention_heads=2, num_key_value_heads=2, head_dim=256),
    "qwen2-bias": Qwen2Config(**{**COMMON, "hidden_size": 256}, num_attention_heads=4, num_key_value_heads=2),
    "qwen3-qk-norm": Qwen3Config(**COMMON, num_attention_heads=4, num_key_value_heads=2, head_dim=128),
    "mistral-window": MistralConfig(
        **COMMON, num_attention_heads=4, num_key_value_heads=2, head_dim=64, sliding_window=96
    ),
    "gemma3-mixed": Gemma3TextConfig(
        **{**COMMON, "num_hidden_layers": 4}, num_attention_heads=4, num_key_value_heads=1, head_dim=256,
        sliding_window=96, query_pre_attn_scalar=256,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    ),
}  # fmt: skip


WINDOW, FULL = "sliding_attention", "full_attention"
SHARED_SCALE = 64**-0.5
# The last 6 of 12 layers read the caches of layers 4 (those with a window) and 5.
SHARED: dict[str, Any] = {
    **COMMON, "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "sliding_window": 96, "layer_types": ([WINDOW] * 2 + [FULL]) * 4, "num_kv_shared_layers": 6,
    "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": VOCAB_SIZE,
    "pad_token_id": VOCAB_SIZE - 1,  # whose embedding is zero, which Gemma 3n divides by
}  # fmt: skip
# As their families have them: layers with a window among those that see every token; two of the latter.
HYBRIDS: dict[str, PretrainedConfig] = {
    "gemma3-5-to-1": Gemma3TextConfig(
        **{**COMMON, "num_hidden_layers": 12}, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        sliding_window=96, query_pre_attn_scalar=64, layer_types=([WINDOW] * 5 + [FULL]) * 2,
    ),
    "olmo3-3-to-1": Olmo3Config(
        **{**COMMON, "num_hidden_layers": 8, "hidden_size": 256}, num_attention_heads=4, num_key_value_heads=2,
        sliding_window=64, layer_types=([WINDOW] * 3 + [FULL]) * 2, pad_token_id=0,
    ),
    "gemma3n-shared": Gemma3nTextConfig(
        **SHARED, laurel_rank=16, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 12
    ),
    "gemma4-shared": Gemma4TextConfig(**SHARED, per_layer_config={}),  # one head_dim
}  # fmt: skip


def make_tiny_model(family: str, folder: Path) -> Path:
    """Save a random float32 model of `family` into `folder` and return it; the weights depend on the family alone."""
    torch.manual_seed(sorted(FAMILIES).index(family) if family in FAMILIES else len(family))
    model = AutoModelForCausalLM.from_config((FAMILIES | HYBRIDS)[family], dtype=torch.float32)
    if family in HYBRIDS and HYBRIDS[family].to_dict().get("num_kv_shared_layers"):
        for name, weight in model.named_parameters():
            if name.endswith("q_norm.weight"):  # scales logits, in place of a constant
                weight.data.fill_(SHARED_SCALE)
    model.save_pretrained(folder)
    return folder


def first_layers(model: Path, num_layers: int, folder: Path) -> Path:
    """A copy of a model that ends after its first layers: quick, with true weights and a tokenizer, and no sense."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": num_layers}), encoding="utf-8")
    (file,) = model.glob("*.safetensors")
    left_out = tuple(f"model.layers.{index}." for index in range(num_layers, config["num_hidden_layers"]))
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(left_out)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
