"""A server as its operator sees it: what it prints while it starts, and the exit code with which it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from tests.cases.server_cases import MODEL, free_port, wait_until_ready

pytestmark = [pytest.mark.server, pytest.mark.slow]  # two starts

OURS = re.compile("(VLLM|KVSERVE)_LOG|PYTHONWARN|VLLM_ENABLE_V1_MULTIPROCESSING")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not OURS.match(name)}


@contextmanager
def serving(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """A server on all interfaces that answers, its address and what it has printed."""
    port, log = free_port(), folder / "log"
    command = [
        *(sys.executable, "-m", "kvserve.cli", "--policy", "kv-compress@4", "--port", str(port)),
        *("--max-model-len", "1024", "--kv-cache-memory-bytes", "48M"),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=ENVIRONMENT)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process, log)
        yield process, url, log
    finally:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            child.kill()
        process.kill()
        process.wait()


def engine_core(process: subprocess.Popen[bytes]) -> psutil.Process:
    (core,) = [child for child in psutil.Process(process.pid).children() if "EngineCore" in " ".join(child.cmdline())]
    return core


def test_a_start_prints_one_table_and_the_address_and_the_death_of_the_engine_is_a_failure(tmp_path: Path) -> None:
    with serving(tmp_path) as (process, url, log):
        text = log.read_text()
        assert not re.search(r"\b(INFO|DEBUG) \d\d-\d\d", text), "vLLM's own lines"
        assert text.count("kvserve: policy kv-compress\n┌") == 1
        assert "warning: port" in text and "--host 127.0.0.1 keeps it local" in text
        assert "kvserve: self-test passed" in text
        (address,) = re.findall(r"^kvserve: ready: (\S+)$", text, re.MULTILINE)
        assert address.replace("localhost", "127.0.0.1") == f"{url}/v1"
        assert httpx.get(f"{address}/models").json()["data"][0]["id"] == MODEL
        engine_core(process).kill()
        assert process.wait(120) == 1
        assert "kvserve: error: the engine died, so the server ended; its log above says why\n" in log.read_text()


@pytest.mark.parametrize("sent", [signal.SIGTERM])
def test_a_server_that_is_stopped_ends_well(tmp_path: Path, sent: signal.Signals) -> None:
    with serving(tmp_path) as (process, _, log):
        os.kill(process.pid, sent)
        assert process.wait(120) == 0
        assert "kvserve: error" not in log.read_text()
