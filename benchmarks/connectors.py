#!/usr/bin/env python3
"""What a prefix that another engine computed saves: vLLM's ExampleConnector, stock and policies side by side.

    python -m benchmarks.connectors --out benchmarks/results/cpu-zen4-connectors.json

One engine computes prompts and writes their tiles into files, a second one reads them. Both are timed to the first
token, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.child import report_record, run_child
from kvserve.calibration.corpus import default_corpus
from kvserve.connectors import wrapped
from kvserve.default_model import prepare_default_model
from kvserve.measuring.machine import machine, versions
from kvserve.policies.loading import load_policy

MODULE = "benchmarks.connectors"
POLICIES = ("stock", "none", "int8", "kivi-2bit")
PROMPT_TOKENS, PROMPTS, OUTPUT_TOKENS = 4096, 3, 32


def measure(policy: str, dtype: str, folder: str) -> dict[str, Any]:
    """One engine: seconds to the first token of each prompt, its text, and how many of its tokens were found."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    transfer: dict[str, Any] = {
        "kv_connector": "ExampleConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": folder},
    }  # fmt: skip
    options: dict[str, Any] = {
        "dtype": dtype, "enforce_eager": True, "max_model_len": PROMPT_TOKENS + 64, "kv_cache_memory_bytes": 1 << 30,
        "max_num_seqs": 4, "max_num_batched_tokens": PROMPT_TOKENS + 64,
    }  # fmt: skip
    if policy != "stock":
        changes = {"sink_tokens": 0} if load_policy(policy).sink_tokens else {}
        options |= {"additional_config": {"kvserve": {"policy": policy, "set": changes}}, "block_size": 64}
        transfer = wrapped(transfer)
    llm = LLM(model=str(prepare_default_model()), kv_transfer_config=KVTransferConfig(**transfer), **options)
    tokens = llm.get_tokenizer().encode(default_corpus().text)
    seconds, texts, cached = [], [], []
    for number in range(PROMPTS + 1):  # the first one warms up
        prompt: Any = {"prompt_token_ids": tokens[number * PROMPT_TOKENS : (number + 1) * PROMPT_TOKENS]}
        start = time.perf_counter()
        (output,) = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
        seconds.append(time.perf_counter() - start)
        cached.append(output.num_cached_tokens)
        sampling = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
        texts.append(list(llm.generate([prompt], sampling, use_tqdm=False)[0].outputs[0].token_ids))
    return {"seconds": seconds[1:], "texts": texts[1:], "cached": cached[1:]}


def compare(policy: str, dtype: str) -> dict[str, Any]:
    """An engine that computes prompts, and one that finds them."""
    with tempfile.TemporaryDirectory() as folder:
        storage = str(Path(folder) / "kv")
        first, second = (run_child(MODULE, "--dtype", dtype, "--child", policy, storage) for _ in range(2))
        size_bytes = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
    ratios = [one / other for one, other in zip(first["seconds"], second["seconds"], strict=True)]
    return {
        "seconds_to_first_token": {"computed": first["seconds"], "found": second["seconds"]},
        "gain": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
        "tokens_found": second["cached"],
        "bytes_per_prompt": size_bytes / (PROMPTS + 1),
        "same_texts": sum(one == other for one, other in zip(first["texts"], second["texts"], strict=True)),
    }


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path, help="result file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print("\n" + json.dumps(measure(options.child[0], options.dtype, options.child[1])))
        return 0
    found = {}
    for policy in options.policies:
        found[policy] = compare(policy, options.dtype)
        print(f"{policy}: {found[policy]['gain']['median']:.1f}x to the first token", flush=True)
    record = {
        "schema": 1, "command": ["python", "-m", MODULE, *(Path(word).name for word in sys.argv[1:])],
        "dtype": options.dtype, "prompt_tokens": PROMPT_TOKENS, "prompts": PROMPTS, "output_tokens": OUTPUT_TOKENS,
        "machine": machine(), "versions": versions(), "policies": found,
    }  # fmt: skip
    report_record(record, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
