"""Requests that cannot go on: what went wrong ends the request, not the engine.

Whatever kvserve does for one request in the scheduler's process runs under `guard`. The scheduler then ends the request
with an error (kvserve.engine.scheduler); until it does, the request counts as failed and nothing more is done for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kvserve.engine.log import logger


class Failures:
    """Failed requests that the scheduler has not ended yet, with the reasons that clients are told."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._reasons

    def add(self, request_id: str, reason: str) -> None:
        """End a request; of several reasons the first one counts."""
        logger.warning("request %s ends with an error: %s", request_id, reason)
        self._reasons.setdefault(request_id, reason)

    @contextmanager
    def guard(self, request_id: str) -> Iterator[None]:
        """End the request if the block raises; what the block would have returned is then missing."""
        try:
            yield
        except Exception as error:
            logger.exception("kvserve failed at request %s", request_id)
            self.add(request_id, f"kvserve failed: {type(error).__name__}: {error}")

    def take(self) -> dict[str, str]:
        """The reasons since the last call by request id."""
        reasons, self._reasons = self._reasons, {}
        return reasons
