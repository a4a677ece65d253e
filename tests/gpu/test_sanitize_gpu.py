"""`make sanitize-gpu` without a GPU: what it refuses, and what it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import sanitize_gpu

    monkeypatch.setenv("COMPUTE_SANITIZER", "/there/compute-sanitizer")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return sanitize_gpu


def test_what_is_missing_is_named(script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main([]) == 2
    monkeypatch.delenv("COMPUTE_SANITIZER")
    monkeypatch.setattr(script.shutil, "which", lambda *arguments, **options: None)
    assert script.main([]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "no CUDA device" in errors[0] and "no compute-sanitizer; install the CUDA toolkit" in errors[1]


def test_each_tool_runs_over_existing_tests_and_a_finding_fails(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    ran: list[list[str]] = []

    def run(command: list[str], cwd: Path, env: dict[str, str]) -> SimpleNamespace:
        ran.append(command)
        assert cwd == ROOT and env["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        return SimpleNamespace(returncode=int("racecheck" in command and "tests/kernels/test_cuda.py" in command))

    monkeypatch.setattr(script.subprocess, "run", run)
    assert script.main([]) == 1
    assert "failed: racecheck, cuda" in capsys.readouterr().out
    assert [command[2] for command in ran] == [*script.TOOLS, *script.TOOLS]
    for command in ran:
        files = [ROOT / part for part in command if part.startswith("tests/")]
        content = "".join(path.read_text(encoding="utf-8") for path in files)
        assert command[0] == "/there/compute-sanitizer" and command[command.index(sys.executable) + 1] == "-m"
        assert all(name in content for name in command[-1].split(" or "))
    assert script.main(["--tools", "memcheck"]) == 0


def test_the_smallest_run_is_one_check_of_each_kind_of_kernels(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    pytest.importorskip("triton")
    from benchmarks.gpu_checks import Name, case_names

    ran: list[list[str]] = []
    monkeypatch.setattr(
        script.subprocess, "run", lambda command, **_: ran.append(command) or SimpleNamespace(returncode=len(ran) - 1)
    )
    path = tmp_path / "result.json"
    assert script.main(["--smallest", "--tools", "memcheck", "--result", str(path)]) == 1
    assert json.loads(path.read_text()) == {
        "ran": ["memcheck, cuda", "memcheck, triton"],
        "failed": ["memcheck, triton"],
    }
    names = [Name.of(command[-1]) for command in ran]
    assert [name.kernels for name in names] == ["cuda", "triton"] and set(names) <= set(case_names(with_cuda=True))
    assert all("pytest" not in command for command in ran)
