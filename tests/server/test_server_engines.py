"""A server with two engines, each with a pool of its own (data parallel)."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.cases.engine_cases import STORY
from tests.cases.server_cases import HTTP_TIMEOUT_SECONDS, MODEL, server

pytestmark = [pytest.mark.server, pytest.mark.slow]


def values(url: str, name: str) -> dict[str, float]:
    """Of a metric, by engine."""
    text = httpx.get(f"{url}/metrics", timeout=HTTP_TIMEOUT_SECONDS).text
    families = text_string_to_metric_families(text)
    return {one.labels["engine"]: one.value for family in families for one in family.samples if one.name == name}


def test_each_engine_is_tested_and_has_its_own_metrics(tmp_path: Path) -> None:
    """/ready answers once both have; the server fixture waits for it."""
    log = tmp_path / "log"
    with server("kivi-2bit", 64_000_000, "--data-parallel-size", "2", "--max-num-seqs", "4", log=log) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
        texts = set()
        for engine in ("0", "1"):
            headers = {"X-data-parallel-rank": engine}
            answer = client.completions.create(
                model=MODEL, prompt=STORY, max_tokens=10, temperature=0, extra_headers=headers
            )
            texts.add(answer.choices[0].text)
        assert len(texts) == 1
        assert set(values(url, "kvserve:compression_ratio")) == {"0", "1"}
        tokens = values(url, "vllm:generation_tokens_total")
        assert set(tokens) == {"0", "1"} and min(tokens.values()) >= 10
    said = log.read_text()
    assert "on engine 0" in said and "on engine 1" in said
