"""HTTP 400 for requests that ask for an eviction which cannot be done.

Seam: `EndpointPlugin.attach_router` gets the API server's app, to which this adds an ASGI middleware. vLLM itself would
notice some of it (kvserve/engine/request_check.py), but a streamed answer has begun by then with status 200.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvserve.engine.pool_check import pool_refusal
from kvserve.engine.request_check import check_arguments
from kvserve.policies.limits import PREFIX, short

# Where the bodies of vLLM's routes that generate have a request's arguments; None: nowhere, the route drops them.
XARGS, EXTRA_ARGS = "vllm_xargs", "sampling_params.extra_args"
COMPLETION_ROUTES: Mapping[str, str | None] = {
    "/v1/chat/completions": XARGS,
    "/v1/chat/completions/batch": XARGS,
    "/v1/completions": XARGS,
    "/v1/responses": XARGS,
    "/v1/messages": XARGS,
    "/invocations": XARGS,
    "/inference/v1/generate": EXTRA_ARGS,
    "/generative_scoring": None,
    "/v1/systemone": None,
    "/v1/decisions": None,  # from vLLM 0.33 on
    "/cohere/v2/chat": None,
}


class RequestLimits:
    """Checks the bodies of requests that generate; everything else passes untouched and unread.

    Args:
        state: an object whose `policy` is the Policy in effect, or None while it is not known; its `layout`, the pages
            of that policy; its `max_model_len`; and what `pool_refusal` needs.
    """

    def __init__(self, app: ASGIApp, state: Any) -> None:
        self.app, self.state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = _route(scope)
        if route not in COMPLETION_ROUTES or self.state.policy is None:
            return await self.app(scope, receive, send)
        messages = await _body_messages(receive)
        content = _content(b"".join(message.get("body", b"") for message in messages))
        refusal = _refusal(content, self.state, route)
        if refusal is None and (own := _own(content.get(XARGS))):
            refusal = await pool_refusal(content, own, route, self.state)
        if refusal is not None:
            return await JSONResponse(_error_body(refusal, route), 400)(scope, receive, send)

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, replay, send)


def _route(scope: Scope) -> str:
    """The path of a POST request below the server's --root-path; "" for everything else."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return ""
    path, root = scope["path"], scope.get("root_path", "").rstrip("/")
    return str(path[len(root) :] if path.startswith(f"{root}/") else path)


async def _body_messages(receive: Receive) -> list[Message]:
    messages = [await receive()]
    while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
        messages.append(await receive())
    return messages


def _content(body: bytes) -> dict[str, Any]:
    """The JSON of a request that may name an argument of kvserve's; empty for all others."""
    if not _may_name_an_argument(body):
        return {}
    try:
        content = json.loads(body)  # as FastAPI does, so that both see the same keys
    except (ValueError, RecursionError):
        return {}  # vLLM says what is wrong with it
    return content if isinstance(content, dict) else {}


def _refusal(content: dict[str, Any], state: Any, route: str = "/v1/completions") -> str | None:
    """Why the request cannot be served; None where it can, or is no business of kvserve."""
    try:
        arguments = _arguments(content, route)
        if arguments:
            check_arguments(arguments, state)
    except ValueError as error:
        return str(error)
    return None


def _may_name_an_argument(body: bytes) -> bool:
    """Whether parsing is worthwhile: in UTF-8 a key is written out, or with escapes."""
    return json.detect_encoding(body) != "utf-8" or PREFIX.encode() in body or b"\\u" in body


def _arguments(content: dict[str, Any], route: str) -> dict[str, Any]:
    """The arguments of a request that are kvserve's.

    Raises:
        ValueError: some stand where vLLM would drop them.
    """
    where, params = COMPLETION_ROUTES[route], content.get("sampling_params")
    places = {
        "": _own(content),
        XARGS: _own(content.get(XARGS)),
        EXTRA_ARGS: _own(params.get("extra_args")) if isinstance(params, dict) else {},
    }
    own = places.pop(where) if where else {}
    misplaced = sorted(name for place in places.values() for name in place)
    if misplaced and where:
        raise ValueError(f"{route} reads limits in {where} only; move {short(misplaced[0])} there")
    if misplaced or (own and content.get("use_beam_search")):
        kind = "a beam search" if where else route
        raise ValueError(f"{kind} takes no limits of a request's own, so drop {short(min(misplaced or own))}")
    return own


def _own(place: Any) -> dict[str, Any]:
    if not isinstance(place, dict):
        return {}
    return {name: value for name, value in place.items() if name.startswith(PREFIX)}


def _error_body(message: str, route: str) -> dict[str, Any]:
    error = {"message": message, "type": "BadRequestError", "param": "vllm_xargs", "code": 400}
    return {"type": "error", "error": error} if route == "/v1/messages" else {"error": error}
