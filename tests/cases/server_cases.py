"""A kvserve server on a free loopback port, and what it says about itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvserve.bench.progress import wait_until
from kvserve.measuring.children import end_group

MODEL = "smollm2-135m-instruct"
SHUTDOWN_SECONDS = 60
HTTP_TIMEOUT_SECONDS = 120  # on a busy machine

# Without what engine_cases sets for engines inside the test process.
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND")
}


@contextmanager
def server(policy: str, pool_bytes: int, *options: str, log: Path | None = None) -> Iterator[str]:
    """The base URL of a server with `policy` and the default model; it is shut down at the end, and `log` stays."""
    with server_process(policy, pool_bytes, *options, log=log) as (url, _):
        yield url


@contextmanager
def server_process(
    policy: str, pool_bytes: int, *options: str, log: Path | None = None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """As `server`, with its process."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "kvserve.cli", "--policy", policy, "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--max-model-len", "2048", "--kv-cache-memory-bytes", str(pool_bytes)),
        *("--max-num-batched-tokens", "512", "--shutdown-timeout", "0", *options),
    ]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        log = log or Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=ENVIRONMENT, start_new_session=True
            )
        try:
            wait_until_ready(url, process, log)
            yield url, process
        finally:
            end(process)


def end(server: subprocess.Popen[bytes]) -> None:
    """Stop a server, by force if need be, and whatever it started."""
    server.terminate()
    end_group(server, SHUTDOWN_SECONDS)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    def answers() -> bool:
        try:
            return httpx.get(f"{url}/ready", timeout=HTTP_TIMEOUT_SECONDS).status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(answers, server, log)
    except RuntimeError as error:
        pytest.fail(str(error))


def metrics(base_url: str) -> dict[tuple[str, str], float]:
    """Every sample on /metrics by (name, value of its telling label)."""
    samples = {}
    for family in text_string_to_metric_families(httpx.get(f"{base_url}/metrics", timeout=HTTP_TIMEOUT_SECONDS).text):
        for sample in family.samples:
            label = next((sample.labels[key] for key in ("kind", "state", "policy") if key in sample.labels), "")
            samples[sample.name, label] = sample.value
    return samples
