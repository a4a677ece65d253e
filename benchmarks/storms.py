"""What a server is left with after a storm of requests half of which are aborted: pages, answers and memory.

    python -m benchmarks.storms [--policies kivi-2bit h2o] [--requests 200] [--sequential 300] [--out FILE.json]

Per policy one server with a pool of 48 MiB: the same greedy probes before and after the storm, the pages that are free
once it is over, and the resident memory of the server's processes over requests that come one at a time. Exit code 1
where a page is missing or a probe differs. The model is the default one's cache (layers, KV heads, head_dim) with thin
random layers around it, so that a small machine gets through; --model takes a real one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING"}

import httpx
import psutil
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoConfig, AutoModelForCausalLM

from kvserve.bench.server import SERVED_NAME, Server, free_port
from kvserve.default_model import prepare_default_model
from kvserve.measuring.machine import machine, versions
from kvserve.policies.base import Policy
from kvserve.policies.loading import load_policy

MIB = 1 << 20
POOL_BYTES = 48 * MIB
IN_FLIGHT, RUNNING = 32, 24  # so that some wait and some preempt each other
TIMEOUT_SECONDS = 900.0
WORDS = 900  # distinct token ids of a prompt, from FIRST_TOKEN on
FIRST_TOKEN = 1000
RSS_EVERY = 10
THIN = 72  # a multiple of the default model's 9 query heads
WARM_UP = 50  # sequential requests before memory is expected to be flat


@dataclass(frozen=True)
class Scenario:
    """A policy, options of its server, and what requests may set for themselves."""

    policy: str
    max_model_len: int = 768
    options: tuple[str, ...] = ()
    limits: tuple[Mapping[str, float], ...] = ()

    @property
    def longest_prompt(self) -> int:
        return self.max_model_len * 7 // 16


RATES = ({"kvserve_rate": 2}, {"kvserve_rate": 8}, {"kvserve_off": 1})
MAXIMA = ({"kvserve_max_tokens": 128}, {"kvserve_max_tokens": 192})
SCENARIOS = (
    Scenario("kivi-2bit"),
    Scenario("boost-2bit"),
    Scenario("kv-compress-2bit", limits=RATES),
    Scenario("kv-compress-live-2bit", limits=MAXIMA),
    # Its pages are dense: the pool holds some 1,000 tokens.
    Scenario("expected-attention", 512, ("--max-cache-tokens", "256"), MAXIMA),
)


class Storm:
    """One server and what was asked of it."""

    def __init__(self, scenario: Scenario, url: str, policy: Policy, seed: int) -> None:
        self.scenario, self.policy, self.random = scenario, policy, random.Random(seed)
        self.http = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_SECONDS, trust_env=False)
        self.shared = [self.tokens(length) for length in (64, 100, 130)]
        self.probes = [self.tokens(length) for length in (40, 150, 200, scenario.longest_prompt)]
        self.outcomes = {"finished": 0, "aborted": 0, "ended before their abort": 0}

    def tokens(self, count: int) -> list[int]:
        return [FIRST_TOKEN + self.random.randrange(WORDS) for _ in range(count)]

    def body(self, prompt: list[int], max_tokens: int, **more: Any) -> dict[str, Any]:
        body = {"model": SERVED_NAME, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        return body | more

    async def probe(self) -> list[Any]:
        """Tokens and log-probabilities of the probes, each alone and on an empty prefix cache."""
        answers = []
        for prompt in self.probes:
            reset = await self.http.post("/reset_prefix_cache")
            reset.raise_for_status()
            body = self.body(prompt, 24, logprobs=3, return_token_ids=True)
            choice = (await self.http.post("/v1/completions", json=body)).raise_for_status().json()["choices"][0]
            logprobs = choice["logprobs"]
            answers.append([choice["token_ids"], logprobs["token_logprobs"], logprobs["top_logprobs"]])
        return answers

    async def rage(self, num_requests: int) -> None:
        """`num_requests` mixed ones, every other one aborted, IN_FLIGHT at a time."""
        slots = asyncio.Semaphore(IN_FLIGHT)
        requests = [self.request(abort=number % 2 == 1, slots=slots) for number in range(num_requests)]
        await asyncio.gather(*requests)

    def request(self, abort: bool, slots: asyncio.Semaphore) -> Any:
        prefix = self.random.choice([[], *self.shared])
        prompt = prefix + self.tokens(self.random.randrange(1, self.scenario.longest_prompt - len(prefix)))
        more: dict[str, Any] = {"stream": self.random.random() < 0.5}
        if self.scenario.limits and self.random.random() < 0.5:
            more["vllm_xargs"] = self.random.choice(self.scenario.limits)
        body = self.body(prompt, 250 if abort else self.random.randrange(1, 9), **more)
        delay = self.random.choice([0.02, 0.1, 0.3, 1.0, 3.0]) if abort else None
        return self.send(body, delay, slots)

    async def send(self, body: dict[str, Any], abort_after: float | None, slots: asyncio.Semaphore) -> None:
        """One request; `abort_after`: seconds until the client closes its connection."""
        async with slots:
            try:
                async with asyncio.timeout(abort_after), self.http.stream("POST", "/v1/completions", json=body) as got:
                    got.raise_for_status()
                    async for _ in got.aiter_bytes():
                        pass
            except TimeoutError:
                self.outcomes["aborted"] += 1
            else:
                self.outcomes["finished" if abort_after is None else "ended before their abort"] += 1

    async def settle(self) -> None:
        """Wait until no request is left, then take one more step: gauges show the last one."""
        while await self.num_unfinished():
            await asyncio.sleep(0.5)
        (await self.http.post("/v1/completions", json=self.body([1], 1))).raise_for_status()
        (await self.http.post("/reset_prefix_cache")).raise_for_status()
        await asyncio.sleep(1)

    async def num_unfinished(self) -> float:
        running, waiting = [await self.metric(f"vllm:num_requests_{state}") for state in ("running", "waiting")]
        return running.total + waiting.total

    async def pages(self) -> dict[str, float]:
        """Pages by state, and how many the pool has without vLLM's null block."""
        found = (await self.metric("kvserve:pages")).by("state")
        info = (await self.metric("vllm:cache_config_info")).by("num_gpu_blocks")
        return found | {"total": sum(found.values()), "blocks": int(next(iter(info))) - 1}

    async def metric(self, name: str) -> Metric:
        text = (await self.http.get("/metrics")).text
        families = text_string_to_metric_families(text)
        return Metric([sample for family in families for sample in family.samples if sample.name == name])

    async def one_at_a_time(self, num_requests: int) -> dict[str, Any]:
        """Resident memory of the server's processes over sequential requests, in MiB."""
        history: dict[str, list[float]] = {}
        for number in range(num_requests + 1):
            if number % RSS_EVERY == 0 or number == 1:
                for name, size in resident().items():
                    history.setdefault(name, []).append(size)
            prompt = self.tokens(self.random.choice([20, 40, 80, 180]))
            more = (
                {"vllm_xargs": self.random.choice(self.scenario.limits)} if self.scenario.limits and number % 3 else {}
            )
            (await self.http.post("/v1/completions", json=self.body(prompt, 2, **more))).raise_for_status()
        return {name: trend(sizes, num_requests) for name, sizes in history.items()}


@dataclass(frozen=True)
class Metric:
    """Samples of one metric."""

    samples: list[Any]

    @property
    def total(self) -> float:
        return sum(sample.value for sample in self.samples)

    def by(self, label: str) -> dict[str, float]:
        return {sample.labels[label]: sample.value for sample in self.samples}


def resident() -> dict[str, float]:
    """MiB of the server's processes by their role."""
    sizes = {}
    for process in psutil.Process().children(recursive=True):
        words = " ".join(process.cmdline())
        roles = {"Worker": "worker", "EngineCore": "engine core", "kvserve.cli": "API server"}
        role = next((role for word, role in roles.items() if word in words), None)
        if role:
            sizes[role] = process.memory_info().rss / MIB
    return sizes


def trend(sizes: list[float], num_requests: int) -> dict[str, Any]:
    """First and last size, and the slope behind the warm-up by least squares."""
    numbers = [0, 1, *range(RSS_EVERY, num_requests + 1, RSS_EVERY)]
    points = [(number, size) for number, size in zip(numbers, sizes, strict=True) if number >= WARM_UP]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    variance = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / variance if variance else 0.0
    return {
        "first_mib": round(sizes[0], 1), "after_warm_up_mib": round(points[0][1], 1), "last_mib": round(sizes[-1], 1),
        "kib_per_request_behind_warm_up": round(slope * 1024, 2), "mib": [round(size, 1) for size in sizes],
    }  # fmt: skip


async def weather(scenario: Scenario, url: str, args: argparse.Namespace) -> dict[str, Any]:
    """The storm and what is left behind it."""
    storm = Storm(scenario, url, load_policy(scenario.policy), args.seed)
    async with storm.http:
        before, start = await storm.probe(), time.perf_counter()
        preempted = (await storm.metric("vllm:num_preemptions_total")).total
        await storm.rage(args.requests)
        seconds = time.perf_counter() - start
        preempted = (await storm.metric("vllm:num_preemptions_total")).total - preempted
        await storm.settle()
        pages, after = await storm.pages(), await storm.probe()
        memory = await storm.one_at_a_time(args.sequential)
    return {
        "requests": args.requests, "in_flight": IN_FLIGHT, "max_num_seqs": RUNNING, "outcomes": storm.outcomes,
        "preemptions": preempted, "seconds": round(seconds, 1),
        "pages": pages, "all_pages_free": pages["free"] == pages["total"] > 0,
        "pages_are_whole_blocks_of_the_pool": pages["total"] % pages["blocks"] == 0,
        "probes_bit_identical": before == after, "probe_tokens": sum(len(answer[0]) for answer in before),
        "sequential_requests": args.sequential, "memory": memory,
    }  # fmt: skip


def run(scenario: Scenario, model: str, args: argparse.Namespace) -> dict[str, Any]:
    port = free_port()
    command = [
        *(sys.executable, "-m", "kvserve.cli", "--policy", scenario.policy, *scenario.options),
        *("--host", "127.0.0.1", "--port", str(port), "--model", model, "--served-model-name", SERVED_NAME),
        *("--max-model-len", str(scenario.max_model_len), "--kv-cache-memory-bytes", str(POOL_BYTES)),
        *("--max-num-batched-tokens", "512", "--max-num-seqs", str(RUNNING), "--seed", "0", "--shutdown-timeout", "0"),
        *("--no-self-test", "--disable-uvicorn-access-log"),
    ]
    with Server(scenario.policy, command, port) as server:
        return asyncio.run(weather(scenario, server.url, args))


def thin_model(folder: Path) -> Path:
    """The default model with layers of THIN channels and random weights; its tokenizer stays."""
    source = prepare_default_model()
    config = AutoConfig.from_pretrained(source)
    head_dim = config.hidden_size // config.num_attention_heads
    config.update({"hidden_size": THIN, "intermediate_size": THIN, "head_dim": head_dim})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for path in source.iterdir():
        if path.name.startswith("tokenizer") or path.suffix == ".jinja":
            shutil.copy(path, folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=[scenario.policy for scenario in SCENARIOS])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--sequential", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="results of other policies in this file stay")
    parser.add_argument("--model", help="a folder (default: the thin one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return measure(args, args.model or str(thin_model(Path(folder))))


def measure(args: argparse.Namespace, model: str) -> int:
    started = datetime.now().isoformat(timespec="seconds")
    held = json.loads(args.out.read_text())["policies"] if args.out and args.out.exists() else {}
    for scenario in SCENARIOS:
        if scenario.policy not in args.policies:
            continue
        held[scenario.policy] = found = run(scenario, model, args)
        print(scenario.policy, json.dumps({k: v for k, v in found.items() if k != "memory"}), flush=True)
        for role, trend in found["memory"].items():
            print("  ", role, {k: v for k, v in trend.items() if k != "mib"}, flush=True)
        if args.out:
            record = {
                "command": ["python", "-m", "benchmarks.storms", *(Path(word).name for word in sys.argv[1:])],
                "started": started,
                "pool_mib": POOL_BYTES // MIB,
                "model": args.model or "thin",
                "machine": machine(),
                "versions": versions(),
                "policies": held,
            }
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(found["all_pages_free"] and found["probes_bit_identical"] for found in held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
