"""Runs the steps of a measurement within a budget of time, each in a child process with a limit of its own.

Standard library only: nothing a step does, and no package it needs, can end the run. What is known is written after
every step, and a later run takes from that file what passed and is still true.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

RESERVE_S = 8.0  # of the budget, for ending the last step and writing
GRACE_S = 2.0  # between asking a step to end and ending it
FINISH_S = 12.0  # of a step's time, for what it has begun
KILL_WAIT_S = 3.0  # for a killed process to be gone; one that hangs in a driver may never be
LOG_TAIL_LINES = 30
PASSED, FAILED, TIMED_OUT, SKIPPED, NOT_STARTED = "passed", "failed", "timed out", "skipped", "not started"


class Times(NamedTuple):
    """Seconds of a step: at most; less than that is not worth a start; what it should take (for the plan alone)."""

    limit_s: float
    least_s: float
    estimate_s: float


@dataclass(frozen=True)
class Step:
    """One child process.

    Attributes:
        command: gets `--result FILE` behind it, where the step may write JSON, whenever it has something. A part
            "{limit_s}" stands for the seconds after which it should begin nothing more.
        cannot: why it cannot run here; None: it can.
        still_there: whether what it made exists; a passed step that made nothing always does.
    """

    name: str
    what: str
    command: Sequence[str]
    times: Times
    cannot: str | None = None
    still_there: Callable[[], bool] = lambda: True


@dataclass
class Record:
    """What became of a step.

    Attributes:
        limit_s: the time it was given. result: its own JSON, partial where it did not pass.
    """

    status: str
    reason: str = ""
    seconds: float = 0.0
    limit_s: float = 0.0
    at: str = ""
    commit: str | None = None
    result: Any = None
    log: list[str] = field(default_factory=list)


@dataclass
class Journal:
    """All records of one machine and one state of the sources, as they are in the file.

    Attributes:
        subject: what results are true of: the device, the versions, a digest of the sources.
        records: by step.
    """

    path: Path
    subject: dict[str, Any]
    records: dict[str, Record] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)  # of the whole file, beside the records

    @classmethod
    def open(cls, path: Path, subject: dict[str, Any], earlier: Iterable[Path] = ()) -> tuple[Journal, str]:
        """The journal, with the records of the first file among `path` and `earlier` that is about `subject`.

        Returns:
            it, and a line that says what was taken over or why not.
        """
        line = "no earlier results"
        for candidate in (path, *earlier):
            content = _read_json(candidate)
            if not isinstance(content, dict) or not isinstance(content.get("steps"), dict):
                continue
            if differing := [name for name in subject if content.get(name) != subject[name]]:
                line = f"earlier results in {candidate} are stale: {', '.join(differing)} differ"
                continue
            records = {name: Record(**record) for name, record in content["steps"].items()}
            return cls(path, subject, records), f"goes on from {candidate}"
        return cls(path, subject), line

    def save(self) -> None:
        """Write the file, whole or not at all."""
        records = {name: asdict(record) for name, record in self.records.items()}
        content = {"schema_version": 1, "suite": "gpu-run", **self.subject, **self.more, "steps": records}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        aside.replace(self.path)


@dataclass
class Runner:
    """Runs groups of steps; those of a group at the same time.

    Attributes:
        deadline: time.monotonic() at which all must be done.
        logs: folder for what steps print.
        after: called with the journal after every step, before it is saved.
    """

    journal: Journal
    deadline: float
    logs: Path
    commit: str | None = None
    after: Callable[[Journal], None] = lambda journal: None
    say: Callable[[str], None] = print
    _children: set[subprocess.Popen[bytes]] = field(default_factory=set)

    def run(self, groups: Iterable[Sequence[Step]]) -> None:
        """All of them; where it is interrupted, the steps that run are ended, too."""
        for group in groups:
            todo = [step for step in group if not self._is_done(step)]
            with ThreadPoolExecutor(max(len(todo), 1)) as pool:
                try:
                    for step, record in zip(todo, pool.map(self._run_one, todo), strict=True):
                        self._keep(step, record)
                except BaseException:
                    for child in list(self._children):
                        end_group(child)
                    raise

    def _keep(self, step: Step, record: Record) -> None:
        self.journal.records[step.name] = record
        self.after(self.journal)
        self.journal.save()
        self.say(line_of(step.name, record))

    def _is_done(self, step: Step) -> bool:
        record = self.journal.records.get(step.name)
        done = record is not None and record.status == PASSED and step.still_there()
        if done:
            self.say(f"{step.name}: passed before, at {record.at}")  # type: ignore[union-attr]
        return done

    def _run_one(self, step: Step) -> Record:
        if step.cannot is not None:
            return Record(SKIPPED, step.cannot)
        left = self.deadline - RESERVE_S - time.monotonic()
        limit = min(step.times.limit_s, left)
        if limit < step.times.least_s:
            earlier = self.journal.records.get(step.name)
            kept = earlier.result if earlier else None
            return Record(NOT_STARTED, f"{max(left, 0):.0f} s left, it needs {step.times.least_s:.0f}", result=kept)
        self.say(f"{step.name}: {step.what}, at most {limit:.0f} s")
        try:
            record = run_step(step, limit, self.logs / f"{step.name}.log", self._children)
        except OSError as error:
            record = Record(FAILED, f"did not start: {error}")
        record.commit = self.commit
        return record


def run_step(step: Step, limit_s: float, log: Path, children: set[subprocess.Popen[bytes]]) -> Record:
    """One step, ended with all its children after `limit_s`; its process is among `children` while it runs."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as output:
        result = Path(folder) / "result.json"
        start, at = time.monotonic(), time.strftime("%Y-%m-%d %H:%M:%S")
        command = [part.replace("{limit_s}", f"{limit_s - FINISH_S:.0f}") for part in step.command]
        child = subprocess.Popen(
            [*command, "--result", str(result)], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        children.add(child)
        try:
            child.wait(limit_s)
            status, reason = _verdict(child.returncode)
        except subprocess.TimeoutExpired:
            status, reason = TIMED_OUT, f"did not end within {limit_s:.0f} s"
        finally:
            end_group(child)
            children.discard(child)
        seconds = time.monotonic() - start
        record = Record(status, reason, round(seconds, 1), round(limit_s, 1), at, result=_read_json(result))
    if status != PASSED:
        record.log = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return record


def end_group(child: subprocess.Popen[bytes]) -> None:
    """End a child that leads a session, and whatever it started; gives up on what no signal ends."""
    for number, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, KILL_WAIT_S)):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            return
        try:
            child.wait(wait_s)
        except subprocess.TimeoutExpired:
            continue


def exit_words(code: int) -> str:
    """An exit code of subprocess in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended by signal {-code}"


def line_of(name: str, record: Record) -> str:
    """One line about a step."""
    seconds = f" ({record.seconds:.0f} s)" if record.seconds else ""
    return f"{name}: {record.status}{seconds}{': ' + record.reason if record.reason else ''}"


def digest_of(paths: Iterable[Path], root: Path) -> str:
    """A digest of files, their names included, whatever order they come in."""
    state = hashlib.sha256()
    for path in sorted(paths):
        state.update(f"{path.relative_to(root)}\0".encode())
        state.update(hashlib.sha256(path.read_bytes()).digest())
    return state.hexdigest()[:16]


def write_result(path: Path | None, content: Any) -> None:
    """What a step calls to leave its JSON, as often as it likes."""
    if path is not None:
        aside = path.with_suffix(".partial")
        aside.write_text(json.dumps(content), encoding="utf-8")
        aside.replace(path)


def _verdict(code: int) -> tuple[str, str]:
    return (PASSED, "") if code == 0 else (FAILED, exit_words(code))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
