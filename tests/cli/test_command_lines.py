"""Every bad command line ends at once, with exit code 2 and one sentence."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvserve.arguments import model_folder
from kvserve.cli import launch, main
from tests.cases.command_lines import REFUSED_BY_VLLM, REFUSED_EARLY, Line, taken_port, write_files

SECONDS = 30.0  # each, on a loaded machine; nearly all take a few milliseconds


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    return folder


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with taken_port() as number:
        yield number


def assert_one_sentence(line: Line, code: int, out: str, err: str) -> None:
    assert code == 2, (line, err)
    assert out == "" and err.count("\n") == 1 and err.startswith("kvserve"), (line, out, err)
    assert "error: " in err and line.part in err and len(err) < 1000, (line, err)


def test_there_are_enough_of_them():
    lines = [(line.words, line.environment) for line in (*REFUSED_EARLY, *REFUSED_BY_VLLM)]
    assert len(lines) == len(set(lines)) >= 150


@pytest.mark.parametrize("line", REFUSED_EARLY, ids=lambda line: line.words[:60] or "nothing")
def test_refused_before_anything_heavy_is_loaded(line, files, port, capfd, monkeypatch):
    monkeypatch.setattr(launch, "launch", lambda *arguments: pytest.fail(f"{line} was started"))
    monkeypatch.delenv("KVSERVE_POLICY", raising=False)
    for name, value in line.variables(files).items():
        monkeypatch.setenv(name, value)
    model_folder.hub_answers.cache_clear()
    start = time.monotonic()
    code = main(line.arguments(files, port))
    assert time.monotonic() - start < SECONDS
    assert_one_sentence(line, code, *capfd.readouterr())


VLLM_WARNING = re.compile(r"(\(\w+ pid=\d+\) )?WARNING \d\d-\d\d ")  # vLLM logs to standard output


def run(line: Line, files: Path, port: int) -> tuple[int, str, str]:
    """The line in a process of its own: its exit code and what it printed, of loaded libraries' lines nothing."""
    command = [sys.executable, "-m", "kvserve.cli", *line.arguments(files, port)]
    own = {name: value for name, value in os.environ.items() if name != "KVSERVE_POLICY"}
    environment = {**own, **line.variables(files)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, stdin=subprocess.DEVNULL
    )
    if line in REFUSED_EARLY:
        return done.returncode, done.stdout, done.stderr
    said = [text for text in done.stderr.splitlines(keepends=True) if re.match("kvserve.* error: |Traceback", text)]
    printed = [text for text in done.stdout.splitlines(keepends=True) if not VLLM_WARNING.match(text)]
    return done.returncode, "".join(printed), "".join(said)


@pytest.mark.slow  # minutes: every line starts a process, some of which load torch or vLLM
def test_the_same_in_processes_of_their_own(files, port):
    lines = [*REFUSED_EARLY, *REFUSED_BY_VLLM]
    with ThreadPoolExecutor(2) as pool:
        for line, answer in zip(lines, pool.map(lambda line: run(line, files, port), lines), strict=True):
            assert_one_sentence(line, *answer)
