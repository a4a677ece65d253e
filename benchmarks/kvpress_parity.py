#!/usr/bin/env python3
"""NVIDIA kvpress on the prompts of `python -m benchmarks.eviction_quality`, at the same numbers of kept tokens.

Needs no vLLM, and an environment of its own, because kvpress wants another transformers:

    python -m venv kvpress && kvpress/bin/pip install kvpress==0.5.5 pydantic pyyaml
    kvpress/bin/python -m benchmarks.kvpress_parity --model FOLDER --prompts prompts.json --out out.json

A prompt is compressed whole, its question included, and the first answer token comes from the whole prompt. The dense
prefill is shared: behind each layer every press's own forward hook cuts the layer's cache, which is what happens in a
run with one press. The tokens it kept are then attended to as those of kvserve's policies are.
`--check` compares the answers with runs of one press each through kvpress and transformers alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import MethodType, SimpleNamespace
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
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from benchmarks.evicted_model import EvictedModel, Prompt, PromptLayer
from benchmarks.eviction_prompts import PromptSet

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
NEEDS_ATTENTION = "observed-attention"  # of transformers' eager implementation


def make_press(name: str, num_tokens: int, kept_tokens: int) -> Any:
    """The press that keeps `kept_tokens`: kvpress keeps int(n * (1 - ratio)); half a token more survives rounding."""
    ratio = 0.0 if kept_tokens >= num_tokens else 1 - (kept_tokens + 0.5) / num_tokens
    return PRESSES[name](compression_ratio=ratio)


class Presses:
    """The model, and what presses keep of its prompts."""

    def __init__(self, folder: str) -> None:
        self.evicted = EvictedModel(folder)
        self.attentions = self.evicted.model.model.layers
        for layer in self.attentions:  # as BasePress does
            layer.self_attn.rotary_emb = self.evicted.model.model.rotary_emb

    @torch.no_grad()
    def prefill(self, tokens: list[int], presses: dict[str, list[Any]]) -> tuple[Prompt, torch.Tensor]:
        """Run the prompt once, and every press behind each layer.

        Returns:
            The prompt and what was kept, bool [presses, layers, kv_heads, n].
        """
        kept: list[torch.Tensor] = []

        def after_layer(module: Any, inputs: Any, kwargs: dict[str, Any], output: Any) -> None:
            layer = self.evicted.recorded_layer()
            rows = []
            for name, found in presses.items():
                attention = observed_attention(layer, self.evicted.scale) if name == NEEDS_ATTENTION else None
                rows += [kept_by(press, module, kwargs, (output[0], attention), layer) for press in score_once(found)]
            kept.append(torch.stack(rows))

        for press in [press for found in presses.values() for press in found]:
            press.post_init_from_model(self.evicted.model)
        hooks = [layer.self_attn.register_forward_hook(after_layer, with_kwargs=True) for layer in self.attentions]
        try:
            prompt = self.evicted.prefill(tokens)
        finally:
            for hook in hooks:
                hook.remove()
        return prompt, torch.stack(kept, 1)


def score_once(presses: list[Any]) -> list[Any]:
    """One press at several rates, the scores of the first serving the others where they do not depend on the rate."""
    first = getattr(presses[0], "press", presses[0])  # AdaKV's
    if isinstance(first, StreamingLLMPress):
        return presses
    found: list[torch.Tensor] = []
    compute = type(first).score

    def score(press: Any, *arguments: Any) -> torch.Tensor:
        if not found:
            found.append(compute(press, *arguments))
        return found[0].clone()

    for press in presses:
        scored = getattr(press, "press", press)
        scored.score = MethodType(score, scored)
    return presses


def kept_by(press: Any, module: Any, kwargs: dict[str, Any], output: Any, layer: PromptLayer) -> torch.Tensor:
    """Tokens of one layer that the press's own hook keeps, bool [kv_heads, n]."""
    cached = SimpleNamespace(keys=layer.keys[None], values=layer.values[None])
    cache = SimpleNamespace(layers={module.layer_idx: cached})
    module.masked_key_indices = None
    press.forward_hook(module, [], {**kwargs, "past_key_values": cache}, output)
    found = same_rows(layer.keys, cached.keys[0])
    if module.masked_key_indices is not None:  # AdaKV masks instead of cutting
        _, heads, tokens = module.masked_key_indices
        found[heads, tokens] = False
        module.masked_key_indices = None
    return found


def same_rows(keys: torch.Tensor, cut: torch.Tensor) -> torch.Tensor:
    """Which of the keys [kv_heads, n, d] are in `cut` [kv_heads, m, d], by the bits of their first two channels."""
    found = torch.stack([torch.isin(bits(a), bits(b)) for a, b in zip(keys, cut, strict=True)])
    if not bool((found.sum(1) == cut.shape[1]).all()):
        raise RuntimeError("two keys of a head begin with the same two channels: compare more of them")
    return found


def bits(keys: torch.Tensor) -> torch.Tensor:
    """Int64 [n]."""
    return keys[:, :2].contiguous().view(torch.int64)[:, 0]


def observed_attention(layer: PromptLayer, scale: float) -> torch.Tensor:
    """The probabilities [1, num_heads, n, n] that eager attention returns."""
    n = layer.keys.shape[1]
    keys = layer.keys.repeat_interleave(layer.queries.shape[0] // layer.keys.shape[0], 0)
    logits = layer.queries @ keys.mT * scale
    return logits.masked_fill_(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)[None]


def run(
    presses: Presses,
    content: dict[str, Any],
    names: list[str],
    decode: Any,
    record: dict[str, Any],
    save: Any,
    part: str,
) -> None:
    """Fill the tables of the record, from where they end: press, rate, one entry a prompt."""
    prompts, kept_counts = PromptSet.from_json(content["prompts"]), content["kept_tokens"]
    rates, model = list(kept_counts["questions"]), presses.evicted

    def add(table: str, values: list[Any]) -> None:
        for (name, rate), value in zip([(name, rate) for name in names for rate in rates], values, strict=True):
            record[table].setdefault(name, {}).setdefault(rate, []).append(value)

    def compressed(tokens: list[int], counts: dict[str, list[int]], index: int) -> tuple[Prompt, torch.Tensor]:
        torch.manual_seed(index)  # RandomPress
        made = {name: [make_press(name, len(tokens), counts[rate][index]) for rate in rates] for name in names}
        return presses.prefill(tokens, made)

    def left(table: str, found: list[Any]) -> list[tuple[int, Any]]:
        done = len(record[table][names[-1]][rates[-1]]) if record[table] else 0
        return list(enumerate(found))[done:]

    for index, question in left("answers", prompts.questions) if part != "texts" else []:
        prompt, kept = compressed(question.tokens, kept_counts["questions"], index)
        outputs = model.generate(prompt, kept, content["max_tokens"], set(prompts.end_tokens))
        add("answers", [decode(output) for output in outputs])
        add("kept_tokens", (kept.sum((1, 2, 3)) / kept[0, ..., 0].numel()).tolist())
        save(f"needle {index + 1}/{len(prompts.questions)}")
    for index, text in left("log_likelihoods_nats", prompts.texts) if part != "needles" else []:
        prompt, kept = compressed(text.tokens, kept_counts["texts"], index)
        add("log_likelihoods_nats", model.log_likelihoods(prompt, kept, text.continuation))
        save(f"text {index + 1}/{len(prompts.texts)}")


def resume(record: dict[str, Any], before: dict[str, Any], names: list[str]) -> None:
    """Take over the tables of a run that was stopped."""
    tables = ("answers", "log_likelihoods_nats", "kept_tokens")
    of_names = all(set(before[table]) in (set(), set(names)) for table in tables)
    if before["prompts_sha256"] != record["prompts_sha256"] or not of_names:
        raise SystemExit("--out is of other prompts or presses: remove it or choose another file")
    record |= {table: before[table] for table in tables}


@torch.no_grad()
def check(presses: Presses, folder: str, content: dict[str, Any], names: list[str], decode: Any) -> bool:
    """Whether runs of one press each, through kvpress and transformers alone, give the same answers to one question."""
    prompts, kept_counts = PromptSet.from_json(content["prompts"]), content["kept_tokens"]["questions"]
    tokens, ends = prompts.questions[0].tokens, set(prompts.end_tokens)
    names = [name for name in names if name not in (NEEDS_ATTENTION, "random")]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    same = True
    for name in names:
        made = [make_press(name, len(tokens), counts[0]) for counts in kept_counts.values()]
        prompt, kept = presses.prefill(tokens, {name: made})
        shared = presses.evicted.generate(prompt, kept, content["max_tokens"], ends)
        for (rate, counts), answer in zip(kept_counts.items(), shared, strict=True):
            press = make_press(name, len(tokens), counts[0])  # a new one: the others share their scores
            alone = plain_answer(plain, press, tokens, content["max_tokens"], ends)
            same &= alone == answer
            sign = "==" if alone == answer else "!="
            print(f"{name}@{rate}: {decode(answer)!r} {sign} {decode(alone)!r}", flush=True)
    return same


def plain_answer(model: Any, press: Any, tokens: list[int], max_tokens: int, ends: set[int]) -> list[int]:
    """Greedy tokens with one press, as kvpress's pipeline decodes them."""
    cache = DynamicCache()
    with press(model):
        logits = model(torch.tensor([tokens]), past_key_values=cache, logits_to_keep=1).logits
    output = [int(logits[0, -1].argmax())]
    while output[-1] not in ends and len(output) < max_tokens:
        position = torch.tensor([[len(tokens) + len(output) - 1]])
        logits = model(torch.tensor([output[-1:]]), past_key_values=cache, position_ids=position).logits
        output.append(int(logits[0, -1].argmax()))
    return output


def main() -> int:
    """Run, or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--prompts", type=Path, required=True, help="from benchmarks.eviction_quality --prompts-out")
    parser.add_argument("--presses", default=",".join(PRESSES), help="default: %(default)s")
    parser.add_argument("--part", choices=("all", "needles", "texts"), default="all", help="of the same prompts")
    parser.add_argument("--out", type=Path, help="result file; a run that was stopped goes on with its file")
    parser.add_argument("--check", action="store_true", help="compare with runs of one press each, on one prompt")
    options = parser.parse_args()
    presses, tokenizer = Presses(options.model), AutoTokenizer.from_pretrained(options.model)
    content, names = json.loads(options.prompts.read_text()), options.presses.split(",")
    if options.check:
        return 0 if check(presses, options.model, content, names, tokenizer.decode) else 1
    packages = ("kvpress", "torch", "transformers")
    record: dict[str, Any] = {
        "schema": 1,
        "command": ["python", "-m", "benchmarks.kvpress_parity", *(Path(word).name for word in sys.argv[1:])],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "prompts_sha256": content["sha256"],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "answers": {}, "log_likelihoods_nats": {}, "kept_tokens": {},
    }  # fmt: skip

    def save(progress: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {progress}", file=sys.stderr, flush=True)
        if options.out:
            options.out.write_text(json.dumps(record, indent=1) + "\n")

    if options.out and options.out.exists():
        resume(record, json.loads(options.out.read_text()), names)
    run(presses, content, names, tokenizer.decode, record, save, options.part)
    return 0


if __name__ == "__main__":
    sys.exit(main())
