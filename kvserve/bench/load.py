"""One load on one server, sent by `vllm bench serve`.

Seams: the options and the function behind that command (`vllm.benchmarks.serve.add_cli_args` and `main`), and the
fields of its result file in RESULT_FIELDS. It runs as `python -m kvserve.bench.load`, since the `vllm` script of vLLM's
CPU builds does not start.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvserve.bench.server import SERVED_NAME, Server, ServerState
from kvserve.bench.server_options import Load, ServerSizes
from kvserve.errors import ChildError
from kvserve.measuring.children import end_group, last_lines
from kvserve.measuring.engines import ENVIRONMENT

SAMPLE_SECONDS = 0.5
CLIENT_ENVIRONMENT = {
    **{name: ENVIRONMENT[name] for name in ("VLLM_NO_USAGE_STATS", "HF_HUB_OFFLINE")},
    "VLLM_PLUGINS": "",
    # The client would send requests for 127.0.0.1 to a proxy that the environment names.
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}
RESULT_FIELDS = (
    "duration", "completed", "output_throughput", "request_goodput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms",
    "p99_tpot_ms", "input_lens", "output_lens", "ttfts", "latencies", "errors",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One load on one server. Times of a request begin when the client sends it.

    Attributes:
        seconds: from the first request to the last token.
        ttft_ms, tpot_ms, input_tokens, output_tokens: of each request.
        preemptions: during the load.
        peak_running, peak_waiting, peak_kv_usage: the highest of samples SAMPLE_SECONDS apart.
        prefix_hit_tokens: prompt tokens read from the prefix cache; prompts are fresh, so only preempted requests that
            start again find their own.
    """

    seconds: float
    output_tokens_per_second: float
    good_requests_per_second: float
    ttft_median_ms: float
    ttft_p99_ms: float
    tpot_median_ms: float
    tpot_p99_ms: float
    preemptions: int
    peak_running: int
    peak_waiting: int
    peak_kv_usage: float
    prefix_hit_tokens: int
    ttft_ms: list[float]
    tpot_ms: list[float]
    input_tokens: list[int]
    output_tokens: list[int]


def measure(server: Server, load: Load, sizes: ServerSizes, tokenizer: str, seed: int) -> Measured:
    """Send the load and watch the server.

    Args:
        tokenizer: folder of the model.
        seed: of prompts, lengths and arrival times.

    Raises:
        ChildError: the client or the server failed.
        RuntimeError: not every request was answered.
    """
    states = [server.state()]
    with tempfile.TemporaryDirectory(prefix="kvserve-bench-load-") as folder:
        result = Path(folder) / "result.json"
        command = client_command(server.url, load, sizes, tokenizer, seed, result)
        run_client(command, lambda: states.append(server.state()))
        content = json.loads(result.read_text())
    states.append(server.state())
    return measured(content, states, sizes.requests)


def client_command(url: str, load: Load, sizes: ServerSizes, tokenizer: str, seed: int, result: Path) -> list[str]:
    """`vllm bench serve` with its arguments."""
    options: dict[str, Any] = {
        "backend": "openai", "base_url": url, "endpoint": "/v1/completions", "model": SERVED_NAME,
        "tokenizer": tokenizer, "dataset_name": "random", "num_prompts": sizes.requests,
        "random_input_len": sizes.input_tokens, "random_output_len": sizes.output_tokens,
        "random_range_ratio": sizes.length_spread, "seed": seed, "temperature": 0,
        "request_rate": load.request_rate or "inf", "percentile_metrics": "ttft,tpot", "metric_percentiles": 99,
        "result_dir": result.parent, "result_filename": result.name,
    }  # fmt: skip
    if load.max_concurrency is not None:
        options["max_concurrency"] = load.max_concurrency
    words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    limits = [f"ttft:{sizes.goodput_ttft_ms}", f"tpot:{sizes.goodput_tpot_ms}"]
    flags = ["--ignore-eos", "--save-result", "--save-detailed", "--disable-tqdm"]
    return [sys.executable, "-m", "kvserve.bench.load", *words, "--goodput", *limits, *flags]


def run_client(command: list[str], watch: Callable[[], object]) -> None:
    """Run the client in a process of its own and call `watch` every SAMPLE_SECONDS; whatever happens, it ends.

    Raises:
        ChildError: it failed.
    """
    with tempfile.NamedTemporaryFile(prefix="kvserve-bench-client-", suffix=".log") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **CLIENT_ENVIRONMENT},
        )  # fmt: skip
        try:
            while process.poll() is None:
                watch()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(SAMPLE_SECONDS)
        finally:
            end_group(process, timeout=0.0)
        if process.returncode != 0:
            tail = last_lines(Path(log.name))
            raise ChildError(f"vllm bench serve ended with {process.returncode}; its last lines were:\n{tail}")


def measured(content: dict[str, Any], states: list[ServerState], requests: int) -> Measured:
    """From the client's result file and the server's states before, during and after the load.

    Raises:
        RuntimeError: a field is missing, or not every request was answered.
    """
    missing = [field for field in RESULT_FIELDS if field not in content]
    if missing:
        raise RuntimeError(f"the result of vllm bench serve does not have {', '.join(missing)}")
    if content["completed"] != requests:
        reasons = [error.strip().splitlines()[-1] for error in content["errors"] if error.strip()]
        reason = reasons[0] if reasons else "no reason given"
        raise RuntimeError(f"only {content['completed']} of {requests} requests were answered: {reason}")
    before, after = states[0], states[-1]
    ttfts, lengths = content["ttfts"], content["output_lens"]
    answers = zip(content["latencies"], ttfts, lengths, strict=True)
    tpots = [(latency - ttft) / max(length - 1, 1) for latency, ttft, length in answers]
    return Measured(
        seconds=round(content["duration"], 3),
        output_tokens_per_second=content["output_throughput"],
        good_requests_per_second=content["request_goodput"],
        ttft_median_ms=content["median_ttft_ms"],
        ttft_p99_ms=content["p99_ttft_ms"],
        tpot_median_ms=content["median_tpot_ms"],
        tpot_p99_ms=content["p99_tpot_ms"],
        preemptions=int(after.preemptions - before.preemptions),
        peak_running=int(max(state.running for state in states)),
        peak_waiting=int(max(state.waiting for state in states)),
        peak_kv_usage=round(max(state.kv_usage for state in states), 3),
        prefix_hit_tokens=int(after.prefix_hit_tokens - before.prefix_hit_tokens),
        ttft_ms=[round(1e3 * ttft, 1) for ttft in ttfts],
        tpot_ms=[round(1e3 * tpot, 2) for tpot in tpots],
        input_tokens=content["input_lens"],
        output_tokens=lengths,
    )


def client() -> None:
    """`vllm bench serve` with the arguments of this process."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm bench serve")
    add_cli_args(parser)
    main(parser.parse_args())


if __name__ == "__main__":
    client()
