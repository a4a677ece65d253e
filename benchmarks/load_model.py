#!/usr/bin/env python3
"""As load_distance.py without vLLM: the default model in transformers over the compiled kernels, in packed steps.

    python -m benchmarks.load_model --out benchmarks/results/cpu-zen4-load-model.json

Every step is one packed row of tokens, as an engine has it: a token of each running request, then prompts in order, as
far as its size allows. `--products float64` sums every product of the model in float64, where rounding back to float32
hides the order of the sums: what is left is the cache's own.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.load_distance import OTHERS, PRODUCTS, PROMPTS, compare
from kvserve.attention.base import Answers, Batch, LayerSpec, NewRows
from kvserve.attention.native import NativeAttention
from kvserve.default_model import prepare_default_model
from kvserve.pages.layout import PageLayout
from kvserve.policies.loading import load_policy

NAME = "kvserve_packed"
POLICIES = ("none", "int8", "kivi-2bit", "boost-2bit")


class Float64Product(torch.nn.Module):
    """A linear layer whose sums are float64."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight.detach().double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.double() @ self.weight.T).float()


@dataclass
class Request:
    prompt: list[int]
    row: torch.Tensor
    computed: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    of_prompt: list[float] = field(default_factory=list)

    def next_tokens(self, limit: int) -> list[int]:
        return (self.prompt + self.tokens)[self.computed :][:limit]


class PackedModel:
    """The model over one policy's pages; all requests of a run share an arena."""

    def __init__(self, folder: str, policy: str, products: str) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM

        AttentionInterface.register(NAME, self._attention)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=NAME).eval()
        config = self.model.config
        if products == "float64":
            for module in list(self.model.modules()):
                for name, child in list(module.named_children()):
                    if isinstance(child, torch.nn.Linear):
                        setattr(module, name, Float64Product(child))
        self.layers, self.kv_heads = config.num_hidden_layers, config.num_key_value_heads
        dim = config.hidden_size // config.num_attention_heads
        loaded = load_policy(policy)
        self.layout = PageLayout.build(loaded, dim, 64 if loaded.has_pages else 16, torch.float32)
        self.kernels = NativeAttention(self.layout, LayerSpec(config.num_attention_heads, self.kv_heads, dim**-0.5))
        self.batch: Batch | None = None

    def requests(self, prompts: list[list[int]], max_tokens: int) -> list[Request]:
        """Requests in an arena of their own."""
        width = max(self.layout.blocks_for(len(prompt) + max_tokens) for prompt in prompts)
        rows = torch.arange(width * len(prompts), dtype=torch.int32).view(len(prompts), width)
        shape = (self.layers, width * len(prompts), self.kv_heads, self.layout.cell_bytes)
        self.cells = torch.zeros(shape, dtype=torch.uint8)
        return [Request(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]

    @torch.no_grad()
    def run(self, prompts: list[list[int]], max_tokens: int, step_tokens: int) -> list[Request]:
        """Greedy texts of all prompts, together."""
        requests = self.requests(prompts, max_tokens)
        while waiting := [request for request in requests if len(request.tokens) < max_tokens]:
            room, step = step_tokens, []
            for request in sorted(waiting, key=lambda request: not request.tokens):  # those that decode come first
                if bring := request.next_tokens(room):
                    step.append((request, bring))
                    room -= len(bring)
            self._step(step)
        return requests

    def _step(self, step: list[tuple[Request, list[int]]]) -> None:
        counts = [len(bring) for _, bring in step]
        lengths = [request.computed + count for (request, _), count in zip(step, counts, strict=True)]
        starts = torch.tensor([0, *counts]).cumsum(0)
        table = torch.stack([request.row for request, _ in step])
        self.batch = Batch(starts.int(), torch.tensor(lengths, dtype=torch.int32), table)
        positions = torch.cat([torch.arange(n - count, n) for n, count in zip(lengths, counts, strict=True)])
        tokens = torch.tensor([token for _, bring in step for token in bring])
        hidden = self.model.model(tokens[None], position_ids=positions[None], use_cache=False).last_hidden_state[0]
        logprobs = self.model.lm_head(hidden).log_softmax(-1)
        for (request, _), first, end, length in zip(step, starts, starts[1:], lengths, strict=False):
            following = request.prompt[request.computed + 1 : length + 1]
            request.of_prompt += [logprobs[first + i, token].item() for i, token in enumerate(following)]
            request.computed = length
            if length >= len(request.prompt):
                best = logprobs[end - 1].max(-1)
                request.tokens.append(int(best.indices))
                request.logprobs.append(float(best.values))

    def _attention(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        assert self.batch is not None
        q_rows, k_rows, v_rows = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
        output = torch.empty_like(q_rows)
        self.kernels.forward(NewRows(q_rows, k_rows, v_rows), self.cells[module.layer_idx], self.batch, Answers(output))
        return output[None], None


def pieces(folder: str, longest: int) -> list[list[int]]:
    """English prose that every Python carries, in pieces of 70 to `longest` tokens."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder).encode(topics["types"])
    found, start = [], 0
    for index in range(PROMPTS + OTHERS):
        length = 70 + 97 * index % (longest - 69)
        found.append(tokens[start : start + length])
        start += length
    return found


def measure(folder: str, policy: str, products: str, options: argparse.Namespace) -> dict[str, float]:
    """Every prompt alone, then all together."""
    model, prompts = PackedModel(folder, policy, products), pieces(folder, options.longest)
    alone = [model.run([prompt], options.max_tokens, options.step_tokens)[0] for prompt in prompts[:PROMPTS]]
    together = model.run(prompts[PROMPTS:] + prompts[:PROMPTS], options.max_tokens, options.step_tokens)[OTHERS:]
    found = [[(each.tokens, each.logprobs, each.of_prompt) for each in run] for run in (alone, together)]
    return compare(*found)


def main() -> int:
    """Measure and write after each policy."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--products", nargs="+", default=list(PRODUCTS), choices=PRODUCTS)
    parser.add_argument("--max-tokens", type=int, default=24, help="of each text")
    parser.add_argument("--longest", type=int, default=200, help="tokens of the longest prompt")
    parser.add_argument("--step-tokens", type=int, default=150)
    parser.add_argument("--out", type=Path, required=True, help="result file")
    options = parser.parse_args()
    folder = str(prepare_default_model())
    record: dict[str, Any] = {
        "schema": 1,
        "command": ["python", "-m", "benchmarks.load_model", *(Path(word).name for word in sys.argv[1:])],
        "model": Path(folder).name,
        "together": PROMPTS + OTHERS,
        "nats": {products: {} for products in options.products},
    }
    for products in options.products:
        for policy in options.policies:
            record["nats"][products][policy] = measure(folder, policy, products, options)
            print(products, policy, json.dumps(record["nats"][products][policy]), flush=True)
            options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
