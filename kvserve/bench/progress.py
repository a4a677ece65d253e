"""Waiting for a process that starts: as long as it gets on, not for a fixed time.

On a busy machine a server may take ten times as long as on an idle one, and one that hangs should not be waited for.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from kvserve.measuring.children import describe_end, last_lines

STALL_SECONDS = 180.0  # without any progress
END_SECONDS = 3600.0
LEAST_CPU_SHARE = 0.005  # of the time to stand still: less than that share of a core is no progress
POLL_SECONDS = 0.5


class Progress:
    """What a process does, its descendants included.

    Args:
        log: where its output goes.
        least_cpu_seconds: CPU time that counts as progress.
    """

    def __init__(self, process: subprocess.Popen[Any], log: Path, least_cpu_seconds: float) -> None:
        self.process, self.log, self.least_cpu_seconds = process, log, least_cpu_seconds
        self._cpu: dict[int, float] = {}
        self._seen = self._mark()

    def has_come(self) -> bool:
        """Whether the log grew, or enough CPU time was spent, since this was true last."""
        found = self._mark()
        if found[0] != self._seen[0] or found[1] >= self._seen[1] + self.least_cpu_seconds:
            self._seen = found
            return True
        return False

    def _mark(self) -> tuple[int, float]:
        """Bytes of the log, CPU seconds of all processes seen so far."""
        try:
            root = psutil.Process(self.process.pid)
            for one in (root, *root.children(recursive=True)):
                times = one.cpu_times()
                self._cpu[one.pid] = times.user + times.system
        except psutil.Error:  # a process that ended meanwhile keeps what it had
            pass
        return self.log.stat().st_size, sum(self._cpu.values())


def wait_until(
    is_ready: Callable[[], bool], process: subprocess.Popen[Any], log: Path, stall_seconds: float = STALL_SECONDS,
    end_seconds: float = END_SECONDS,
) -> None:  # fmt: skip
    """Wait while the process makes progress.

    Args:
        is_ready: asked about twice a second.

    Raises:
        RuntimeError: the process ended, stood still for `stall_seconds`, or was not ready after `end_seconds`; with its
            last lines.
    """
    progress, start = Progress(process, log, LEAST_CPU_SHARE * stall_seconds), time.monotonic()
    last = start
    while True:
        code = process.poll()
        if code is not None:
            raise RuntimeError(_because(f"the server ended with {describe_end(code)}", log))
        if is_ready():
            return
        now = time.monotonic()
        if progress.has_come():
            last = now
        elif now - last > stall_seconds:
            raise RuntimeError(_because(f"the server stood still for {stall_seconds:.0f} s and was not ready", log))
        if now - start > end_seconds:
            raise RuntimeError(_because(f"the server was not ready after {end_seconds:.0f} s", log))
        time.sleep(POLL_SECONDS)


def _because(what: str, log: Path) -> str:
    return f"{what}; its last lines were:\n{last_lines(log)}"
