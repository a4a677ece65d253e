"""The self-test at server start: what it says, and that a server with a damaged cache ends instead of serving."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvserve.cli import main
from kvserve.engine import self_test
from kvserve.engine.self_test import EXTENSION_PATH, describe, is_requested
from kvserve.errors import UnsupportedError
from tests.cases.server_cases import ENVIRONMENT, free_port, metrics, server

DAMAGE = """
import torch
from kvserve.attention.native import NativeAttention

forward = NativeAttention.forward
seen = {}

def damaged(self, rows, cells, *args, **more):
    if cells.storage_offset() == self.layout.cell_bytes * 7:  # layer 7
        rows = rows._replace(key=rows.key.flip(1))
    forward(self, rows, cells, *args, **more)

NativeAttention.forward = damaged
"""


def config(**changes: object) -> SimpleNamespace:
    """What the self-test reads of a VllmConfig."""
    parallel = {"data_parallel_size": 1, "_api_process_count": 1, "worker_extension_cls": EXTENSION_PATH}
    section = {"policy": "int8", "self_test": True}
    return SimpleNamespace(
        additional_config={"kvserve": section | {k: v for k, v in changes.items() if k in section}},
        parallel_config=SimpleNamespace(**parallel | {k: v for k, v in changes.items() if k in parallel}),
        model_config=SimpleNamespace(enforce_eager=changes.get("enforce_eager", False)),
    )


def test_the_startup_table_says_what_was_asked_for_and_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe(config(self_test=False)) == "off"
    assert describe(config()) == "requested, runs before the server answers"
    assert describe(config(_api_process_count=2)).startswith("requested, but not run: it needs a single API server")
    assert describe(config(data_parallel_size=2)) == "requested, runs before the server answers"
    monkeypatch.setattr(self_test, "device_type", lambda: "cuda")
    assert describe(config()).startswith("requested, but not run: on a GPU it needs --enforce-eager")
    assert describe(config(enforce_eager=True)) == "requested, runs before the server answers"


def test_a_self_test_without_its_probe_is_refused_with_the_option_to_give() -> None:
    with pytest.raises(UnsupportedError, match=f"--worker-extension-cls {EXTENSION_PATH}"):
        is_requested(config(worker_extension_cls=""))


def test_the_option_is_a_switch(capsys: pytest.CaptureFixture) -> None:
    assert main(["--policy", "int8", "--no-self-test=1"]) == 2
    assert "--no-self-test takes no value" in capsys.readouterr().err


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.parametrize("policy", ["none", "int8", "boost-2bit", "kv-compress-2bit", "kv-compress-live"])
def test_shipped_policies_pass_on_the_default_model_and_publish_every_layer(policy: str) -> None:
    with server(policy, 128_000_000, "--max-num-seqs", "8") as url:
        samples = metrics(url)
    for kind in ("codec", "cache"):
        assert 0 <= samples["kvserve:self_test_distance", kind] < 2
    assert samples["kvserve:self_test_distance", "kernel"] < 0.005


@pytest.mark.server
@pytest.mark.slow
def test_a_server_whose_cache_is_damaged_ends_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.abc, importlib.util, sys\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name != 'kvserve.engine.backend': return None\n"
        "        sys.meta_path.remove(self)\n"
        f"        exec({DAMAGE!r}, {{}})\n"
        "        return importlib.util.find_spec(name)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}:{ENVIRONMENT.get('PYTHONPATH', '')}"}
    command = [
        *(sys.executable, "-m", "kvserve.cli", "--policy", "kivi-2bit", "--host", "127.0.0.1"),
        *("--port", str(free_port()), "--dtype", "float32", "--max-model-len", "1024"),
        *("--kv-cache-memory-bytes", "64000000", "--shutdown-timeout", "0"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("kvserve: error: ")]
    assert "the self-test of policy kivi-2bit failed: layer 7 of 30: answers are not what the cache" in sentence
    assert "kvserve doctor" in sentence and "--no-self-test" in sentence
    assert "Starting vLLM server" not in done.stdout + done.stderr
