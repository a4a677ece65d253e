"""What eviction costs and saves: compression of a prompt, decode attention, and rate 1 against `none`.

    python -m benchmarks.eviction_speed [--parts decode adding-up compression rate-one] [--repeats 5] [--out FILE.json]

Ratios are of measurements that alternate; medians with the lowest and highest repeat. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"

import torch
import yaml

from kvserve.attention.base import Answers, Batch, LayerSpec, NewRows, Received, Stored
from kvserve.attention.native import NativeAttention
from kvserve.default_model import prepare_default_model
from kvserve.measuring.engines import Engine, EngineConfig
from kvserve.measuring.shape import ModelShape
from kvserve.pages.kept import Kept, KeptRows, KeptTable
from kvserve.pages.layout import PageLayout
from kvserve.policies.loading import load_policy, policy_content

HEADS, KV_HEADS, HEAD_DIM, REQUESTS, CONTEXT, RATE = 9, 3, 64, 8, 4096, 4
MIB = 1 << 20


def decode_case(name: str) -> tuple[NativeAttention, torch.Tensor, Batch]:
    """One layer that holds REQUESTS x CONTEXT random tokens: whole, or what a policy that evicts leaves of them."""
    policy = load_policy(name)
    layout = PageLayout.build(policy, HEAD_DIM, 64, torch.float32)
    attention = NativeAttention(layout, LayerSpec(HEADS, KV_HEADS, HEAD_DIM**-0.5))
    row_blocks, kept_blocks = layout.blocks_for(CONTEXT + 1), CONTEXT // RATE // 64
    table = torch.arange(REQUESTS * row_blocks, dtype=torch.int32).view(REQUESTS, row_blocks)
    cells = torch.zeros(REQUESTS * (row_blocks + kept_blocks), KV_HEADS, 1, layout.cell_bytes, dtype=torch.uint8)
    key, value = (torch.randn(CONTEXT, KV_HEADS, HEAD_DIM) for _ in range(2))
    for request in range(REQUESTS):
        batch = Batch(torch.tensor([0, CONTEXT]).int(), torch.tensor([CONTEXT]).int(), table[request : request + 1])
        attention.store(key, value, cells[:, :, 0], batch)
    lengths = torch.full((REQUESTS,), CONTEXT + 1, dtype=torch.int32)
    step = Batch(torch.arange(REQUESTS + 1).int(), lengths, table)
    if policy.eviction:
        step.kept = KeptTable.of([_evict(attention, cells, table, request, kept_blocks) for request in range(REQUESTS)])
    return attention, cells[:, :, 0], step


def _evict(attention: NativeAttention, cells: torch.Tensor, table: torch.Tensor, request: int, count: int) -> Kept:
    first = table.numel() + request * count
    kept = Kept(CONTEXT, tuple(range(first, first + count)))
    keys, values = attention.read(Stored(cells[:, :, 0], table[request], CONTEXT), 0, CONTEXT)
    assert values is not None
    chosen = torch.arange(0, CONTEXT, RATE)
    rows = KeptRows(*([head[chosen] for head in kind] for kind in (keys, values)))
    attention.write_kept(cells[:, :, 0], int(table[request, 0]), kept, [i * count for i in range(KV_HEADS)], rows)
    return kept


def decode_attention(repeats: int) -> dict[str, Any]:
    """Milliseconds of one decode step of one layer, REQUESTS x CONTEXT."""
    names = ["none", "kv-compress", "kv-compress-2bit"]
    cases = {name: decode_case(name) for name in names}
    query, key, value = (torch.randn(REQUESTS, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    output = torch.empty_like(query)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats + 1):
        for name, (attention, cells, batch) in cases.items():
            start = time.perf_counter()
            for _ in range(20):
                attention.forward(NewRows(query, key, value), cells, batch, Answers(output))
            samples[name].append((time.perf_counter() - start) / 20 * 1e3)
    return {name: times[1:] for name, times in samples.items()}


def adding_up(repeats: int) -> dict[str, list[float]]:
    """Milliseconds of the same step for `h2o` at rate 4, with and without adding up the attention tokens receive."""
    attention, cells, batch = decode_case("h2o")
    query, key, value = (torch.randn(REQUESTS, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    output, sums = torch.empty_like(query), {r: torch.zeros(KV_HEADS, CONTEXT) for r in range(REQUESTS)}
    ways = {"attention alone": None, "with sums": Received(1, sums)}
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, received in ways.items():
            start = time.perf_counter()
            for _ in range(50):
                attention.forward(NewRows(query, key, value), cells, batch, Answers(output), received)
            samples[name].append((time.perf_counter() - start) / 50 * 1e3)
    return {name: times[1:] for name, times in samples.items()}


def engine(policy: str) -> Any:
    """An engine in this process."""
    from vllm import LLM

    from kvserve.engine.settings import scheduler_options

    settings = {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 8192, "kv_cache_memory_bytes": 2048 * MIB,
        "block_size": 64, "additional_config": {"kvserve": {"policy": policy}},
        "enable_prefix_caching": False, "max_num_batched_tokens": 4096, "max_num_seqs": 32,
    }  # fmt: skip
    return LLM(model=str(prepare_default_model()), **settings, **scheduler_options())


def prompts_of(lengths: list[int], seed: int) -> list[dict[str, list[int]]]:
    generator = random.Random(seed)
    return [{"prompt_token_ids": [generator.randrange(1000, 40000) for _ in range(length)]} for length in lengths]


def compression(repeats: int) -> dict[str, list[float]]:
    """Seconds to the first token of a CONTEXT prompt: kept whole, and evicted at rate 4."""
    from vllm import SamplingParams

    llm = engine("kv-compress")
    samples: dict[str, list[float]] = {"whole": [], "evicted": []}
    for repeat in range(repeats + 1):
        for name, own in (("whole", {"kvserve_off": 1}), ("evicted", {})):
            sampling = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, extra_args=own)
            start = time.perf_counter()
            llm.generate(prompts_of([CONTEXT], repeat), sampling, use_tqdm=False)
            samples[name].append(time.perf_counter() - start)
            print(f"compression {repeat}/{repeats} {name}: {samples[name][-1]:.2f} s", flush=True)
    llm.llm_engine.engine_core.shutdown()
    return {name: times[1:] for name, times in samples.items()}


def rate_one(repeats: int) -> tuple[dict[str, list[list[int]]], dict[str, list[float]]]:
    """Greedy tokens of 32 mixed prompts, and seconds of each repeat: two engines that take turns."""
    model = prepare_default_model()
    shape = ModelShape.from_hf(json.loads((model / "config.json").read_text()))
    config = EngineConfig(str(model), shape, "float32", 2048, seed=0, kv_bytes=2048 * MIB)
    prompts = [prompt["prompt_token_ids"] for prompt in prompts_of([40 + 37 * i for i in range(32)], 7)]
    tokens: dict[str, list[list[int]]] = {}
    seconds: dict[str, list[float]] = {"none": [], "kv-compress@1 codec=dense": []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        file = Path(folder) / "rate-one.yaml"
        file.write_text(yaml.safe_dump(policy_content(load_policy("kv-compress@1", ["codec=dense"]))))
        sources = zip(seconds, ("none", str(file)), strict=True)
        engines = {name: stack.enter_context(Engine(source, config)) for name, source in sources}
        for repeat in range(repeats + 1):
            for name, host in engines.items():
                found = host.call("generate", prompts=prompts, max_tokens=32)
                tokens[name] = found.tokens
                seconds[name].append(found.seconds)
                print(f"rate one {repeat}/{repeats} {name}: {found.seconds:.2f} s", flush=True)
    return tokens, {name: times[1:] for name, times in seconds.items()}


def spread(ratios: list[float]) -> dict[str, float]:
    return {"median": round(median(ratios), 4), "min": round(min(ratios), 4), "max": round(max(ratios), 4)}


def ratios(above: list[float], below: list[float]) -> dict[str, float]:
    return spread([a / b for a, b in zip(above, below, strict=True)])


def measure_decode(repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    raw = decode_attention(repeats)
    names = ("kv-compress", "kv-compress-2bit")
    title = "decode attention 8 x 4096, {} at rate 4, times faster than none"
    return raw, {title.format(name): ratios(raw["none"], raw[name]) for name in names}


def measure_adding_up(repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    raw = adding_up(repeats)
    title = "decode attention 8 x 4096, h2o at rate 4, with sums of attention over without"
    return raw, {title: ratios(raw["with sums"], raw["attention alone"])}


def measure_compression(repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    raw = compression(repeats)
    return raw, {"prefill of 4096 tokens, evicted over whole": ratios(raw["evicted"], raw["whole"])}


def measure_rate_one(repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    tokens, seconds = rate_one(repeats)
    (none, expected), (rate, found) = tokens.items()
    same = sum(a == b for a, b in zip(expected, found, strict=True))
    title = f"rate 1 with dense pages ({same} of 32 texts equal), seconds over none's"
    return {**seconds, "equal_texts": same}, {title: ratios(seconds[rate], seconds[none])}


PARTS = {
    "decode": measure_decode,
    "adding-up": measure_adding_up,
    "compression": measure_compression,
    "rate-one": measure_rate_one,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="What eviction costs and saves.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    raw: dict[str, Any] = {}
    rows: dict[str, Any] = {}
    for part in options.parts:
        raw[part], found = PARTS[part](options.repeats)
        rows |= found
    for name, row in rows.items():
        print(f"{name}: {row['median']} ({row['min']} to {row['max']})")
    if options.out:
        machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        record = {"command": ["python", *sys.argv], "machine": machine, "torch": torch.__version__}
        options.out.write_text(json.dumps({**record, "rows": rows, "raw": raw}, indent=1) + "\n")


if __name__ == "__main__":
    main()
