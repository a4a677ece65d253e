"""HTTP 400 for requests that ask for an eviction which cannot be done.

Seam: `EndpointPlugin.attach_router` gets the API server's app, to which this adds an ASGI middleware. In the scheduler,
where a limit takes effect, a wrong one could only be logged.
"""

from __future__ import annotations

import json
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvserve.pages.plan import check_limit
from kvserve.policies.limits import PREFIX, check_request, request_limit


class RequestLimits:
    """Checks `vllm_xargs` of POST bodies; everything else passes untouched.

    Args:
        state: an object whose `policy` is the Policy in effect, or None while it is not known; its `layout`, the pages
            of that policy; and its `max_model_len`.
    """

    def __init__(self, app: ASGIApp, state: Any) -> None:
        self.app, self.state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or self.state.policy is None:
            return await self.app(scope, receive, send)
        messages = await _body_messages(receive)
        refusal = _refusal(b"".join(message.get("body", b"") for message in messages), self.state)
        if refusal is not None:
            error = {"message": refusal, "type": "BadRequestError", "param": "vllm_xargs", "code": 400}
            return await JSONResponse({"error": error}, 400)(scope, receive, send)

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, replay, send)


async def _body_messages(receive: Receive) -> list[Message]:
    messages = [await receive()]
    while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
        messages.append(await receive())
    return messages


def _refusal(body: bytes, state: Any) -> str | None:
    """Why the request cannot be served; None where it can, or is no business of kvserve."""
    if PREFIX.encode() not in body:
        return None
    try:
        content = json.loads(body)
    except ValueError:
        return None  # vLLM says what is wrong with it
    arguments = content.get("vllm_xargs") if isinstance(content, dict) else None
    if not isinstance(arguments, dict):
        return None
    try:
        check_request(arguments, state.policy)
        limit = state.policy.eviction and request_limit(state.policy.eviction, state.policy, arguments)
        if limit:
            check_limit(state.layout, limit, state.max_model_len)
    except ValueError as error:
        return str(error)
    return None
