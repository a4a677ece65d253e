#!/usr/bin/env python3
"""The atlas' peers on its own prompts: NVIDIA kvpress and Hugging Face's quantised cache, with transformers alone.

`benchmarks/atlas.py` runs it, in an environment of its own, because kvpress wants another transformers:

    python -m benchmarks.atlas_peers quality --model FOLDER --prompts prompts.json --out quality.json
    python -m benchmarks.atlas_peers speed --model FOLDER --out speed.json

Quality has the layout of `kvserve eval`'s raw results: the same windows and questions, distances to transformers' own
dense cache. The tokens behind a prompt are given one by one, as `kvserve eval` gives them. A press compresses a prompt
whole and keeps as many tokens as kvserve does at that rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kvpress import ObservedAttentionPress
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, QuantizedCache
from transformers.utils.logging import disable_progress_bar

from benchmarks.kvpress_parity import make_press
from kvserve.evals.distances import distances
from kvserve.evals.tasks.base import score

DENSE = "hf-dense"
QUANTISED = {"hf-quanto-4bit": 4, "hf-quanto-2bit": 2}
PRESSES = ("snapkv", "ada-snapkv", "pyramidkv", "tova", "keydiff", "expected-attention", "observed-attention")
ALL_RATES = ("snapkv",)  # the others at RATE
RATE, RATES = "4", ("2", "4", "8")
TIMED = (DENSE, "snapkv@2", "snapkv@4", "snapkv@8", "ada-snapkv@4", *QUANTISED)
PACKAGES = ("kvpress", "optimum-quanto", "torch", "transformers")


@dataclass(frozen=True)
class Peer:
    """One way to keep the cache: a label, and its press where it has one."""

    label: str

    @property
    def rate(self) -> str:
        """Of a press; empty for others."""
        return self.label.partition("@")[2]

    def press(self, num_tokens: int, kept_tokens: int) -> Any:
        """The press that keeps `kept_tokens`."""
        return make_press(self.label.partition("@")[0], num_tokens, kept_tokens)

    def cache(self, config: Any) -> Any:
        """An empty cache, with transformers' own parameters where it is quantised."""
        bits = QUANTISED.get(self.label)
        return QuantizedCache("quanto", config, nbits=bits) if bits else DynamicCache()


def peers() -> list[Peer]:
    """The dense cache first, since the others are compared with it."""
    pressed = [f"{name}@{rate}" for name in PRESSES for rate in (RATES if name in ALL_RATES else (RATE,))]
    return [Peer(label) for label in (DENSE, *QUANTISED, *pressed)]


class Model:
    """The transformers model, float32."""

    def __init__(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        ends = self.model.generation_config.eos_token_id
        self.ends = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id}

    @torch.no_grad()
    def prefill(self, peer: Peer, tokens: torch.Tensor, kept_tokens: int = 0) -> tuple[Any, torch.Tensor]:
        """Run prompts [batch, n] and compress them; returns the cache and the logits [batch, vocabulary]."""
        press = peer.press(tokens.shape[1], kept_tokens) if peer.rate else None
        # It scores by the attention weights, which only the eager implementation returns.
        self.model.set_attn_implementation("eager" if isinstance(press, ObservedAttentionPress) else "sdpa")
        cache = peer.cache(self.model.config)
        with press(self.model) if press else nullcontext():
            logits = self.model(tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        self.model.set_attn_implementation("sdpa")
        return cache, logits

    @torch.no_grad()
    def step(self, cache: Any, tokens: torch.Tensor, position: int) -> torch.Tensor:
        """One token [batch] at its position in the uncompressed text; returns the logits behind it."""
        positions = torch.full((len(tokens), 1), position)
        return self.model(tokens[:, None], past_key_values=cache, position_ids=positions).logits[:, -1]

    def follow(self, peer: Peer, context: list[int], given: list[int], kept: int) -> tuple[np.ndarray, int]:
        """Log-probabilities [len(given) - 1, vocabulary] behind all but the last given token, and the cache's bytes."""
        cache, _ = self.prefill(peer, torch.tensor([context]), kept)
        held = held_bytes(cache)
        rows = [
            self.step(cache, torch.tensor([token]), len(context) + index)[0].log_softmax(-1)
            for index, token in enumerate(given[:-1])
        ]
        return torch.stack(rows).numpy(), held

    def answer(self, peer: Peer, prompt: list[int], num_tokens: int, kept: int) -> str:
        """Greedy text."""
        cache, logits = self.prefill(peer, torch.tensor([prompt]), kept)
        found = [int(logits.argmax())]
        while found[-1] not in self.ends and len(found) < num_tokens:
            found.append(int(self.step(cache, torch.tensor(found[-1:]), len(prompt) + len(found) - 1).argmax()))
        return self.tokenizer.decode(found, skip_special_tokens=True)


def held_bytes(cache: Any) -> int:
    """What a cache holds: codes as they are, every float as one of 16 bits."""
    return sum(tensor_bytes(tensor) for layer in cache.layers for tensor in layer_tensors(layer))


def layer_tensors(layer: Any) -> Iterator[torch.Tensor]:
    yield from (layer.keys, layer.values)
    for name in ("_quantized_keys", "_quantized_values"):
        quantised = getattr(layer, name, None)
        if quantised is not None:
            yield from (quantised._data._data, quantised._scale, quantised._shift)


def tensor_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * (2 if tensor.is_floating_point() else tensor.element_size())


def quality(options: argparse.Namespace) -> None:
    """Every peer on every window and question; a run that was stopped goes on with its file."""
    model, content = Model(options.model), json.loads(options.prompts.read_text())
    record = started(options) | {"prompts_sha256": content["sha256"], "held": {}, "raw": {}}
    config, contexts = model.model.config, [len(window["context"]) for window in content["windows"]]
    record |= {"model": shape(config), "context_tokens": contexts}
    if options.out.exists():
        before = json.loads(options.out.read_text())
        if before["prompts_sha256"] != content["sha256"]:
            sys.exit(f"{options.out} is of other prompts: remove it")
        record |= {name: before[name] for name in ("started", "held", "raw")}
    dense = [model.follow(Peer(DENSE), **text(window, ""))[0] for window in content["windows"]]
    for peer in peers():
        if peer.label in record["raw"]:
            continue
        windows, held = [], []
        for window, expected in zip(content["windows"], dense, strict=True):
            found, held_now = model.follow(peer, **text(window, peer.rate))
            windows.append(distances(expected, found, window["continuation"][1:]).to_dict())
            held.append(held_now / dense_bytes(config, len(window["context"])))
        result: dict[str, Any] = {"text": {"windows": windows, "greedy_tokens": []}}
        for task, questions in content["questions"].items():
            result[task] = [asked(model, peer, question) for question in questions]
        record["raw"][peer.label], record["held"][peer.label] = result, held
        write(options.out, record, peer.label)
    write(options.out, record | {"finished": True}, "finished")


def text(window: dict[str, Any], rate: str) -> dict[str, Any]:
    kept = window["kept_tokens"].get(rate, len(window["context"]))
    return {"context": window["context"], "given": window["continuation"], "kept": kept}


def asked(model: Model, peer: Peer, question: dict[str, Any]) -> dict[str, Any]:
    prompt = question["prompt"]
    kept = question["kept_tokens"].get(peer.rate, len(prompt))
    answer = model.answer(peer, prompt, question["answer_tokens"], kept)
    return {**question["labels"], "answer": answer, "score": score(answer, question["labels"]["expected"])}


def shape(config: Any) -> dict[str, int]:
    """What a KV cache needs to know about a model."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return {"layers": config.num_hidden_layers, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}


def dense_bytes(config: Any, num_tokens: int) -> int:
    """Of a 16-bit cache."""
    found = shape(config)
    return num_tokens * found["layers"] * found["kv_heads"] * found["head_dim"] * 2 * 2


def speed(options: argparse.Namespace) -> None:
    """Time of a decode step, all peers in turn."""
    model, record = Model(options.model), started(options)
    tokens = torch.randint(0, 10_000, (options.sequences, options.context), generator=torch.Generator().manual_seed(0))
    caches, masked, held = {}, {}, {}
    for label in TIMED:
        peer = Peer(label)
        kept = options.context // int(peer.rate) if peer.rate else options.context
        caches[label], masked[label] = model.prefill(peer, tokens, kept)[0], masked_keys(model)
        held[label] = held_bytes(caches[label]) / (options.sequences * dense_bytes(model.model.config, options.context))
        print(f"speed: {label} prefilled", file=sys.stderr, flush=True)
    seconds: dict[str, list[float]] = {label: [] for label in TIMED}
    position = options.context
    for repeat in range(options.repeats):
        for label in (*TIMED[repeat % len(TIMED) :], *TIMED[: repeat % len(TIMED)]):
            set_masked_keys(model, masked[label])
            times = []
            for step in range(options.steps):
                start = time.perf_counter()
                model.step(caches[label], tokens[:, 0], position + step)
                times.append(time.perf_counter() - start)
            seconds[label].append(statistics.mean(times))
            progress = f"speed {repeat + 1}/{options.repeats} {label}: {seconds[label][-1]:.3f} s"
            print(progress, file=sys.stderr, flush=True)
        position += options.steps
    record |= {
        "sequences": options.sequences, "context_tokens": options.context, "threads": torch.get_num_threads(),
        "step_seconds": seconds, "held": held, "finished": True,
    }  # fmt: skip
    write(options.out, record, "speed")


def masked_keys(model: Model) -> list[Any]:
    """Which keys AdaKV masks, by layer: kvpress keeps it in the attention modules, not in the cache, until a prompt."""
    return [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.model.layers]


def set_masked_keys(model: Model, masked: list[Any]) -> None:
    for layer, indices in zip(model.model.model.layers, masked, strict=True):
        layer.self_attn.masked_key_indices = indices


def started(options: argparse.Namespace) -> dict[str, Any]:
    arguments = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    return {
        "schema": 1, "command": ["python", "-m", "benchmarks.atlas_peers", *arguments],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "versions": {name: version(name) for name in PACKAGES},
    }  # fmt: skip


def write(path: Path, record: dict[str, Any], done: str) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{time.strftime('%H:%M:%S')} {done}", file=sys.stderr, flush=True)


def main() -> int:
    """Quality or speed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("quality", "speed"))
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--prompts", type=Path, help="from benchmarks/atlas.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    disable_progress_bar()
    (quality if options.what == "quality" else speed)(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
