"""Two servers, one after the other, that share what they computed through vLLM's ExampleConnector."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from openai import OpenAI

from tests.cases.engine_cases import STORY
from tests.cases.server_cases import ENVIRONMENT, MODEL, metrics, server

pytestmark = [pytest.mark.server, pytest.mark.slow]

NO_SINKS = ["--policy-set", "sink_tokens=0"]
PROMPT = STORY * 6 + "In the morning"


def options(folder: Path) -> list[str]:
    transfer = {
        "kv_connector": "ExampleConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }  # fmt: skip
    return [*NO_SINKS, "--kv-transfer-config", json.dumps(transfer)]


def answer(url: str) -> str:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
    return client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=20, temperature=0).choices[0].text


def test_a_second_server_finds_the_prefix_and_one_with_other_pages_does_not_start(tmp_path: Path) -> None:
    folder, log = tmp_path / "kv", tmp_path / "log"
    with server("kivi-2bit", 64_000_000, *NO_SINKS) as url:
        plain = answer(url)
    found = []
    for _ in range(2):
        with server("kivi-2bit", 64_000_000, *options(folder), log=log) as url:
            before = metrics(url)["vllm:external_prefix_cache_hits_total", ""]
            assert answer(url) == plain
            found.append(metrics(url)["vllm:external_prefix_cache_hits_total", ""] - before)
    assert found[0] == 0 and found[1] > 300
    assert "ExampleConnector moves sealed tiles" in log.read_text()
    command = [sys.executable, "-m", "kvserve.cli", "--policy", "kivi-4bit", "--dtype", "float32", *options(folder)]
    refused = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 2, refused.stderr
    assert "has the pages of policy kivi-2bit, not kivi-4bit as it is here; name another" in refused.stderr
