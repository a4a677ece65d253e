"""Triton decides on import whether it interprets: without a GPU the kernels are imported under its interpreter."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton.experimental.gluon  # noqa: F401 (the interpreter's first launch would import it)

        import kvserve.attention.triton  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
    finally:
        del os.environ["TRITON_INTERPRET"]  # servers that tests start must not interpret


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


# Of the command line's tests. Imported where used: the GPU tests run without what the command line needs.


@pytest.fixture
def started(monkeypatch):
    """Replaces the launch of a server by a record of what it would have been; the port it would have is free."""
    from kvserve.arguments import model_folder
    from kvserve.cli import address, launch, serve

    calls = []
    monkeypatch.setattr(address, "DEFAULT_PORT", 0)
    monkeypatch.setattr(serve, "check_default_model", lambda: None)
    monkeypatch.setattr(model_folder, "hub_answers", lambda: True)
    monkeypatch.setattr(launch, "launch", lambda *arguments: calls.append(arguments) or 0)
    return calls


@pytest.fixture
def refusal(started, capsys):
    """Runs a command line that must be refused, and returns its message."""

    from kvserve.cli import main

    def run(*arguments):
        assert main(list(arguments)) == 2
        assert started == []
        output = capsys.readouterr()
        assert output.out == "" and output.err.startswith("kvserve: error: ") and output.err.count("\n") == 1
        return output.err

    return run


@pytest.fixture
def default_model(monkeypatch):
    """There is one, with the config of LLAMA."""
    from kvserve.cli import launch, serve
    from tests.cases.cli_cases import LLAMA

    monkeypatch.setattr(launch, "prepare_default_model", lambda: Path("/cache/default"))
    monkeypatch.setattr(serve, "read_model_config", lambda model: LLAMA)
    monkeypatch.setattr(serve, "check_model_files", lambda model, options: None)
