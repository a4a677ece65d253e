"""A process that starts is waited for while it makes progress."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvserve.bench.progress import wait_until
from kvserve.measuring.children import end_group

STALL = 3.0

WORKS = "while True: pass"
WRITES = "import time\nwhile True: print('.', flush=True); time.sleep(1.5)"
WORKS_IN_A_CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WORKS!r}])"
SLEEPS = "import time\nprint('hangs', flush=True); time.sleep(600)"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], tuple[subprocess.Popen[bytes], Path]]]:
    started: list[subprocess.Popen[bytes]] = []

    def run(script: str) -> tuple[subprocess.Popen[bytes], Path]:
        log = tmp_path / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", script], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        started.append(process)
        return process, log

    yield run
    for process in started:
        end_group(process, 0.0)


@pytest.mark.parametrize("script", [WORKS, WRITES, WORKS_IN_A_CHILD])
def test_what_works_or_writes_is_waited_for_beyond_the_time_to_stand_still(start: Callable, script: str) -> None:
    begin = time.monotonic()
    wait_until(lambda: time.monotonic() - begin > 2.5 * STALL, *start(script), stall_seconds=STALL)


def test_what_stands_still_is_given_up_with_its_last_lines(start: Callable) -> None:
    with pytest.raises(RuntimeError, match=r"stood still for 3 s(.|\n)*hangs"):
        wait_until(lambda: False, *start(SLEEPS), stall_seconds=STALL)


def test_what_works_for_ever_is_given_up_in_the_end(start: Callable) -> None:
    with pytest.raises(RuntimeError, match="not ready after 2 s"):
        wait_until(lambda: False, *start(WORKS), stall_seconds=STALL, end_seconds=2.0)


def test_what_ends_is_said_at_once(start: Callable) -> None:
    with pytest.raises(RuntimeError, match=r"ended with exit code 3(.|\n)*no port"):
        wait_until(lambda: False, *start("print('no port', flush=True); raise SystemExit(3)"))
    with pytest.raises(RuntimeError, match="ended with SIGABRT"):
        wait_until(lambda: False, *start("import os; os.abort()"))
