#!/usr/bin/env python3
"""How far a greedy text under load is from the same prompt's text alone, per policy.

    python -m benchmarks.load_distance --out benchmarks/results/cpu-zen4-load.json

Ten prompts are answered one at a time, and then all at once beside six others in steps of 256 tokens, which cut their
prompts elsewhere. A model's matrix products round differently in batches of another shape; `--products float64` sums
them in float64, where rounding back to float32 hides the order: what is left is the cache's own.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.child import run_child

POLICIES = ("stock", "none", "int8", "kivi-2bit", "boost-2bit")
PRODUCTS = ("float64", "float32")
PROMPTS, OTHERS = 10, 6
STEP_TOKENS = 256


def register_float64_products() -> str:
    """A `quantization` of vLLM's that changes no weight: every product of the model is summed in float64."""
    import torch
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        UnquantizedEmbeddingMethod,
        VocabParallelEmbedding,
    )

    def exact(layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        product = x.double() @ layer.weight.double().T
        return (product if bias is None else product + bias).float()

    class Linear(UnquantizedLinearMethod):
        def process_weights_after_loading(self, layer: Any) -> None:
            layer.weight = torch.nn.Parameter(layer.weight.double(), requires_grad=False)

        def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            return exact(layer, x, bias)

    class Embedding(UnquantizedEmbeddingMethod):
        def process_weights_after_loading(self, layer: Any) -> None:
            pass

        def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            return exact(layer, x, bias)

    @register_quantization_config("float64-products")
    class Float64Products(QuantizationConfig):
        def get_name(self) -> Any:
            return "float64-products"

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.float32]

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Float64Products:
            return cls()

        def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
            if isinstance(layer, LinearBase):
                return Linear()
            return Embedding() if isinstance(layer, VocabParallelEmbedding) else None

    return "float64-products"


def prompts(encode: Any) -> list[list[int]]:
    """English prose that every Python carries, in pieces of 70 to 370 tokens."""
    from pydoc_data.topics import topics

    tokens = encode(topics["types"])
    pieces, start = [], 0
    for index in range(PROMPTS + OTHERS):
        length = 70 + 97 * index % 301
        pieces.append(tokens[start : start + length])
        start += length
    assert all(len(piece) >= 70 for piece in pieces)
    return pieces


def start_engine(model: str, policy: str, products: str) -> Any:
    from vllm import LLM

    options: dict[str, Any] = {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "kv_cache_memory_bytes": 256 << 20,
        "max_num_batched_tokens": STEP_TOKENS, "max_num_seqs": PROMPTS + OTHERS, "enable_prefix_caching": False,
    }  # fmt: skip
    if policy != "stock":
        options |= {"additional_config": {"kvserve": {"policy": policy}}, "block_size": 64}
    if products == "float64":
        options["quantization"] = register_float64_products()
    return LLM(model=model, **options)


def answers(llm: Any, pieces: list[list[int]], max_tokens: int) -> list[tuple[list[int], list[float], list[float]]]:
    """Of each prompt: the greedy tokens, their log-probabilities, and those of the prompt's own tokens."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=1, prompt_logprobs=0, detokenize=False
    )
    found = []
    for output in llm.generate([{"prompt_token_ids": piece} for piece in pieces], sampling, use_tqdm=False):
        text = output.outputs[0]
        of_text = [step[token].logprob for token, step in zip(text.token_ids, text.logprobs, strict=True)]
        of_prompt = [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]]
        found.append((list(text.token_ids), of_text, of_prompt))
    return found


def compare(alone: list[Any], loaded: list[Any]) -> dict[str, float]:
    """Texts that are equal, and distances in nats: of the prompts' tokens, and of the texts' up to where they part."""
    equal, of_texts, of_prompts = 0, [], []
    for (tokens, text, prompt), (other_tokens, other_text, other_prompt) in zip(alone, loaded, strict=True):
        equal += tokens == other_tokens
        pairs = enumerate(zip(tokens, other_tokens, strict=True))
        shared = next((i for i, pair in pairs if pair[0] != pair[1]), len(tokens))
        of_texts += [abs(a - b) for a, b in zip(text[:shared], other_text[:shared], strict=True)]
        of_prompts += [abs(a - b) for a, b in zip(prompt, other_prompt, strict=True)]

    def mean(values: list[float]) -> float:
        return float(f"{sum(values) / len(values):.3g}")

    return {
        "equal_texts": equal,
        "texts": len(alone),
        "text_tokens_compared": len(of_texts),
        "text_mean": mean(of_texts),
        "text_max": float(f"{max(of_texts):.3g}"),
        "prompt_mean": mean(of_prompts),
        "prompt_max": float(f"{max(of_prompts):.3g}"),
    }


def measure(model: str, policy: str, products: str, max_tokens: int) -> dict[str, float]:
    """One engine: every prompt alone, then all together."""
    llm = start_engine(model, policy, products)
    pieces = prompts(llm.get_tokenizer().encode)
    alone = [answers(llm, [piece], max_tokens)[0] for piece in pieces[:PROMPTS]]
    order = [*range(PROMPTS, PROMPTS + OTHERS), *range(PROMPTS)]
    loaded = answers(llm, [pieces[index] for index in order], max_tokens)[OTHERS:]
    return compare(alone, loaded)


def main() -> int:
    """Measure and write after each engine."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="Hugging Face folder (default: the default model)")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--products", nargs="+", default=list(PRODUCTS), choices=PRODUCTS)
    parser.add_argument("--max-tokens", type=int, default=64, help="of each text")
    parser.add_argument("--out", type=Path, help="result file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model is None:
        from kvserve.default_model import prepare_default_model

        options.model = str(prepare_default_model())
    if options.child:
        print("\n" + json.dumps(measure(options.model, options.child[0], options.child[1], options.max_tokens)))
        return 0
    record: dict[str, Any] = {
        "schema": 1,
        "command": ["python", "-m", "benchmarks.load_distance", *(Path(word).name for word in sys.argv[1:])],
        "model": Path(options.model).name,
        "step_tokens": STEP_TOKENS,
        "together": PROMPTS + OTHERS,
        "max_tokens": options.max_tokens,
        "nats": {products: {} for products in options.products},
    }
    for products in options.products:
        for policy in options.policies:
            found = record["nats"][products][policy] = run_child(
                "benchmarks.load_distance", "--model", options.model, "--max-tokens", str(options.max_tokens),
                "--child", policy, products,
            )  # fmt: skip
            print(f"{products} {policy}: {json.dumps(found)}", flush=True)
            if options.out:
                options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
