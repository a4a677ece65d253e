"""Requests that kvserve itself sends to the engine, of /ready and the self-test: no metric counts them as a user's."""

from __future__ import annotations

from uuid import uuid4

_PREFIX = "kvserve-own-"


def own_request_id(purpose: str) -> str:
    """A new id; `purpose` is for whoever reads a log."""
    return f"{_PREFIX}{purpose}-{uuid4()}"


def is_own(request_id: str) -> bool:
    """Whether a request is kvserve's; vLLM appends to ids on their way to the scheduler."""
    return request_id.startswith(_PREFIX)
