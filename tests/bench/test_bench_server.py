"""The server suite of `kvserve bench`: what it reads, its rows, and that no process outlives it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from kvserve.bench import main
from kvserve.bench.load import Measured, client_command, measured, run_client
from kvserve.bench.server import Server, ServerState, free_port, read_info, read_state
from kvserve.bench.server import server_command as real_command
from kvserve.bench.server_options import Load, ServerSizes
from kvserve.bench.server_suite import server
from kvserve.errors import ChildError
from kvserve.measuring import worker
from kvserve.measuring.engines import EngineConfig
from kvserve.measuring.results import Row
from kvserve.measuring.shape import ModelShape
from tests.cases.bench_server_cases import METRICS, all_end, is_running, server_command, wait_for

SHAPE = ModelShape(num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64)
CONFIG = EngineConfig("model", SHAPE, "float32", 1000, seed=0, kv_bytes=2**26, scheduler_options={"max_num_seqs": 8})
# Two requests, the second of them slow to start.
RESULT: dict[str, Any] = {
    "date": "20260101-000000", "request_rate": "inf", "max_concurrency": 2, "duration": 12.3456, "completed": 2,
    "failed": 0, "total_output_tokens": 14, "output_throughput": 1.134, "request_goodput": 0.081,
    "input_lens": [500, 300], "output_lens": [11, 3], "ttfts": [0.5, 11.0], "itls": [[0.1] * 10, [0.2] * 2],
    "latencies": [1.5, 11.4], "start_times": [100.0, 100.1], "errors": ["", ""], "generated_texts": ["a", "b"],
    "median_ttft_ms": 5750.0, "p99_ttft_ms": 10895.0, "median_tpot_ms": 150.0, "p99_tpot_ms": 199.0,
}  # fmt: skip
IDLE = ServerState(running=0, waiting=0, kv_usage=0.0, preemptions=2, prefix_hit_tokens=64)
BUSY = ServerState(running=2, waiting=1, kv_usage=0.98765, preemptions=3, prefix_hit_tokens=64)
MEASURED = measured(RESULT, [IDLE, BUSY, IDLE._replace(preemptions=5, prefix_hit_tokens=96)], 2)


def silent(line: str) -> None:
    """No progress in tests."""


# -- command line ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--request-rate", "0"], "--request-rate: must be a number above 0, got '0'"),
        (["--request-rate", "inf"], "--request-rate: must be a number above 0"),
        (["--goodput-ttft-ms", "soon"], "--goodput-ttft-ms: must be a number above 0, got 'soon'"),
        (["--goodput-tpot-ms", "-5"], "--goodput-tpot-ms"),
        (["--requests", "1.5"], "--requests: must be a whole number of at least 1"),
        (["--output-tokens", "3"], "--output-tokens: must be a whole number of at least 4"),
        (["--max-concurrency", "33"], "--max-concurrency 33 needs at least as many --requests, there are 32"),
        (["--kv-bytes", "1000000"], "--kv-bytes 1000000 is too small: a request of 512 tokens under stock needs"),
    ],
)
def test_options_that_cannot_be_followed_are_refused_in_one_sentence(
    argv: list[str], part: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--suite", "server", "--model", str(model_folder(tmp_path)), *argv]) == 2
    error = capsys.readouterr().err
    assert part in error and len(error.splitlines()) == 1


def model_folder(folder: Path) -> Path:
    config = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_servers_differ_in_nothing_but_their_program() -> None:
    stock, policy = (real_command(name, CONFIG, 8123) for name in ("stock", "kv-compress@4"))
    assert stock[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert policy[:5] == [sys.executable, "-m", "kvserve.cli", "--policy", "kv-compress@4"]
    assert stock[3:] == policy[5:]
    options = " ".join(stock)
    for part in ("--kv-cache-memory-bytes 67108864", "--max-num-seqs 8", "--max-model-len 1000", "--enforce-eager"):
        assert part in options
    assert "--no-enforce-eager" in real_command("stock", replace(CONFIG, enforce_eager=False), 8123)


def test_the_two_loads_differ_in_rate_and_concurrency() -> None:
    sizes = ServerSizes(request_rate=0.5, max_concurrency=4)
    closed, poisson = (client_command("http://x", load, sizes, "model", 7, Path("/a/b.json")) for load in sizes.loads())

    def option(command: list[str], name: str) -> str:
        return command[command.index(name) + 1]

    assert (option(closed, "--request-rate"), option(closed, "--max-concurrency")) == ("inf", "4")
    assert option(poisson, "--request-rate") == "0.5" and "--max-concurrency" not in poisson
    assert option(poisson, "--seed") == "7"
    assert option(poisson, "--goodput") == "ttft:10000.0" and "tpot:200.0" in poisson


# -- reading --------------------------------------------------------------------------------------------------------


def test_the_state_of_a_server_is_read_from_its_metrics() -> None:
    assert read_state(METRICS) == ServerState(3, 5, 0.75, 2, 640)
    assert read_info(METRICS) == {"num_blocks": 22, "block_size": 128}


def test_metrics_that_are_missing_are_named() -> None:
    with pytest.raises(ValueError, match="does not have vllm:num_preemptions_total"):
        read_state(METRICS.replace("vllm:num_preemptions_total", "vllm:other_total"))
    with pytest.raises(ValueError, match="cache_config_info"):
        read_info("")


def test_a_run_is_what_the_client_wrote_and_what_the_server_showed() -> None:
    assert MEASURED.ttft_median_ms == 5750 and MEASURED.tpot_p99_ms == 199
    assert (MEASURED.output_tokens_per_second, MEASURED.good_requests_per_second) == (1.134, 0.081)
    assert (MEASURED.ttft_ms, MEASURED.tpot_ms) == ([500.0, 11000.0], [100.0, 200.0])
    assert (MEASURED.input_tokens, MEASURED.output_tokens) == ([500, 300], [11, 3])
    assert (MEASURED.preemptions, MEASURED.prefix_hit_tokens) == (3, 32), "those during the load"
    assert (MEASURED.peak_running, MEASURED.peak_waiting, MEASURED.peak_kv_usage) == (2, 1, 0.988)


def test_a_result_that_is_not_complete_is_refused() -> None:
    with pytest.raises(RuntimeError, match="does not have request_goodput, errors"):
        measured({key: RESULT[key] for key in RESULT if key not in ("request_goodput", "errors")}, [IDLE], 2)
    failed = {**RESULT, "completed": 1, "errors": ["", "Traceback ...\n  File ...\nConnectionResetError: gone\n"]}
    with pytest.raises(RuntimeError, match="only 1 of 2 requests were answered: ConnectionResetError: gone"):
        measured(failed, [IDLE], 2)


# -- the suite ------------------------------------------------------------------------------------------------------


def run_suite(repeats: int) -> tuple[Any, list[tuple[str, str, int]]]:
    """The suite on servers that are three times as fast as stock in everything; and its calls."""
    calls = []

    def measure(name: str, load: Load, seed: int) -> Measured:
        calls.append((load.name, name, seed))
        if name == "stock":
            return MEASURED
        fields = ("ttft_median_ms", "ttft_p99_ms", "tpot_median_ms", "tpot_p99_ms")
        times = {field: getattr(MEASURED, field) / 3 for field in fields}
        return replace(MEASURED, **times, output_tokens_per_second=3 * 1.134, peak_running=7, preemptions=0)

    names = ["stock", "none", "kivi-2bit"]
    return server(measure, names, ServerSizes().loads(), repeats, seed=5, say=silent), calls


def test_every_repeat_sends_the_same_prompts_to_all_and_no_prompt_twice() -> None:
    _, calls = run_suite(repeats=2)
    groups = [calls[index : index + 3] for index in range(0, 12, 3)]
    assert [group[0][0] for group in groups] == ["closed loop", "closed loop", "Poisson", "Poisson"]
    assert [[name for _, name, _ in group] for group in groups[:2]] == [
        ["stock", "none", "kivi-2bit"], ["none", "kivi-2bit", "stock"],
    ]  # fmt: skip
    assert all(len({seed for _, _, seed in group}) == 1 for group in groups)
    assert len({seed for _, _, seed in calls}) == 4


def test_rows_are_stock_times_ratios_to_them_and_counts() -> None:
    result, _ = run_suite(repeats=2)
    rows: dict[tuple[str, str], Row] = {(row.policy, row.metric): row for row in result.rows}
    assert len(rows) == len(result.rows) == 2 * (5 + 3 * 3 + 2 * 5)
    assert rows["stock", "closed loop: TTFT, median"].measured.median == pytest.approx(5.75)
    assert rows["stock", "closed loop: TTFT, median"].unit == "s"
    for metric in ("TTFT, median", "TTFT, p99", "TPOT, median", "TPOT, p99"):
        assert rows["kivi-2bit", f"Poisson: {metric}, over stock"].measured.median == pytest.approx(1 / 3)
    faster = rows["kivi-2bit", "Poisson: output tokens/s, over stock"]
    assert (faster.measured.median, faster.unit) == (pytest.approx(3), "x")
    assert rows["kivi-2bit", "closed loop: running requests, peak"].measured == (7, 7, 7)
    assert rows["none", "closed loop: preemptions"].measured.median == 0
    assert rows["stock", "Poisson: goodput"].measured.median == 0.081
    assert [run["ttft_ms"] for run in result.raw["runs"]["Poisson"]["none"]] == [[500.0, 11000.0]] * 2
    json.dumps(result.raw, allow_nan=False)


# -- processes ------------------------------------------------------------------------------------------------------


def start(folder: Path, name: str = "stock") -> tuple[Server, list[int]]:
    port = free_port()
    found = Server(name, server_command(folder, name, port), port)
    return found, [int(pid) for pid in (folder / name).read_text().split()]


def test_a_server_answers_and_its_processes_end_with_it(tmp_path: Path) -> None:
    found, pids = start(tmp_path)
    with found:
        assert found.state().running == 3
        found.warm_up(10)
        assert all(map(is_running, pids))
    assert all_end(pids)


def test_the_processes_of_a_server_end_when_the_measurement_fails(tmp_path: Path) -> None:
    found, pids = start(tmp_path)
    with pytest.raises(KeyboardInterrupt), found:
        raise KeyboardInterrupt
    assert all_end(pids)


def test_a_server_that_cannot_start_says_why() -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('port 1 is taken')"]
    with pytest.raises(
        ChildError, match=r"stock: RuntimeError: the server ended with exit code 1(.|\n)*port 1 is taken"
    ):
        Server("stock", command, free_port())


def test_a_server_that_dies_is_reported_with_its_last_lines(tmp_path: Path) -> None:
    found, pids = start(tmp_path)
    with found:
        os.kill(pids[0], signal.SIGKILL)
        with pytest.raises(ChildError, match=r"the server ended with SIGKILL"):
            while True:
                found.state()
    assert all_end(pids)


def test_the_client_ends_when_the_server_cannot_be_watched(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    script = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"

    def watch() -> None:
        wait_for(pid)
        raise ChildError("the server died")

    with pytest.raises(ChildError, match="the server died"):
        run_client([sys.executable, "-c", script], watch)
    assert all_end([int(pid.read_text())])


def test_a_client_that_fails_is_reported_with_its_last_lines() -> None:
    with pytest.raises(ChildError, match=r"vllm bench serve ended with 1(.|\n)*no such server"):
        run_client([sys.executable, "-c", "raise SystemExit('no such server')"], lambda: None)


class Closable:
    """Notes in a file that it was closed."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def wait(self) -> None:
        """Nothing."""

    def close(self) -> None:
        self.path.write_text("closed")


def test_what_a_child_holds_is_closed_when_its_parent_dies_during_a_call(tmp_path: Path) -> None:
    ours, theirs = Pipe()
    path = tmp_path / "closed"
    ours.send((f"{__name__}:Closable", {"path": str(path)}))
    ours.send(("wait", {}))
    ours.close()
    with contextlib.suppress(BrokenPipeError):
        worker.serve(theirs)
    assert path.read_text() == "closed"


# The benchmark itself, with servers and a client that are not vLLM's.
BENCH = """
import signal
import sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {root!r})
from tests.cases.bench_server_cases import server_command
from kvserve.bench import command, load, server
folder = Path({folder!r})
server.server_command = lambda name, config, port: server_command(folder, name, port)
load.client_command = lambda *args: [sys.executable, "-c",
    "import os, time; open({client!r}, 'w').write(str(os.getpid())); time.sleep(60)"]
sys.exit(command.main(["--suite", "server", "--policies", "stock,kivi-2bit", "--model", {folder!r}]))
"""


@pytest.mark.slow  # starts processes that import torch
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_a_benchmark_that_is_stopped(sent: signal.Signals, tmp_path: Path) -> None:
    client = tmp_path / "client"
    script = BENCH.format(
        root=str(Path(__file__).resolve().parents[2]), folder=str(model_folder(tmp_path)), client=str(client)
    )
    bench = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    try:
        pids = [int(wait_for(client, 60))]
        pids += [int(pid) for name in ("stock", "kivi-2bit") for pid in wait_for(tmp_path / name).split()]
        bench.send_signal(sent)
        assert bench.wait(60) != 0
        assert all_end(pids)
    finally:
        bench.kill()


@pytest.mark.server
@pytest.mark.slow
def test_stock_and_a_policy_are_measured_over_http_with_the_same_prompts(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert main(["--suite", "server", "--quick", "--policies", "stock,kivi-2bit", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["failed"] == {} and content["settings"]["server"]["requests"] == 6
    engines = content["engines"]["server"]
    assert engines["stock"]["kv_bytes"] == engines["kivi-2bit"]["kv_bytes"]
    assert engines["kivi-2bit"]["num_blocks"] > 5 * engines["stock"]["num_blocks"]
    for runs in content["raw"]["server"]["runs"].values():
        stock, policy = (runs[name][0] for name in ("stock", "kivi-2bit"))
        assert stock["input_tokens"] == policy["input_tokens"] and len(stock["input_tokens"]) == 6
        assert stock["output_tokens"] == policy["output_tokens"] and len(set(stock["output_tokens"])) > 1
        assert 1 <= stock["peak_running"] <= policy["peak_running"] and policy["preemptions"] == 0
        assert policy["prefix_hit_tokens"] == 0, "fresh prompts"
        assert all(run["ttft_median_ms"] > 0 and run["tpot_median_ms"] > 0 for run in (stock, policy))
    assert {row["policy"] for row in content["rows"]} == {"stock", "kivi-2bit"}
    assert str(tmp_path) not in out.read_text()
