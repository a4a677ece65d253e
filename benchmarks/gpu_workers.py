"""Runs named cases in worker processes, which a case may crash or hang: the others go on in a new one.

A worker reads names of cases, one a line, and answers each with a line of JSON. It may keep what cases share. After an
error that leaves its device unusable (`Fatal`), it answers and ends.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu_steps import exit_words

FATAL_WORDS = ("CUDA error", "illegal memory access", "unspecified launch failure", "misaligned address")
READY = "ready"


@dataclass(frozen=True)
class Limits:
    """How many workers there are, and how long they may take.

    Attributes:
        start_s: for a worker to import what it needs.
    """

    workers: int
    case_s: float
    start_s: float = 120.0


@dataclass
class Pool:
    """Workers over one queue of cases.

    Attributes:
        command: starts a worker (`serve_cases`).
        found: called with a case and its answer, a dict with "error" where there is no other; from any thread, one at
            a time.
        drop: whether a case is left out because of what is known by then.
    """

    command: Sequence[str]
    limits: Limits
    found: Callable[[str, dict[str, Any]], None]
    drop: Callable[[str], bool] = lambda case: False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, cases: Sequence[str]) -> None:
        """All cases, in this order where there is one worker."""
        waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
        for case in cases:
            waiting.put(case)
        threads = [threading.Thread(target=self._work, args=(waiting,)) for _ in range(self._count(cases))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _count(self, cases: Sequence[str]) -> int:
        return max(1, min(self.limits.workers, len(cases)))

    def _work(self, waiting: queue.SimpleQueue[str]) -> None:
        worker: _Worker | None = None
        try:
            while (case := self._next(waiting)) is not None:
                if worker is None:
                    worker = _Worker(self.command)
                    if problem := worker.started(self.limits.start_s):
                        worker = None
                        self._report(case, {"error": problem, "died": True})
                        continue
                answer = worker.ask(case, self.limits.case_s)
                self._report(case, answer)
                if answer.get("died"):
                    worker = None
        finally:
            if worker is not None:
                worker.end()

    def _next(self, waiting: queue.SimpleQueue[str]) -> str | None:
        while True:
            try:
                case = waiting.get_nowait()
            except queue.Empty:
                return None
            if not self.drop(case):
                return case

    def _report(self, case: str, answer: dict[str, Any]) -> None:
        with self._lock:
            self.found(case, answer)


class _Worker:
    """One process; a thread of its own reads what it answers, so that waiting has an end."""

    def __init__(self, command: Sequence[str]):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def started(self, limit_s: float) -> str | None:
        """What kept it from starting; None: it runs."""
        answer = self._answer(limit_s)
        return answer.get("error") if answer.get("answer") != READY else None

    def ask(self, case: str, limit_s: float) -> dict[str, Any]:
        assert self.process.stdin is not None
        with suppress(OSError):  # it is gone; its exit code says why
            self.process.stdin.write(case + "\n")
            self.process.stdin.flush()
        return self._answer(limit_s)

    def _answer(self, limit_s: float) -> dict[str, Any]:
        try:
            line = self.lines.get(timeout=limit_s)
        except queue.Empty:
            self.end()
            return {"error": f"hung: no answer within {limit_s:.0f} s", "died": True}
        if line is None:
            return {"error": f"crashed: {exit_words(self.process.wait())}", "died": True}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        self.process.kill()
        with suppress(subprocess.TimeoutExpired):  # it hangs in the driver
            self.process.wait(3)


def serve_cases(prepare: Callable[[], Callable[[str], dict[str, Any]]]) -> int:
    """A worker's whole life: `prepare` imports and returns what answers a case."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints goes to the log

    def say(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    run = prepare()
    say({"answer": READY})
    for line in sys.stdin:
        try:
            say(run(line.rstrip("\n")))
        except Exception as error:  # of whatever kind a case fails with
            words = f"{type(error).__name__}: {error}"
            fatal = any(word in words for word in FATAL_WORDS)
            say({"error": first_lines(words)} | ({"died": True} if fatal else {}))
            if fatal:
                os._exit(1)  # tearing down a broken context may hang
    answers.close()
    return 0


def first_lines(words: str, most: int = 600) -> str:
    """The beginning of a message that may be very long."""
    return words if len(words) <= most else words[:most] + " ..."
