#!/usr/bin/env python3
"""How far a compressed cache is from stock vLLM on models whose attention is sharp.

    python -m benchmarks.sharp_attention --out benchmarks/results/cpu-zen4-sharp.json

Random models with two layers, made on the spot: a softmax scale of 1 instead of 1/8 (Granite 4, dense), key biases of
+-50 (as Qwen 2 has them), and biases N(0, 50) on all channels of a key. Six greedy texts each: how many are those of
stock, and the mean distance of the log-probabilities of the prompts in nats.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.child import run_child

POLICIES = ("stock", "none", "int8", "kivi-4bit", "kivi-2bit")
MODELS = ("plain", "scale-1", "bias-50", "bias-normal-50")
LENGTHS = (65, 100, 200, 333, 400, 500)
MAX_TOKENS = 32
VOCAB_SIZE = 512


def make_model(name: str, folder: Path) -> None:
    """Save a random float32 model."""
    import torch
    from transformers import AutoModelForCausalLM, GraniteConfig, Qwen2Config

    torch.manual_seed(MODELS.index(name))
    common: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.08,
        "tie_word_embeddings": True,
    }  # fmt: skip
    config = GraniteConfig(**common, attention_multiplier=1.0) if name == "scale-1" else Qwen2Config(**common)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for layer in model.model.layers if name.startswith("bias") else ():
        bias = layer.self_attn.k_proj.bias.data
        bias.copy_(torch.randn_like(bias) * 50 if "normal" in name else (torch.rand_like(bias) < 0.5) * 100.0 - 50.0)
    model.save_pretrained(folder)


def measure(folder: str, policy: str) -> dict[str, Any]:
    """Greedy texts and the prompts' log-probabilities of one engine."""
    import torch
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "kv_cache_memory_bytes": 128 << 20,
        "skip_tokenizer_init": True, "enable_prefix_caching": False,
    }  # fmt: skip
    if policy != "stock":
        options |= {"additional_config": {"kvserve": {"policy": policy}}, "block_size": 64}
    llm = LLM(model=folder, **options)
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in LENGTHS]
    sampling = SamplingParams(
        temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, prompt_logprobs=0, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    logprobs = [[next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]] for output in outputs]
    return {"texts": [list(output.outputs[0].token_ids) for output in outputs], "logprobs": logprobs}


def compare(stock: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Texts that are stock's, and the mean and the largest distance of the prompts' log-probabilities."""
    pairs = zip(stock["logprobs"], other["logprobs"], strict=True)
    distances = [abs(a - b) for rows in pairs for a, b in zip(*rows, strict=True)]
    equal = sum(a == b for a, b in zip(stock["texts"], other["texts"], strict=True))
    mean = float(f"{sum(distances) / len(distances):.3g}")
    return {"equal_texts": equal, "texts": len(stock["texts"]), "mean": mean, "max": float(f"{max(distances):.3g}")}


def main() -> int:
    """Measure and write after each model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--out", type=Path, help="result file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print("\n" + json.dumps(measure(*options.child)))
        return 0
    command = ["python", "benchmarks/sharp_attention.py", *(Path(word).name for word in sys.argv[1:])]
    record: dict[str, Any] = {"schema": 1, "command": command, "lengths": LENGTHS, "models": {}}
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            make_model(name, Path(folder))
            found = {
                policy: run_child("benchmarks.sharp_attention", "--child", folder, policy)
                for policy in options.policies
            }
        record["models"][name] = {p: compare(found["stock"], found[p]) for p in options.policies if p != "stock"}
        print(f"{name}: {json.dumps(record['models'][name])}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
