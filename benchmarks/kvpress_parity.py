#!/usr/bin/env python3
"""NVIDIA kvpress on the prompts of `python -m kvserve.bench.eviction_quality`, at the same numbers of kept tokens.

Needs no kvserve and no vLLM, but kvpress and PyTorch, best in an environment of their own:

    python -m venv kvpress && kvpress/bin/pip install kvpress==0.5.5
    kvpress/bin/python benchmarks/kvpress_parity.py --model FOLDER --prompts prompts.json --out kvpress.json

A prompt is compressed whole, its question included, and the first answer token comes from the whole prompt. The dense
prefill is shared: each press's own forward hook runs on the layer's inputs and outputs with a cache of its own, which
is what kvpress does in a run with one press (`--check` compares the two). Answers are decoded by transformers with
kvpress's attention patch. Log-likelihoods of the many tokens of a continuation use plain masked attention over the same
caches: a mask of transformers has one length for all layers (PyramidKV differs), and AdaKV's fake keys are made for one
token.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from kvpress import (
    AdaKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    ObservedAttentionPress,
    PyramidKVPress,
    RandomPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, DynamicCache

MASKED = "kvpress_parity_masked"
PRESSES = {
    "snapkv": SnapKVPress,
    "ada-snapkv": lambda **ratio: AdaKVPress(SnapKVPress(**ratio)),
    "pyramidkv": PyramidKVPress,
    "tova": TOVAPress,
    "knorm": KnormPress,
    "keydiff": KeyDiffPress,
    "streaming-llm": StreamingLLMPress,
    "random": RandomPress,
    "expected-attention": ExpectedAttentionPress,
    "observed-attention": ObservedAttentionPress,
}
# The same presses with the window and the pooling that kvserve takes from the papers' code.
PAPER_PRESSES = {
    "snapkv-w32": lambda **ratio: SnapKVPress(window_size=32, kernel_size=7, **ratio),
    "ada-snapkv-w32": lambda **ratio: AdaKVPress(SnapKVPress(window_size=32, kernel_size=7, **ratio)),
    "pyramidkv-w8": lambda **ratio: PyramidKVPress(window_size=8, kernel_size=7, **ratio),
}


class Variant:
    """One press at one rate: its cache, and what AdaKV masks in each layer."""

    def __init__(self, name: str, rate: str, num_tokens: int, kept_tokens: int) -> None:
        # kvpress keeps int(n * (1 - ratio)); half a token more survives rounding.
        ratio = 0.0 if kept_tokens >= num_tokens else 1 - (kept_tokens + 0.5) / num_tokens
        self.name, self.rate = name, rate
        self.press = (PRESSES | PAPER_PRESSES)[name](compression_ratio=ratio)
        self.cache = DynamicCache()
        self.masked: dict[int, Any] = {}

    def after_layer(self, module: Any, kwargs: dict[str, Any], output: Any, keys: Any, values: Any) -> None:
        """What kvpress's hook does behind this layer."""
        self.cache.update(keys, values, module.layer_idx)
        module.masked_key_indices = None
        self.press.forward_hook(module, [], {**kwargs, "past_key_values": self.cache}, output)
        self.masked[module.layer_idx] = module.masked_key_indices

    def kept_tokens(self) -> float:
        """Tokens of a KV head, on average."""
        heads = self.cache.layers[0].keys.shape[1]
        held = sum(layer.keys.shape[2] for layer in self.cache.layers)
        masked = sum(len(found[0]) for found in self.masked.values() if found is not None)
        return (held - masked / heads) / len(self.cache.layers)


class Runner:
    """The model with all presses."""

    def __init__(self, folder: str) -> None:
        AttentionInterface.register(MASKED, masked_attention)
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        for layer in self.model.model.layers:  # as BasePress does
            layer.self_attn.rotary_emb = self.model.model.rotary_emb
        self.implementation = self.model.config._attn_implementation

    def prefill(self, tokens: list[int], variants: list[Variant]) -> torch.Tensor:
        """Run the prompt once and let every variant compress its own copy; logits of the last token."""
        hooks = []
        for variant in variants:
            variant.press.post_init_from_model(self.model)

        def hook(module: Any, inputs: Any, kwargs: dict[str, Any], output: Any) -> None:
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            attention = self._attention(module, kwargs, layer.keys)
            for variant in variants:
                observed = (output[0], attention if variant.name == "observed-attention" else None)
                variant.after_layer(module, kwargs, observed, layer.keys, layer.values)
            layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]

        try:
            hooks += [
                layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in self.model.model.layers
            ]
            return self.model(torch.tensor([tokens]), past_key_values=DynamicCache(), logits_to_keep=1).logits[0, -1]
        finally:
            for handle in hooks:
                handle.remove()

    def _attention(self, module: Any, kwargs: dict[str, Any], keys: torch.Tensor) -> torch.Tensor:
        """The attention probabilities that transformers' eager attention returns."""
        states = kwargs["hidden_states"]
        n = states.shape[1]
        query = module.q_proj(states).view(1, n, -1, module.head_dim).transpose(1, 2)
        cos, sin = kwargs["position_embeddings"]
        half = module.head_dim // 2
        turned = torch.cat([-query[..., half:], query[..., :half]], -1)
        query = query * cos[:, None] + turned * sin[:, None]
        keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], 1)
        logits = query @ keys.mT / math.sqrt(module.head_dim)
        return logits.masked_fill_(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)

    def answer(self, variant: Variant, first: int, position: int, max_tokens: int, ends: set[int]) -> list[int]:
        """Greedy tokens behind the prompt, with transformers' and kvpress's own attention."""
        self._use(variant, self.implementation)
        output = [first]
        while output[-1] not in ends and len(output) < max_tokens:
            step = torch.tensor([[position + len(output) - 1]])
            logits = self.model(torch.tensor([output[-1:]]), past_key_values=variant.cache, position_ids=step).logits
            output.append(int(logits[0, -1].argmax()))
        return output

    def log_likelihood(self, variant: Variant, logits: torch.Tensor, position: int, continuation: list[int]) -> float:
        """Sum of the log probabilities (nats) of the continuation."""
        self._use(variant, MASKED)
        tokens = torch.tensor(continuation)
        positions = torch.arange(position, position + len(tokens) - 1)[None]
        rest = self.model(tokens[None, :-1], past_key_values=variant.cache, position_ids=positions).logits[0]
        found = torch.cat([logits[None], rest])
        return -float(torch.nn.functional.cross_entropy(found, tokens, reduction="sum"))

    def _use(self, variant: Variant, implementation: str) -> None:
        self.model.config._attn_implementation = implementation
        for index, layer in enumerate(self.model.model.layers):
            layer.self_attn.masked_key_indices = variant.masked[index]

    def plain(self, variant: Variant, tokens: list[int], max_tokens: int, ends: set[int]) -> list[int]:
        """As `answer`, by kvpress alone: one press, its context manager, its own prefill."""
        self.model.config._attn_implementation = self.implementation
        cache = DynamicCache()
        with variant.press(self.model):
            logits = self.model(torch.tensor([tokens]), past_key_values=cache, logits_to_keep=1).logits[0, -1]
        again = copy.copy(variant)
        again.cache = cache
        again.masked = {i: layer.self_attn.masked_key_indices for i, layer in enumerate(self.model.model.layers)}
        return self.answer(again, int(logits.argmax()), len(tokens), max_tokens, ends)


def masked_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Attention of the t newest tokens: all cached keys but AdaKV's masked ones, causal among the newest."""
    rows, length = query.shape[2], key.shape[2]
    hidden = torch.zeros(1, key.shape[1], rows, length, dtype=torch.bool)
    hidden |= torch.ones(rows, length, dtype=torch.bool).triu(length - rows + 1)
    if module.masked_key_indices is not None:
        _, heads, tokens = module.masked_key_indices
        hidden[0, heads, :, tokens] = True
    group = query.shape[1] // key.shape[1]
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=~hidden.repeat_interleave(group, 1), scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous(), None


@torch.no_grad()
def run(
    runner: Runner, content: dict[str, Any], names: list[str], decode: Any, record: dict[str, Any], save: Any
) -> None:
    """Fill `record["answers"]`, `record["log_likelihoods_nats"]` and `record["kept_tokens"]`."""
    prompts, kept = content["prompts"], content["kept_tokens"]
    ends = set(prompts["end_tokens"])
    for index, question in enumerate(prompts["questions"]):
        variants = make_variants(names, kept["questions"], index, len(question["tokens"]))
        first = int(runner.prefill(question["tokens"], variants).argmax())
        held = {(variant.name, variant.rate): variant.kept_tokens() for variant in variants}
        for variant in variants:
            answer = runner.answer(variant, first, len(question["tokens"]), content["max_tokens"], ends)
            add(record["answers"], variant, decode(answer))
            add(record["kept_tokens"], variant, held[variant.name, variant.rate])
        save()
        print(
            f"{time.strftime('%H:%M:%S')} needle {index + 1}/{len(prompts['questions'])}", file=sys.stderr, flush=True
        )
    for index, text in enumerate(prompts["texts"]):
        variants = make_variants(names, kept["texts"], index, len(text["tokens"]))
        logits = runner.prefill(text["tokens"], variants)
        for variant in variants:
            nats = runner.log_likelihood(variant, logits, len(text["tokens"]), text["continuation"])
            add(record["log_likelihoods_nats"], variant, nats)
        save()
        say(f"text {index + 1}/{len(prompts['texts'])}")


def say(line: str) -> None:
    """One line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def make_variants(names: list[str], kept: dict[str, list[int]], index: int, num_tokens: int) -> list[Variant]:
    """All presses at all rates, for one prompt."""
    return [Variant(name, rate, num_tokens, counts[index]) for name in names for rate, counts in kept.items()]


def add(table: dict[str, dict[str, list[Any]]], variant: Variant, value: Any) -> None:
    """Append to table[press][rate]."""
    table.setdefault(variant.name, {}).setdefault(variant.rate, []).append(value)


@torch.no_grad()
def check(runner: Runner, content: dict[str, Any], names: list[str], decode: Any) -> bool:
    """Whether the shared prefill answers the first question as runs with one press each do."""
    tokens, ends = content["prompts"]["questions"][0]["tokens"], set(content["prompts"]["end_tokens"])
    names = [
        name for name in names if name not in ("observed-attention", "random")
    ]  # eager attention; a seed each call
    variants = make_variants(names, content["kept_tokens"]["questions"], 0, len(tokens))
    first, same = int(runner.prefill(tokens, variants).argmax()), True
    for variant in variants:
        shared = runner.answer(variant, first, len(tokens), content["max_tokens"], ends)
        plain = runner.plain(variant, tokens, content["max_tokens"], ends)
        same &= shared == plain
        print(
            f"{variant.name}@{variant.rate}: {decode(shared)!r} {'==' if shared == plain else '!='} {decode(plain)!r}"
        )
    return same


def main() -> int:
    """Run, or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--prompts", type=Path, required=True, help="from kvserve.bench.eviction_quality --prompts-out")
    parser.add_argument("--presses", default=",".join(PRESSES | PAPER_PRESSES), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="result file")
    parser.add_argument("--check", action="store_true", help="compare with runs of one press each, on one prompt")
    options = parser.parse_args()
    torch.manual_seed(0)  # RandomPress
    runner, tokenizer = Runner(options.model), AutoTokenizer.from_pretrained(options.model)
    content, names = json.loads(options.prompts.read_text()), options.presses.split(",")
    if options.check:
        return 0 if check(runner, content, names, tokenizer.decode) else 1
    packages = ("kvpress", "torch", "transformers")
    record: dict[str, Any] = {
        "schema": 1,
        "command": ["benchmarks/kvpress_parity.py", *(Path(word).name for word in sys.argv[1:])],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "prompts_sha256": content["sha256"],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "answers": {}, "log_likelihoods_nats": {}, "kept_tokens": {},
    }  # fmt: skip

    def save() -> None:
        if options.out:
            options.out.write_text(json.dumps(record, indent=1) + "\n")

    run(runner, content, names, tokenizer.decode, record, save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
