"""What happens between a good command line and a server that answers: addresses, levels, warnings, exit codes."""

from __future__ import annotations

import argparse
import asyncio
import io
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvloop

from kvserve import default_model
from kvserve.arguments import model_folder
from kvserve.arguments.model_folder import check_model_files
from kvserve.cli import address, launch, main
from kvserve.cli.address import check_address
from kvserve.cli.pinning import pinned_beside
from kvserve.engine.lifetime import Lifetime, base_url
from kvserve.errors import ConversionError, UnsupportedError, UsageError

# The address


def test_the_address_is_free_again_after_the_check():
    for host in ("127.0.0.1", None, "0.0.0.0", "localhost"):
        check_address({"host": host, "port": 0})


def test_ports_need_rights(monkeypatch):
    class Socket(address.socket.socket):
        def bind(self, where):
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(address.socket, "socket", Socket)
    with pytest.raises(UsageError, match="port 80 needs more rights"):
        check_address({"port": 80})


@pytest.mark.parametrize(
    ("host", "uds", "key", "warns"),
    [(None, None, None, True), ("0.0.0.0", None, None, True), ("::", None, None, True),
     ("127.0.0.1", None, None, False), (None, "/tmp/x", None, False), (None, None, ["secret"], False)],
)  # fmt: skip
def test_an_open_port_without_a_key_is_said(monkeypatch, host, uds, key, warns):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    said = launch.open_to_all(argparse.Namespace(host=host, uds=uds, api_key=key, port=8000))
    assert (said is not None) == warns
    if said:
        assert "--host 127.0.0.1" in said and "--api-key" in said
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert launch.open_to_all(argparse.Namespace(host=host, uds=uds, api_key=key, port=8000)) is None


@pytest.mark.parametrize(
    ("args", "url"),
    [
        ({"host": None}, "http://localhost:8000/v1"),
        ({"host": "0.0.0.0"}, "http://localhost:8000/v1"),
        ({"host": "::1"}, "http://[::1]:8000/v1"),
        ({"host": "gpu7", "ssl_certfile": "x"}, "https://gpu7:8000/v1"),
        ({"host": None, "uds": "/run/x"}, "unix:/run/x"),
    ],
)
def test_the_base_url_is_one_that_a_client_takes(args, url):
    assert base_url(argparse.Namespace(port=8000, **args)) == url


# Log levels


def levels_after(monkeypatch, verbose: bool, **given: str) -> tuple[str | None, str | None]:
    names = ("VLLM_LOGGING_LEVEL", launch.OWN_LEVEL, "VLLM_LOGGING_CONFIG_PATH")
    for name in (*names, "TORCH_CPP_LOG_LEVEL", "PYTHONWARNINGS"):
        monkeypatch.setenv(name, "")  # so that it is restored afterwards
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    launch.choose_log_levels(verbose)
    return os.environ.get(names[0]), os.environ.get(names[1])


def test_vllm_is_quiet_unless_asked(monkeypatch):
    assert levels_after(monkeypatch, verbose=False) == ("WARNING", "INFO")
    assert levels_after(monkeypatch, verbose=True) == (None, None)
    assert levels_after(monkeypatch, verbose=False, VLLM_LOGGING_LEVEL="DEBUG") == ("DEBUG", None)
    assert levels_after(monkeypatch, verbose=False, VLLM_LOGGING_CONFIG_PATH="x.json") == (None, None)


@pytest.mark.parametrize(
    ("environment", "level"),
    [({}, "INFO"), ({"VLLM_LOGGING_LEVEL": "ERROR"}, "ERROR"), ({"KVSERVE_LOG_LEVEL": "nonsense"}, "INFO"),
     ({"VLLM_LOGGING_LEVEL": "WARNING", "KVSERVE_LOG_LEVEL": "info"}, "INFO")],
)  # fmt: skip
def test_the_level_of_kvserves_own_lines(environment, level):
    script = "import logging; from kvserve.engine.log import logger; print(logging.getLevelName(logger.level))"
    clean = {name: value for name, value in os.environ.items() if name not in ("VLLM_LOGGING_LEVEL", launch.OWN_LEVEL)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**clean, **environment}, timeout=60
    )
    assert done.stdout.strip() == level


def test_own_lines_carry_the_name_once_and_warnings_their_level():
    from kvserve.engine.log import logger

    stream, handler = io.StringIO(), logger.handlers[0]
    assert isinstance(handler, logging.StreamHandler)
    before = handler.setStream(stream)
    try:
        logger.warning("first\nsecond")
        logger.error("%s pages", 3)
    finally:
        handler.setStream(before)
    assert stream.getvalue() == "kvserve: warning: first\nsecond\nkvserve: error: 3 pages\n"


# Pinned neighbours


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: nothing to choose")
def test_a_pinned_server_on_the_same_cores_is_named(monkeypatch):
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    core = min(os.sched_getaffinity(0))
    wait = f"import os; os.sched_setaffinity(0, {{{core}}}); print('pinned', flush=True); input()"
    command = ["VLLM::Worker_test", "-c", wait]
    with subprocess.Popen(
        command, executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as neighbour:
        try:
            assert neighbour.stdout and neighbour.stdout.readline() == "pinned\n"
            if not (said := pinned_beside("cpu")):
                pytest.fail("nothing was said")
            assert f"is pinned to cores {core}" in said and "VLLM_CPU_OMP_THREADS_BIND=nobind" in said
            assert pinned_beside("cuda") is None
            monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            assert pinned_beside("cpu") is None
        finally:
            neighbour.kill()


def processes(folder: Path, name: str, allowed: str) -> Path:
    task = folder / "4711" / "task" / "4712"
    task.mkdir(parents=True)
    (folder / "4711" / "cmdline").write_bytes(f"{name}\0--option\0".encode())
    (task / "status").write_text(f"Name:\tx\nCpus_allowed_list:\t{allowed}\n")
    (folder / "1").mkdir()  # a process that ended meanwhile
    return folder


@pytest.mark.parametrize(
    ("name", "allowed", "binding", "cores"),
    [
        ("VLLM::Worker", "0", "auto", "0"),
        ("VLLM::Worker", "0-1,3", "auto", "0, 1, 3"),
        ("VLLM::Worker", "0-3", "auto", None),
        ("VLLM::Worker", "8-9", "auto", None),
        ("VLLM::Worker", "0-1", "2-3", None),
        ("VLLM::Worker", "2", "0|2-3", "2"),
        ("VLLM::Worker", "nonsense", "auto", None),
        ("/usr/bin/python3", "0", "auto", None),
    ],
)
def test_only_servers_confined_to_some_of_our_cores_count(tmp_path, monkeypatch, name, allowed, binding, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", binding)
    said = pinned_beside("cpu", processes(tmp_path, name, allowed))
    assert said is None if cores is None else f"process 4711 (VLLM::Worker) is pinned to cores {cores}," in str(said)


# Exit codes


def create_engine_config() -> None:
    raise ValueError("max_model_len is\ntoo large")


def init_app_state() -> None:
    raise ValueError("no such template")


def engine_failed() -> None:
    raise RuntimeError("Engine core initialization failed. See root cause above.")


def interrupted() -> None:
    raise KeyboardInterrupt("terminated")


@pytest.mark.parametrize(
    ("ends", "died", "code", "said"),
    [
        (create_engine_config, False, 2, "kvserve: error: max_model_len is too large\n"),
        (init_app_state, False, 1, "kvserve: error: no such template\n"),
        (engine_failed, False, 1, "kvserve: error: Engine core initialization failed. See root cause above.\n"),
        (interrupted, False, 130, "kvserve: stopped before it was ready\n"),
        (lambda: None, True, 1, "kvserve: error: the engine died, so the server ended; its log above says why\n"),
        (lambda: None, False, 0, ""),
    ],
)
def test_the_exit_code_says_how_the_server_ended(monkeypatch, capsys, ends, died, code, said):
    from vllm.entrypoints.cli.serve import ServeSubcommand

    from kvserve.engine import lifetime

    monkeypatch.setattr(ServeSubcommand, "cmd", staticmethod(lambda args: ends()))
    monkeypatch.setattr(lifetime, "engine_died", lambda: died)
    monkeypatch.setattr("vllm.logger.configure_logging_from_args", lambda args: None)
    assert launch._serve(argparse.Namespace(), verbose=False) == code
    assert capsys.readouterr().err == said


def test_a_traceback_is_shown_where_it_was_asked_for(monkeypatch, capsys):
    from vllm.entrypoints.cli.serve import ServeSubcommand

    monkeypatch.setattr(ServeSubcommand, "cmd", staticmethod(lambda args: engine_failed()))
    monkeypatch.setattr("vllm.logger.configure_logging_from_args", lambda args: None)
    assert launch._serve(argparse.Namespace(), verbose=True) == 1
    assert "Traceback" in capsys.readouterr().err


def test_the_first_of_pydantics_errors_is_described():
    from pydantic import BaseModel, ValidationError

    class Model(BaseModel):
        size: int

    with pytest.raises(ValidationError) as caught:
        Model.model_validate({"size": "many"})
    said = launch.describe(caught.value)
    assert said.startswith("size: Input should be a valid integer") and "pydantic" not in said
    assert launch.describe(KeyError()) == "KeyError"


@pytest.mark.parametrize(
    ("dies", "stops", "died"), [(False, True, False), (True, False, True), (True, True, True), (False, False, False)]
)
def test_an_engine_that_died_is_told_from_a_server_that_was_stopped(capfd, dies, stops, died):
    """vLLM reports an error after a stop, too: its engine is gone then as well."""
    engine, state = SimpleNamespace(errored=False), SimpleNamespace()
    lifetime, before = Lifetime(), {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    async def serve() -> None:
        stopped = asyncio.Event()
        lifetime.begin(engine, state, argparse.Namespace(host="127.0.0.1", port=1))
        await asyncio.sleep(0.3)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
        state.server = SimpleNamespace(started=True)
        await asyncio.sleep(0.3)
        engine.errored = dies
        if stops:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(stopped.wait(), 10)
            engine.errored = True

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # vLLM's
            runner.run(serve())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert lifetime.died is died


# Models


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """Nothing was downloaded, and nobody answers where the hub should be."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    model_folder.hub_answers.cache_clear()
    yield
    model_folder.hub_answers.cache_clear()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("some-org/model", "127.0.0.1 does not answer"),
        ("gpt2", "127.0.0.1 does not answer"),
        ("a/b/c", "ORGANISATION/NAME"),
        ("some org/model", "ORGANISATION/NAME"),
        ("\u212bngstrom/model", "ORGANISATION/NAME"),
    ],
)
def test_a_model_that_cannot_be_had_is_refused_before_vllm_retries(no_hub, name, part):
    with pytest.raises(UsageError, match=part):
        check_model_files(name, {})


def test_without_the_hub_a_name_must_have_been_downloaded(no_hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
        check_model_files("some-org/model", {})
    repo = tmp_path / "models--some-org--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "snapshots" / "abc" / "config.json").write_text("{}")
    check_model_files("some-org/model", {})
    monkeypatch.delenv("HF_HUB_OFFLINE")
    check_model_files("some-org/model", {})
    check_model_files("s3://bucket/model", {})


def test_a_proxy_or_a_hub_that_listens_is_asked_by_vllm(no_hub, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}")
        check_model_files("some-org/model", {})
    model_folder.hub_answers.cache_clear()
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    check_model_files("some-org/model", {})


def test_models_in_other_formats_are_left_to_vllm(tmp_path):
    (tmp_path / "params.json").write_text("{}")
    check_model_files(str(tmp_path), {"load_format": "mistral"})
    (tmp_path / "model.gguf").touch()
    check_model_files(str(tmp_path / "model.gguf"), {})
    (tmp_path / "config.json").write_text("{}")
    check_model_files(str(tmp_path), {"load_format": "dummy"})


# The default model


@pytest.fixture
def conversion(tmp_path, monkeypatch):
    """The cache lies in a folder of its own, and a conversion does what `conversion.run` says."""
    monkeypatch.setenv("KVSERVE_CACHE", str(tmp_path / "cache"))
    case = SimpleNamespace(run=lambda source, target: None, folder=tmp_path / "cache")
    monkeypatch.setattr(default_model, "_gguf_folder", lambda: tmp_path)
    monkeypatch.setattr(default_model, "_convert", lambda source, target: case.run(source, target))
    return case


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ValueError("not a GGUF"), KeyboardInterrupt()]
)
def test_a_conversion_that_fails_leaves_nothing(conversion, error, capsys):
    def run(source: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise error

    conversion.run = run
    code = main(["prepare-model"])
    assert names(conversion.folder) == []
    if isinstance(error, KeyboardInterrupt):
        assert code == 130
    else:
        last = capsys.readouterr().err.splitlines()[-1]
        assert code == 1 and "the default model could not be converted" in last and str(error) in last
        with pytest.raises(ConversionError):
            default_model.prepare_default_model()


def test_a_conversion_that_was_killed_leaves_nothing_for_long(conversion):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for pid in (gone.pid, os.getppid()):
        (conversion.folder / f"smollm2-135m-instruct.partial-{pid}").mkdir(parents=True)
    conversion.run = lambda source, target: (target / "model.safetensors").touch()
    assert default_model.prepare_default_model() == conversion.folder / "smollm2-135m-instruct"
    assert names(conversion.folder) == ["smollm2-135m-instruct", f"smollm2-135m-instruct.partial-{os.getppid()}"]


def test_no_home_folder_is_one_sentence(monkeypatch):
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", staticmethod(home))
    for name in ("KVSERVE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UnsupportedError, match="set KVSERVE_CACHE"):
        default_model.prepare_default_model()


# Optional packages


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [
        ("eval --policies none", "scipy", "kvserve[bench]"),
        ("eval --policies none", "numpy", "kvserve[bench]"),
        ("bench --quick", "httpx", "kvserve[bench]"),
        ("inspect --policy snapkv text --png x.png", "matplotlib", "kvserve[plot]"),
        ("policies", "torch", "kvserve[cpu]"),
    ],
)
def test_a_missing_package_is_named_with_what_brings_it(command, module, extra, tmp_path):
    script = f"import sys; sys.modules[{module!r}] = None; from kvserve.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", script, *command.split()], capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert module in done.stderr and extra in done.stderr
