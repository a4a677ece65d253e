"""Child processes: one object each, created and called over a pipe.

Every child leads its own process group, so that nothing it starts (vLLM's engine core and workers) outlives it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvserve.errors import ChildError

CLOSE_TIMEOUT_SECONDS = 20.0
DEATH_SECONDS = 5.0
# What a signal usually means for the kernels measured here.
_SIGNAL_HINTS = {
    signal.SIGILL: "an instruction that this CPU or system does not allow",
    signal.SIGKILL: "by the system where memory ran out",
}


class Child:
    """Proxy of an object living in another process.

    Args:
        name: label for messages and for the log file.
        target: `package.module:Class` to create there.
        kwargs: its constructor's keyword arguments (picklable).
        env: environment variables set on top of the current ones.
    """

    def __init__(self, name: str, target: str, kwargs: Mapping[str, Any], env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._log = tempfile.NamedTemporaryFile("w+", prefix=f"kvserve-bench-{name}-", suffix=".log")  # noqa: SIM115
        ours, theirs = Pipe()
        self._pipe: Connection = ours
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvserve.measuring.worker", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env={**os.environ, **(env or {})},
        )
        theirs.close()
        try:
            self._pipe.send((target, dict(kwargs)))
            self._receive()
        except BaseException:
            self.close(timeout=0.0)  # nobody listens for the end of the pipe yet
            raise

    def call(self, method: str, **kwargs: Any) -> Any:
        """Run one method of the child's object and wait for its result.

        Raises:
            ChildError: it raised, or the process died.
        """
        try:
            self._pipe.send((method, kwargs))
        except BrokenPipeError:
            raise ChildError(self._death()) from None
        return self._receive()

    def _receive(self) -> Any:
        try:
            ok, result = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise ChildError(self._death()) from None
        if not ok:
            raise ChildError(f"{self.name}: {result}")
        return result

    def _death(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(DEATH_SECONDS)  # the pipe closes a little earlier
        end = describe_end(self._process.poll())
        return f"{self.name}: the process died ({end}); its last lines were:\n" + last_lines(Path(self._log.name))

    def close(self, timeout: float = CLOSE_TIMEOUT_SECONDS) -> None:
        """End the process and everything it started, by force after `timeout` seconds."""
        self._pipe.close()  # the worker's loop ends at EOF
        try:
            end_group(self._process, timeout)
        finally:
            self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def describe_end(code: int | None) -> str:
    """How a process ended, in words: its exit code, or the name of the signal.

    Args:
        code: as of Popen.returncode; None: it runs.
    """
    if code is None:
        return "still running"
    if code >= 0:
        return f"exit code {code}"
    try:
        ended_by = signal.Signals(-code)
    except ValueError:
        return f"signal {-code}"
    hint = _SIGNAL_HINTS.get(ended_by)
    return ended_by.name + (f", {hint}" if hint else "")


def end_group(process: subprocess.Popen[Any], timeout: float) -> None:
    """Wait up to `timeout` seconds for a process that leads its own group, then kill all that is left of the group."""
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_lines(log: Path, count: int = 15) -> str:
    """The last lines of a log that are not empty."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-count:])
