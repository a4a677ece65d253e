#!/usr/bin/env python3
"""What drafts from the text gain on a repetitive prompt, stock vLLM and policies side by side.

    python -m benchmarks.speculation --out benchmarks/results/cpu-zen4-speculation.json

Every engine answers one prompt that is a list going on and on, greedily. Engines with drafts and without follow each
other, each in a process of its own, several times over: gains are ratios of neighbours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.child import report_record, run_child
from kvserve.default_model import prepare_default_model
from kvserve.measuring.machine import machine, versions

MODULE = "benchmarks.speculation"
POLICIES = ("stock", "none", "int8", "kivi-2bit")
DRAFTS = 4
NGRAM = {"method": "ngram", "num_speculative_tokens": DRAFTS, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
LINE = "Item {}: the red boat carries salt, the blue boat carries rope, and the old boat carries nothing.\n"
LINES, OUTPUT_TOKENS, ANSWERS = 60, 256, 3


def measure(policy: str, with_drafts: bool, dtype: str) -> dict[str, Any]:
    """One engine: tokens per second of each answer behind a warm one, and the text."""
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {
        "dtype": dtype, "enforce_eager": True, "max_model_len": 4096, "kv_cache_memory_bytes": 512 << 20,
        "max_num_seqs": 4, "enable_prefix_caching": False, "disable_log_stats": False,
    }  # fmt: skip
    if policy != "stock":
        options |= {"additional_config": {"kvserve": {"policy": policy}}, "block_size": 64}
    if with_drafts:
        options["speculative_config"] = NGRAM
    llm = LLM(model=str(prepare_default_model()), **options)
    prompt: Any = {"prompt": "".join(LINE.format(number) for number in range(1, LINES))}
    rates, tokens = [], []
    for _ in range(ANSWERS + 1):
        # The prompt is timed alone: drafts change nothing about it.
        seconds = []
        for max_tokens in (1, OUTPUT_TOKENS):
            sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
            start = time.perf_counter()
            (output,) = llm.generate([prompt], sampling, use_tqdm=False)
            seconds.append(time.perf_counter() - start)
        rates.append((OUTPUT_TOKENS - 1) / (seconds[1] - seconds[0]))
        tokens = list(output.outputs[0].token_ids)
    counts = {metric.name: getattr(metric, "value", 0.0) for metric in llm.get_metrics()}
    names = ("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens")
    return {
        "tokens_per_second": rates[1:],
        "tokens": tokens,
        "drafted_accepted": [counts.get(name, 0) for name in names],
    }


def summary(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Of engines (without drafts, with drafts): the gain of each pair, and whether all texts are equal."""
    rates = [[statistics.median(one["tokens_per_second"]) for one in pair] for pair in pairs]
    gains = [drafted / plain for plain, drafted in rates]
    return {
        "tokens_per_second": [round(statistics.median(column), 1) for column in zip(*rates, strict=True)],
        "gain": {"median": statistics.median(gains), "low": min(gains), "high": max(gains)},
        "same_text": len({tuple(one["tokens"]) for pair in pairs for one in pair}) == 1,
        "drafted_accepted": pairs[0][1]["drafted_accepted"],
    }


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path, help="result file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print("\n" + json.dumps(measure(options.child[0], options.child[1] == "1", options.dtype)))
        return 0
    pairs: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {policy: [] for policy in options.policies}
    for repeat in range(options.repeats):
        for policy in options.policies:
            plain, drafted = (
                run_child(MODULE, "--dtype", options.dtype, "--child", policy, with_drafts) for with_drafts in "01"
            )
            pairs[policy].append((plain, drafted))
            print(f"repeat {repeat + 1}, {policy}: {summary(pairs[policy])['gain']['median']:.2f}x", flush=True)
    record = {
        "schema": 1,
        "command": ["python", "-m", "benchmarks.speculation", *(Path(word).name for word in sys.argv[1:])],
        "dtype": options.dtype, "drafts": DRAFTS, "output_tokens": OUTPUT_TOKENS, "machine": machine(),
        "versions": versions(), "policies": {policy: summary(found) for policy, found in pairs.items()},
    }  # fmt: skip
    report_record(record, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
