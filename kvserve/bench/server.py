"""One HTTP server in a child process, and what it says on /metrics.

Seams: `python -m vllm.entrypoints.openai.api_server` and its options, the metrics in STATE_METRICS and INFO_METRIC.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from kvserve.bench.progress import wait_until
from kvserve.errors import ChildError
from kvserve.measuring.children import CLOSE_TIMEOUT_SECONDS, Child, describe_end, last_lines
from kvserve.measuring.engines import ENVIRONMENT, STOCK, EngineConfig

SERVED_NAME = "bench"  # of the model, in requests
WARM_UP_TIMEOUT_SECONDS = 900.0
HTTP_TIMEOUT_SECONDS = 60.0
SHUTDOWN_SECONDS = 15.0  # less than CLOSE_TIMEOUT_SECONDS
INFO_METRIC = "vllm:cache_config_info"
WARM_UP_TOKENS = 32


class ServerState(NamedTuple):
    """Gauges at this moment and counters since the start.

    Attributes:
        running, waiting: requests.
        kv_usage: used part of the KV pool, 0 to 1.
        preemptions: requests that lost their pages to others.
        prefix_hit_tokens: prompt tokens read from the prefix cache, those of resumed requests included.
    """

    running: float
    waiting: float
    kv_usage: float
    preemptions: float
    prefix_hit_tokens: float


STATE_METRICS = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_usage": "vllm:kv_cache_usage_perc",
    "preemptions": "vllm:num_preemptions_total",
    "prefix_hit_tokens": "vllm:prefix_cache_hits_total",
}


class Server(Child):
    """The parent's side of a server on a loopback port; ready for requests once constructed.

    Args:
        command: starts the server, which answers `GET /health` with 200 once it is ready.
        port: where it listens on 127.0.0.1.
    """

    def __init__(self, name: str, command: Sequence[str], port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        # Without its plugins vLLM is what a user without kvserve has.
        env = {**ENVIRONMENT, "VLLM_PLUGINS": "" if name == STOCK else "kvserve"}
        del env["VLLM_ALLOW_INSECURE_SERIALIZATION"]
        self._http = httpx.Client(base_url=self.url, timeout=HTTP_TIMEOUT_SECONDS, trust_env=False)
        start = time.perf_counter()
        kwargs = {"command": list(command), "url": self.url}
        super().__init__(Path(name).name, "kvserve.bench.server:ServerHost", kwargs, env)
        self.start_seconds = time.perf_counter() - start

    @classmethod
    def start(cls, name: str, config: EngineConfig) -> Self:
        """The server of `name`: "stock" or a policy."""
        port = free_port()
        return cls(name, server_command(name, config, port), port)

    def state(self) -> ServerState:
        """What /metrics says now."""
        return read_state(self._get_metrics())

    def info(self) -> dict[str, int]:
        """Blocks of the KV pool, and tokens of one."""
        return read_info(self._get_metrics())

    def warm_up(self, prompt_tokens: int) -> None:
        """Answer a few requests at a time, so that no measured step is the first of its kind."""
        lengths = [max(1, prompt_tokens - 16 * index) for index in range(4)]  # one completes a tile while decoding
        prompts = [[index + 1] * length for index, length in enumerate(lengths)]
        body = {"model": SERVED_NAME, "prompt": prompts, "max_tokens": WARM_UP_TOKENS, "temperature": 0}
        self._request("POST", "/v1/completions", json={**body, "ignore_eos": True}, timeout=WARM_UP_TIMEOUT_SECONDS)

    def _get_metrics(self) -> str:
        return self._request("GET", "/metrics").text

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, **options).raise_for_status()
        except httpx.HTTPError as error:
            self.call("check", seconds=2.0)  # where the process died, its last lines say more
            raise ChildError(f"{self.name}: {method} {path} failed: {type(error).__name__}: {error}") from None

    def close(self, timeout: float = CLOSE_TIMEOUT_SECONDS) -> None:
        """As Child.close."""
        self._http.close()
        super().close(timeout)


class ServerHost:
    """The child's side: starts the server in the child's process group and ends it.

    Raises:
        RuntimeError: the server ended, or did not become ready; with its last lines.
    """

    def __init__(self, command: list[str], url: str) -> None:
        self._log = tempfile.NamedTemporaryFile(prefix="kvserve-bench-server-", suffix=".log")  # noqa: SIM115
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT)
        try:
            self._wait_until_ready(url)
        except BaseException:
            self.close()
            raise

    def check(self, seconds: float = 0.0) -> None:
        """Raise if the server is not running, or ends within `seconds`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(seconds)
            raise RuntimeError(f"the server ended with {describe_end(code)}; its last lines were:\n{self._tail()}")

    def _wait_until_ready(self, url: str) -> None:
        with httpx.Client(timeout=HTTP_TIMEOUT_SECONDS, trust_env=False) as http:

            def answers() -> bool:
                try:
                    return http.get(f"{url}/health").status_code == 200
                except httpx.TransportError:
                    return False

            wait_until(answers, self._process, Path(self._log.name))

    def _tail(self) -> str:
        return last_lines(Path(self._log.name))

    def close(self) -> None:
        """Ask the server to end; by force after SHUTDOWN_SECONDS."""
        self._process.terminate()
        try:
            self._process.wait(SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def server_command(name: str, config: EngineConfig, port: int) -> list[str]:
    """The command line of a server: the same options for stock and every policy.

    Args:
        config: with kv_bytes.
    """
    assert config.kv_bytes is not None
    program = ["kvserve.cli", "--policy", name] if name != STOCK else ["vllm.entrypoints.openai.api_server"]
    options = {
        "host": "127.0.0.1", "port": port, "model": config.model, "served_model_name": SERVED_NAME,
        "dtype": config.dtype, "max_model_len": config.max_model_len, "kv_cache_memory_bytes": config.kv_bytes,
        "seed": config.seed, "shutdown_timeout": 0, **config.scheduler_options,
    }  # fmt: skip
    words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    eager = "--enforce-eager" if config.enforce_eager else "--no-enforce-eager"
    return [sys.executable, "-m", *program, *words, eager, "--disable-uvicorn-access-log"]


def read_state(metrics: str) -> ServerState:
    """The state in the text of /metrics.

    Raises:
        ValueError: one of STATE_METRICS is not in it.
    """
    found: dict[str, float] = {}
    for sample in _samples(metrics):
        found[sample.name] = found.get(sample.name, 0.0) + sample.value
    missing = [metric for metric in STATE_METRICS.values() if metric not in found]
    if missing:
        raise ValueError(f"/metrics does not have {', '.join(missing)}")
    return ServerState(**{field: found[metric] for field, metric in STATE_METRICS.items()})


def read_info(metrics: str) -> dict[str, int]:
    """num_blocks and block_size in the text of /metrics.

    Raises:
        ValueError: INFO_METRIC is not in it.
    """
    for sample in _samples(metrics):
        if sample.name == INFO_METRIC:
            return {"num_blocks": int(sample.labels["num_gpu_blocks"]), "block_size": int(sample.labels["block_size"])}
    raise ValueError(f"/metrics does not have {INFO_METRIC}")


def _samples(metrics: str) -> list[Sample]:
    return [sample for family in text_string_to_metric_families(metrics) for sample in family.samples]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
