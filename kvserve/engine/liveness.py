"""Calls to the engine that end with it.

vLLM wakes those who wait for tokens when its engine process dies, but not those who wait for a utility call
(`is_sleeping`, `collective_rpc`): they wait for ever, and a server does not end while a request is open.

Seam: `EngineClient.check_health`, which raises once the engine is dead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

HEALTH_INTERVAL_SECONDS = 0.25
Result = TypeVar("Result")


async def while_alive(engine: Any, call: Coroutine[Any, Any, Result], timeout: float | None = None) -> Result:
    """The result of a `call` on `engine`.

    Args:
        timeout: in seconds, for the call and every check of the engine together; None: as long as the engine lives.

    Raises:
        TimeoutError: there is none yet.
        Exception: what the call raised, or `check_health` once the engine was dead.
    """
    task = asyncio.create_task(call)
    task.add_done_callback(_take_exception)
    try:
        async with asyncio.timeout(timeout):
            while not task.done():
                await engine.check_health()
                await asyncio.wait([task], timeout=HEALTH_INTERVAL_SECONDS)
        return task.result()
    finally:
        task.cancel()


def _take_exception(task: asyncio.Task[Any]) -> None:
    """A call that nobody waits for any more may fail in silence: its engine is dead, or has been given up."""
    if not task.cancelled():
        task.exception()
