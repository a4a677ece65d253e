"""A request's own eviction limit: refused with HTTP 400 and a sentence, or passed on byte for byte."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.request import Request as EngineRequest
from vllm.v1.sample.logits_processor import validate_logits_processors_parameters

from kvserve.engine.connector import KvserveConnector
from kvserve.engine.request_check import RequestCheck
from kvserve.engine.request_limits import COMPLETION_ROUTES, RequestLimits, _content, _refusal
from kvserve.engine.request_report import request_report
from kvserve.engine.stats import Evicted
from kvserve.pages.layout import PageLayout
from kvserve.policies.limits import own_limit, request_limit
from kvserve.policies.loading import load_policy
from kvserve.schedules.base import Limit
from tests.accounting.test_eviction_manager import EvictingSimulation
from tests.cases.request_cases import BAD, BAD_TEXTS, MAX_MODEL_LEN, Spelling, arguments, spellings, wanted

PATH = "/v1/chat/completions"
UNTOUCHED = "/tokenize"


def state_of(policy: str | None, max_model_len: int = 1024) -> SimpleNamespace:
    state = SimpleNamespace(policy=None, layout=None, max_model_len=max_model_len, usable_blocks=None, identity=None)
    if policy:
        state.policy = load_policy(policy)
        state.layout = PageLayout.build(state.policy, 64, 64, torch.float32, num_layers=8)
    return state


def client_of(policy: str | None) -> TestClient:
    app = FastAPI()

    async def echo(request: Request) -> dict[str, str]:
        return {"body": (await request.body()).decode()}

    for path in (*COMPLETION_ROUTES, UNTOUCHED):
        app.post(path)(echo)
    app.add_middleware(RequestLimits, state=state_of(policy))
    return TestClient(app)


def placed(route: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A body with arguments where vLLM's route reads them."""
    return {"sampling_params": {"extra_args": arguments}} if "inference" in route else {"vllm_xargs": arguments}


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"kvserve_rate": 0.5}, "must be a number from 1 to 1024, got 0.5"),
        ({"kvserve_rate": "four"}, "vllm_xargs.kvserve_rate must be a number"),
        ({"kvserve_max_tokens": 0}, "must be a whole number from 1 to 1024, the longest sequence"),
        ({"kvserve_max_tokens": 512.5}, "must be a whole number"),
        ({"kvserve_max_tokens": 7}, "vllm_xargs.kvserve_max_tokens: the maximum of 7 cached tokens does not hold the"),
        ({"kvserve_off": "yes"}, "vllm_xargs.kvserve_off must be true, false, 1 or 0, got 'yes'"),
        ({"kvserve_off": True, "kvserve_rate": 2}, "drop it or vllm_xargs.kvserve_rate"),
        ({"kvserve_rate": 2, "kvserve_max_tokens": 100}, "not both"),
        ({"kvserve_ratio": 2}, "kvserve_rate, kvserve_max_tokens and kvserve_off"),
    ],
)
def test_an_impossible_limit_is_refused_with_the_fix(arguments: dict, part: str):
    answer = client_of("snapkv").post(PATH, json={"messages": [], "vllm_xargs": arguments})
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


@pytest.mark.parametrize("route", COMPLETION_ROUTES)
def test_every_route_that_generates_takes_limits_or_refuses_them(route: str) -> None:
    client = client_of("kv-compress")
    takes_them = COMPLETION_ROUTES[route] is not None
    assert client.post(route, json=placed(route, {"kvserve_rate": 2})).status_code == (200 if takes_them else 400)
    bad = client.post(route, json=placed(route, {"kvserve_rate": 0}))
    assert bad.status_code == 400 and "kvserve_rate" in bad.json()["error"]["message"]
    beside = client.post(route, json={"kvserve_rate": 2})
    assert beside.status_code == 400 and route in beside.json()["error"]["message"]
    elsewhere = (
        {"vllm_xargs": {"kvserve_rate": 2}} if "inference" in route else placed("inference", {"kvserve_rate": 2})
    )
    assert client.post(route, json=elsewhere).status_code == 400


def test_a_beam_search_starts_requests_without_limits_so_it_takes_none() -> None:
    body = {"use_beam_search": True, "vllm_xargs": {"kvserve_rate": 2}}
    answer = client_of("kv-compress").post(PATH, json=body)
    assert answer.status_code == 400 and "beam search" in answer.json()["error"]["message"]
    assert client_of("kv-compress").post(PATH, json=body | {"vllm_xargs": {"other": 1}}).status_code == 200


def test_a_server_below_a_root_path_checks_too() -> None:
    client = client_of("kv-compress")
    client.app.root_path = "/api"  # type: ignore[attr-defined]
    assert client.post(f"/api{PATH}", json={"vllm_xargs": {"kvserve_rate": 0}}).status_code == 400


def test_other_routes_are_passed_on_before_their_bodies_have_arrived() -> None:
    import asyncio

    async def run(path: str) -> list[str]:
        order: list[str] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            order.append("app")

        async def receive() -> dict[str, Any]:
            order.append("body")
            return {"type": "http.request", "body": b"{}", "more_body": len(order) < 3}

        scope = {"type": "http", "method": "POST", "path": path}
        await RequestLimits(app, state_of("kv-compress"))(scope, receive, None)  # type: ignore[arg-type]
        return order

    assert asyncio.run(run(UNTOUCHED)) == ["app"]
    assert asyncio.run(run(PATH)) == ["body", "body", "body", "app"]


@pytest.mark.parametrize("policy", ["kv-compress", "int8"])
@pytest.mark.parametrize("text", BAD_TEXTS, ids=range(len(BAD_TEXTS)))
def test_texts_that_are_no_request_are_refused_or_left_to_vllm(policy: str, text: bytes) -> None:
    assert isinstance(_refusal(_content(text), state_of(policy)), str | None)


class Xargs(BaseModel):
    """The type that vLLM's request models give `vllm_xargs`."""

    vllm_xargs: dict[str, str | int | float | list[str | int | float]] | None = None


def connector_of(state: SimpleNamespace) -> KvserveConnector:
    """The scheduler's side, with vLLM's own manager of blocks."""
    connector = KvserveConnector.__new__(KvserveConnector)
    connector.eviction, connector.max_model_len, connector.block_bytes = state.policy.eviction, MAX_MODEL_LEN, 1
    connector.bind_kv_cache_manager(EvictingSimulation(state.layout, 100, seed=0).manager)
    return connector


@pytest.fixture(scope="module")
def evicting() -> tuple[SimpleNamespace, KvserveConnector]:
    state = state_of("kv-compress", MAX_MODEL_LEN)
    return state, connector_of(state)


@given(
    arguments=arguments,
    spelling=spellings,
    route=st.sampled_from([r for r, place in COMPLETION_ROUTES.items() if place]),
)
@settings(max_examples=200, deadline=None)
def test_what_json_brings_is_refused_with_a_sentence_or_planned_as_asked(
    evicting: tuple[SimpleNamespace, KvserveConnector], arguments: dict[str, Any], spelling: Spelling, route: str
) -> None:
    state, connector = evicting
    refusal = _refusal(_content(spelling.write(placed(route, arguments))), state, route)
    expected = wanted(arguments)
    assert (refusal is not None) == (expected is BAD)
    if refusal is not None:
        assert "kvserve_" in refusal and len(refusal) < 300 and refusal.isascii() and "\n" not in refusal
    limit, failure = taken_in(connector, arguments)
    if failure is not None:
        assert expected is BAD and "kvserve_" in failure and "kvserve failed" not in failure
    if refusal is None:
        rate, max_tokens, off = expected
        default = rate is None and max_tokens is None
        asked = None if off else (4.0 if default else rate, max_tokens)
        assert (limit and (limit.rate, limit.max_tokens)) == asked


def taken_in(connector: KvserveConnector, arguments: dict[str, Any]) -> tuple[Limit | None, str | None]:
    """The limit under which the scheduler takes a request in, or why it ends; nobody has checked the arguments."""
    try:
        typed = Xargs.model_validate({"vllm_xargs": arguments}).vllm_xargs
    except ValidationError:
        typed = arguments  # LLM(...) hands over anything
    params = SamplingParams(max_tokens=4)
    params.extra_args = typed  # vLLM refuses integers of more than 64 bits
    request = EngineRequest("a request", list(range(1500)), params, None)
    connector.on_new_request(request)
    failure = connector.manager.failures.take().get("a request")
    plan = connector.manager.plans.get("a request")
    limit = None if failure else connector.accounting.requests["a request"].limit
    assert plan is None or (0 < plan.next_cut(0).point <= MAX_MODEL_LEN and plan.limit == limit)
    _, report = connector.request_finished(request, [])
    msgspec.msgpack.encode(report)
    json.dumps(report, allow_nan=False)
    assert (report is None) == (failure is not None)
    return limit, failure


@given(arguments=arguments)
@settings(max_examples=200, deadline=None)
def test_the_only_reader_returns_the_wanted_or_raises_a_value_error(arguments: dict[str, Any]) -> None:
    expected = wanted(arguments)
    try:
        own = own_limit(arguments, MAX_MODEL_LEN)
    except ValueError as error:
        assert expected is BAD and "kvserve_" in str(error)
    else:
        assert (own.rate, own.max_tokens, own.off) == expected
        assert type(own.rate) in (float, type(None)) and type(own.max_tokens) in (int, type(None))


def test_a_limit_that_nobody_can_print_is_refused() -> None:
    with pytest.raises(ValueError, match="an integer of 20001 bits"):
        own_limit({"kvserve_max_tokens": 2**20000})


def test_vllm_refuses_it_on_every_way_into_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(**extra_args: Any) -> None:
        validate_logits_processors_parameters([RequestCheck], SamplingParams(extra_args=extra_args))

    check(kvserve_rate=2, other=object())
    with pytest.raises(VLLMValidationError, match="from 1 to 1024"):
        check(kvserve_rate=1e308)
    check(kvserve_max_tokens=10_000)
    monkeypatch.setattr(RequestCheck, "server", state_of("kv-compress"))
    with pytest.raises(VLLMValidationError, match="from 1 to 1024, the longest sequence"):
        check(kvserve_max_tokens=10_000)
    monkeypatch.setattr(RequestCheck, "server", state_of("int8"))
    with pytest.raises(VLLMValidationError, match="int8 evicts nothing"):
        check(kvserve_off=0)


@given(
    num_tokens=st.integers(1, 2**31), cached=st.integers(0, 2**31), kept=st.integers(0, 2**31),
    rate=st.floats(1, 1024), max_tokens=st.none() | st.integers(64, 2**31 - 1),
)  # fmt: skip
@settings(deadline=None)
def test_a_report_can_always_be_sent(
    num_tokens: int, cached: int, kept: int, rate: float, max_tokens: int | None
) -> None:
    policy = load_policy("kv-compress")
    own = {"kvserve_max_tokens": max_tokens} if max_tokens else {"kvserve_rate": rate}
    limit = request_limit(policy.eviction, policy, own)
    report = request_report(cached, 2**50, limit, Evicted(num_tokens, 0, [[kept]]))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(report)) == report
    json.dumps(report, allow_nan=False)
