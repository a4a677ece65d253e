"""A request's own eviction limit: refused with HTTP 400 and a sentence, or passed on byte for byte."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from kvserve.engine.request_limits import RequestLimits
from kvserve.pages.layout import PageLayout
from kvserve.policies.loading import load_policy

PATH = "/v1/chat/completions"


def client_of(policy: str | None) -> TestClient:
    app = FastAPI()

    @app.post(PATH)
    async def echo(request: Request) -> dict[str, str]:
        return {"body": (await request.body()).decode()}

    state = SimpleNamespace(policy=None, layout=None, max_model_len=1024)
    if policy:
        state.policy = load_policy(policy)
        state.layout = PageLayout.build(state.policy, 64, 64, torch.float32, num_layers=8)
    app.add_middleware(RequestLimits, state=state)
    return TestClient(app)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"kvserve_rate": 0.5}, "must be at least 1"),
        ({"kvserve_rate": "four"}, "vllm_xargs.kvserve_rate must be a number"),
        ({"kvserve_max_tokens": 0}, "does not hold"),
        ({"kvserve_rate": 2, "kvserve_max_tokens": 100}, "not both"),
        ({"kvserve_ratio": 2}, "kvserve_rate, kvserve_max_tokens and kvserve_off"),
    ],
)
def test_an_impossible_limit_is_refused_with_the_fix(arguments: dict, part: str):
    answer = client_of("kv-compress").post(PATH, json={"messages": [], "vllm_xargs": arguments})
    assert answer.status_code == 400
    assert part in answer.json()["error"]["message"]


def test_a_policy_that_does_not_evict_takes_no_limit():
    answer = client_of("int8").post(PATH, json={"vllm_xargs": {"kvserve_off": 1}})
    assert answer.status_code == 400 and "int8 evicts nothing" in answer.json()["error"]["message"]


@pytest.mark.parametrize("policy", ["kv-compress", "int8", None])
@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "kvserve_rate"}',
        b'{"vllm_xargs": {"other": 1}}',
        b"not json, kvserve_rate",
        b'["kvserve_rate"]',
        b"",
        b'{"prompt": "' + b"x" * 300_000 + b'"}',
    ],
)
def test_other_bodies_pass_byte_for_byte(policy: str | None, body: bytes):
    assert client_of(policy).post(PATH, content=body).json() == {"body": body.decode()}


@pytest.mark.parametrize("arguments", [{"kvserve_rate": 2}, {"kvserve_max_tokens": 100.0}, {"kvserve_off": 1}])
def test_possible_limits_pass(arguments: dict):
    assert client_of("kv-compress").post(PATH, json={"vllm_xargs": arguments}).status_code == 200
