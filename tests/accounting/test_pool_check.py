"""Requests that the pool can never hold are refused with HTTP 400 before vLLM answers; the others pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.accounting.admission import Admission, always_fits
from kvserve.accounting.plan import widest_request
from kvserve.engine.pool_check import RENDERED
from kvserve.engine.request_limits import RequestLimits
from kvserve.pages.layout import PageLayout
from kvserve.policies.limits import request_limit
from kvserve.policies.loading import load_policy

MAX_LEN = 2048
MAX_TOKENS = {"/v1/messages": "max_tokens", "/v1/responses": "max_output_tokens"}


class Render:
    """Renders as vLLM's does: here a word is a token. `rendered` counts the requests."""

    rendered = 0

    def __getattr__(self, name: str) -> Any:
        async def render(request: Any) -> Any:
            self.rendered += 1
            text = getattr(request, "prompt", None) or getattr(request, "input", None) or request.messages[0]
            text = getattr(text, "content", text)
            text = text["content"] if isinstance(text, dict) else text
            if text == "wrong":
                raise ValueError("no such template")
            most = getattr(request, "max_output_tokens", None) or request.max_tokens
            prompts = [
                SimpleNamespace(token_ids=one.split(), sampling_params=SimpleNamespace(max_tokens=most))
                for one in ([text] if isinstance(text, str) else text)
            ]
            return prompts if name == "render_completion_request" else prompts[0]

        return render


def state_of(usable_blocks: int | None = None) -> SimpleNamespace:
    policy = load_policy("kv-compress", [])
    layout = PageLayout.build(policy, 64, 64, torch.float32, query_group=3, num_layers=30)
    blocks = usable_blocks or widest_request(layout, MAX_LEN)
    return SimpleNamespace(
        policy=policy, layout=layout, max_model_len=MAX_LEN, usable_blocks=blocks, serving_render=Render()
    )


def post(state: Any, route: str, prompt: Any, max_tokens: int, arguments: dict[str, Any]) -> Any:
    app = FastAPI()
    app.add_middleware(RequestLimits, state=state)

    @app.post(route)
    async def answer() -> str:
        return "answered"

    body = {"model": "m", MAX_TOKENS.get(route, "max_tokens"): max_tokens, "vllm_xargs": arguments}
    if route in ("/v1/chat/completions", "/v1/messages"):
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body["input" if route == "/v1/responses" else "prompt"] = prompt
    return TestClient(app).post(route, json=body)


@pytest.mark.parametrize("route", RENDERED)
def test_every_rendered_route_refuses_what_the_pool_cannot_hold_and_says_what_it_can(route: str) -> None:
    state = state_of()
    response = post(state, route, "word " * 2000, 40, {"kvserve_rate": 1.05})
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert (
        f"the KV pool of {state.usable_blocks} blocks can never hold this request: a prompt of 2000 tokens" in message
    )
    assert "leave out kvserve_rate" in message
    assert post(state, route, "word " * 900, 40, {"kvserve_rate": 1.05}).json() == "answered"
    assert post(state, route, "word " * 2000, 40, {"kvserve_rate": 8}).json() == "answered"


def test_of_several_prompts_each_must_fit() -> None:
    for prompts, status in ((["word"] * 3, 200), (["word", "word " * 2000], 400)):
        assert post(state_of(), "/v1/completions", prompts, 9, {"kvserve_rate": 1.05}).status_code == status


def test_a_roomy_pool_or_an_unknown_one_renders_nothing_twice() -> None:
    roomy, unknown = state_of(200), state_of()
    unknown.usable_blocks = None
    for state in (roomy, unknown):
        assert post(state, "/v1/completions", "word " * 2000, 40, {"kvserve_rate": 1.05}).json() == "answered"
        assert state.serving_render.rendered == 0


def test_what_cannot_be_rendered_is_left_to_vllm() -> None:
    state = state_of()
    assert post(state, "/v1/completions", "wrong", 40, {"kvserve_rate": 1.05}).json() == "answered"
    assert post(state, "/v1/completions", "word " * 3000, 40, {"kvserve_rate": 1.05}).json() == "answered"


@settings(max_examples=200, deadline=None)
@given(
    rate=st.floats(1, 16), prompt_len=st.integers(1, MAX_LEN - 1), max_tokens=st.integers(1, MAX_LEN),
    num_blocks=st.integers(20, 90),
)  # fmt: skip
def test_a_limit_that_always_fits_fits_every_request(rate, prompt_len, max_tokens, num_blocks) -> None:
    state = state_of()
    limit = request_limit(state.policy.eviction, state.policy, {"kvserve_rate": rate})
    if always_fits(state.layout, limit, MAX_LEN, num_blocks):
        assert Admission(state.layout, limit, prompt_len, max_tokens, MAX_LEN).fits(num_blocks)
