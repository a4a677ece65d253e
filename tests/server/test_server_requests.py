"""A real server and what clients send: bad requests are refused at once and harm nothing, good ones get reports."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cases.request_cases import BODIES, bad_requests, body_of
from tests.cases.server_cases import MODEL, server

pytestmark = [pytest.mark.server, pytest.mark.slow]

NUM_BAD = 300
OPTIONS = ("--max-num-seqs", "4", "--enable-scale-out", "--no-self-test")
HEADERS = {"content-type": "application/json"}
# Where an answer has the report, by route and whether it is streamed; None: vLLM 0.32 has no field for it there.
REPORTS = {
    ("/v1/completions", False): "kv_transfer_params",
    ("/v1/completions", True): None,
    ("/v1/chat/completions", False): "kv_transfer_params",
    ("/v1/chat/completions", True): None,
    ("/v1/chat/completions/batch", False): None,
    ("/v1/responses", False): "kv_transfer_params",
    ("/v1/responses", True): "response.kv_transfer_params",
    ("/v1/messages", False): "kv_transfer_params",
    ("/v1/messages", True): None,
    ("/invocations", False): "kv_transfer_params",
    ("/inference/v1/generate", False): "kv_transfer_params",
    ("/inference/v1/generate", True): None,
}


@dataclass(frozen=True)
class Served:
    url: str
    policy: str
    log: Path

    def post(self, route: str, body: dict[str, Any] | bytes) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps({"model": MODEL} | body)
        return httpx.post(self.url + route, content=content, headers=HEADERS, timeout=120)

    def good_answer(self) -> dict[str, Any]:
        answer = self.post("/v1/completions", BODIES["/v1/completions"] | {"max_tokens": 16}).json()
        return {name: answer[name] for name in ("choices", "usage")}


@pytest.fixture(scope="module", params=["kv-compress-2bit", "int8"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("server") / "log"
    with server(request.param, 64_000_000, *OPTIONS, log=log) as url:
        yield Served(url, request.param, log)


def test_bad_requests_are_refused_and_harm_nothing(served: Served) -> None:
    before = served.good_answer()
    codes: Counter[int] = Counter()
    for bad in bad_requests(MODEL, NUM_BAD, evicts=served.policy != "int8"):
        answer = served.post(bad.route, bad.body)
        codes[answer.status_code] += 1
        assert answer.status_code == 400, (bad, answer.text)
        assert answer.elapsed.total_seconds() < 30, bad
    assert codes == {400: NUM_BAD}
    assert httpx.get(f"{served.url}/ready", timeout=60).status_code == 200
    assert served.good_answer() == before
    assert "Traceback" not in served.log.read_text(errors="replace")


def test_a_stream_is_refused_before_it_begins(served: Served) -> None:
    for route, streams in REPORTS:
        if streams:
            answer = served.post(route, body_of(route, {"kvserve_max_tokens": 1e308}) | {"stream": True})
            assert answer.status_code == 400 and "kvserve_max_tokens" in answer.text


def test_a_seed_and_a_prompt_in_several_steps_end_nothing(served: Served) -> None:
    body = {"prompt": [11 + i % 900 for i in range(1300)], "seed": 1, "temperature": 1.0, "max_tokens": 8}
    texts = {served.post("/v1/completions", body).json()["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 1
    other = served.post("/v1/completions", body | {"seed": 2}).json()["choices"][0]["text"]
    assert other not in texts


@pytest.mark.parametrize(("route", "streams"), REPORTS)
def test_every_route_follows_the_limit_and_reports_where_vllm_has_a_field(
    served: Served, route: str, streams: bool
) -> None:
    if served.policy == "int8":
        pytest.skip("evicts nothing, so there is no limit and no report")
    answer = served.post(route, body_of(route, {"kvserve_rate": 2}) | {"stream": streams})
    assert answer.status_code == 200
    last = answer.json() if not streams else _events(answer.text)[-1]
    where = REPORTS[route, streams]
    if where is None:
        assert "kvserve" not in answer.text
        return
    for name in where.split("."):
        last = last[name]
    assert last["kvserve"]["rate_requested"] == 2 and 1 < last["kvserve"]["rate_effective"] <= 2


def _events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data:").strip() for line in text.splitlines() if line.startswith("data:")]
    return [json.loads(line) for line in lines if line != "[DONE]"]
