"""When the server answers, and why it ended: `vllm serve` ends alike after a signal and after the engine died.

Seams: `EngineClient.errored`; `app.state.server`, the uvicorn server that vLLM puts there; and that vLLM handles
signals in the event loop, which reads them from a descriptor whatever handler `signal.signal` has put beside.
"""

from __future__ import annotations

import asyncio
import signal
from types import FrameType
from typing import Any

from kvserve.engine.log import logger

POLL_SECONDS = 0.1
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Lifetime:
    """One server in this process."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._stopped_while_alive = False
        self._task: asyncio.Task[None] | None = None  # the loop itself holds tasks weakly

    def begin(self, engine: Any, state: Any, args: Any) -> None:
        """Called while the server starts, in its event loop."""
        self._engine = engine
        self._task = asyncio.get_running_loop().create_task(self._when_it_answers(state, args))

    async def _when_it_answers(self, state: Any, args: Any) -> None:
        while not getattr(getattr(state, "server", None), "started", False):
            await asyncio.sleep(POLL_SECONDS)
        for number in _SIGNALS:  # from here on vLLM's own handlers are in place
            signal.signal(number, self._note)
        logger.info("ready: %s", base_url(args))

    def _note(self, number: int, frame: FrameType | None) -> None:
        """vLLM stops the server; the engine is alive unless it died before."""
        self._stopped_while_alive = self._stopped_while_alive or not self._engine.errored

    @property
    def died(self) -> bool:
        """Whether the server ended because its engine did. Only for a server that has ended."""
        return self._engine is not None and self._engine.errored and not self._stopped_while_alive


def base_url(args: Any) -> str:
    """What clients take as their base URL, as seen from this machine."""
    if getattr(args, "uds", None):
        return f"unix:{args.uds}"
    scheme = "https" if getattr(args, "ssl_certfile", None) else "http"
    host = args.host or "localhost"
    host = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{scheme}://{host}:{args.port}/v1"


_server = Lifetime()


def begin(engine: Any, state: Any, args: Any) -> None:
    """The server of this process starts."""
    _server.begin(engine, state, args)


def engine_died() -> bool:
    """Whether the server of this process, which has ended, ended because its engine did."""
    return _server.died
