"""`make gpu-run` without a GPU: budget, limits, resuming, and cases that crash or hang."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_steps import FINISH_S, RESERVE_S, Journal, Runner, Step, Times, digest_of, exit_words
from benchmarks.gpu_workers import Limits, Pool

ROOT = Path(__file__).resolve().parents[2]
SUBJECT = {"device": {"name": "a GPU"}, "versions": {"triton": "1"}, "sources": "abc"}
LEAVE = "import json, pathlib, sys; leave = lambda x: pathlib.Path(sys.argv[-1]).write_text(json.dumps(x)); "
QUICK = Times(limit_s=20, least_s=0.1, estimate_s=1)


def step(name: str, code: str, times: Times = QUICK, **more: Any) -> Step:
    """A step that runs `code`, in which leave(x) writes its result."""
    return Step(name, name, [sys.executable, "-c", LEAVE + code], times, **more)


def run(folder: Path, *groups: list[Step], budget_s: float = 60, subject: dict[str, Any] = SUBJECT) -> Journal:
    """A run of the steps over results.json of a folder; returns what a later run would read."""
    path = folder / "results.json"
    journal, _ = Journal.open(path, subject)
    Runner(journal, time.monotonic() + budget_s, folder / "logs", "0123", say=lambda line: None).run(groups)
    return Journal.open(path, subject)[0]


def statuses(journal: Journal) -> dict[str, str]:
    return {name: record.status for name, record in journal.records.items()}


def test_every_step_leaves_its_result_and_a_failure_its_reason(tmp_path: Path):
    steps = (
        [step("good", "leave([1, 2])")],
        [step("bad", "leave('half'); print('why'); sys.exit(3)")],
        [step("crashing", "import os; os.abort()")],
        [step("absent", "leave(1)", cannot="no GPU")],
        [Step("no program", "", ["/nowhere/at/all"], QUICK)],
    )
    records = run(tmp_path, *steps).records
    assert (records["good"].status, records["good"].result, records["good"].commit) == ("passed", [1, 2], "0123")
    assert (records["bad"].status, records["bad"].reason, records["bad"].result) == ("failed", "exit code 3", "half")
    assert records["bad"].log == ["why"] and records["good"].log == []
    assert (records["crashing"].status, records["crashing"].reason) == ("failed", "ended by SIGABRT")
    assert (records["absent"].status, records["absent"].reason) == ("skipped", "no GPU")
    assert records["no program"].status == "failed" and "No such file" in records["no program"].reason


def test_a_step_that_hangs_is_ended_with_what_it_started_and_the_next_one_runs(tmp_path: Path):
    hang = (
        "import signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        "leave(child.pid); time.sleep(600)"
    )
    start = time.monotonic()
    records = run(tmp_path, [step("hang", hang, Times(3, 0.1, 1))], [step("next", "leave(1)")]).records
    assert time.monotonic() - start < 30
    assert records["hang"].status == "timed out" and records["hang"].reason == "did not end within 3 s"
    assert records["next"].status == "passed"
    assert not is_running(records["hang"].result)


def is_running(pid: int) -> bool:
    """Whether a process is there and not just waiting to be collected."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_results_are_in_the_file_before_the_run_is_over(tmp_path: Path):
    path = tmp_path / "results.json"
    read = f"leave(json.loads(pathlib.Path({str(path)!r}).read_text())['steps']['first']['status'])"
    assert run(tmp_path, [step("first", "leave(1)")], [step("second", read)]).records["second"].result == "passed"


def test_a_step_gets_what_is_left_of_the_budget_and_none_starts_with_too_little(tmp_path: Path):
    ends = [f"leave(float({limit!r}))" for limit in ("{limit_s}",)]
    budget = RESERVE_S + FINISH_S + 5
    steps = [step("long", ends[0], Times(1000, 1, 1))], [step("late", "leave(1)", Times(1000, 500, 1))]
    records = run(tmp_path, *steps, budget_s=budget).records
    assert records["long"].status == "passed" and records["long"].limit_s == pytest.approx(FINISH_S + 5, abs=1)
    assert records["long"].result == pytest.approx(5, abs=1), "it is told when to begin nothing more"
    assert records["late"].status == "not started" and "it needs 500" in records["late"].reason


def test_steps_of_a_group_run_at_the_same_time(tmp_path: Path):
    meet = "import time; here, there = (pathlib.Path(r'{0}') / x for x in '{1}'); here.touch()\n"
    meet += "while not there.exists(): time.sleep(0.05)"
    both = [step(name, meet.format(tmp_path, name + other)) for name, other in ("ab", "ba")]
    assert statuses(run(tmp_path, both)) == {"a": "passed", "b": "passed"}


def test_a_second_run_does_what_did_not_pass(tmp_path: Path):
    count = "p = pathlib.Path(r'{}') / '{}'; p.write_text(p.read_text() + 'x' if p.exists() else 'x'); {}"

    def steps(broken: bool) -> list[list[Step]]:
        ending = "sys.exit(1)" if broken else "leave('done')"
        return [
            [step("good", count.format(tmp_path, "good", "leave(7)"))],
            [step("bad", count.format(tmp_path, "bad", ending))],
            [step("product", count.format(tmp_path, "product", "1"), still_there=lambda: False)],
        ]

    assert statuses(run(tmp_path, *steps(True))) == {"good": "passed", "bad": "failed", "product": "passed"}
    again = run(tmp_path, *steps(False))
    assert statuses(again) == {"good": "passed", "bad": "passed", "product": "passed"}
    assert again.records["good"].result == 7
    assert {name: (tmp_path / name).read_text() for name in ("good", "bad", "product")} == {
        "good": "x", "bad": "xx", "product": "xx",
    }, "what passed runs again only where what it made is gone"  # fmt: skip


@pytest.mark.parametrize("changed", ["device", "versions", "sources"])
def test_results_of_another_state_are_stale(tmp_path: Path, changed: str):
    run(tmp_path, [step("good", "leave(1)")])
    other = SUBJECT | {changed: {"name": "another"}}
    journal, line = Journal.open(tmp_path / "results.json", other)
    assert journal.records == {} and f"stale: {changed} differ" in line
    assert run(tmp_path, [step("good", "leave(2)")], subject=other).records["good"].result == 2


def test_a_file_that_is_no_result_is_passed_over_and_an_earlier_one_taken(tmp_path: Path):
    run(tmp_path, [step("good", "leave(1)")])
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    journal, line = Journal.open(broken, SUBJECT, [tmp_path / "results.json"])
    assert journal.records["good"].result == 1 and "goes on from" in line and journal.path == broken
    assert Journal.open(broken, SUBJECT)[1] == "no earlier results"


def test_a_digest_follows_names_and_contents(tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("1")
    two.write_text("2")
    before = digest_of([one, two], tmp_path)
    assert digest_of([two, one], tmp_path) == before
    two.write_text("3")
    assert digest_of([one, two], tmp_path) != before
    two.write_text("2")
    two.rename(tmp_path / "three")
    assert digest_of([one, tmp_path / "three"], tmp_path) != before


def test_an_exit_code_is_told_in_words():
    assert [exit_words(code) for code in (2, -11, -60)] == ["exit code 2", "ended by SIGSEGV", "ended by signal 60"]


# Cases in workers

WORKER = """
import os, sys, time
sys.path.insert(0, {root!r})
from benchmarks.gpu_workers import serve_cases
def prepare():
    state = []
    def run(case):
        state.append(case)
        print("noise on standard output")
        if case == "crash": os.abort()
        if case == "hang": time.sleep(600)
        if case == "wrong": raise ValueError("not so")
        if case == "fatal": raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return {{"before": len(state) - 1, "pid": os.getpid()}}
    return run
sys.exit(serve_cases(prepare))
"""


def pool_of(found: dict[str, dict[str, Any]], workers: int = 1, code: str = WORKER, **more: Any) -> Pool:
    command = [sys.executable, "-c", code.format(root=str(ROOT))]
    return Pool(command, Limits(workers, case_s=6, start_s=30), found.__setitem__, **more)


def test_a_case_that_crashes_hangs_or_breaks_its_device_costs_no_other_case():
    found: dict[str, dict[str, Any]] = {}
    pool_of(found).run(["a", "crash", "b", "hang", "c", "wrong", "d", "fatal", "e"])
    assert list(found) == ["a", "crash", "b", "hang", "c", "wrong", "d", "fatal", "e"], "in order"
    assert found["crash"]["error"] == "crashed: ended by SIGABRT"
    assert found["hang"]["error"] == "hung: no answer within 6 s"
    assert found["wrong"]["error"] == "ValueError: not so" and "illegal memory access" in found["fatal"]["error"]
    fresh = {case: found[case]["before"] for case in "abcde"}
    assert fresh == {"a": 0, "b": 0, "c": 0, "d": 2, "e": 0}, "a worker goes on after an error, not after a fatal one"


def test_workers_share_the_cases():
    found: dict[str, dict[str, Any]] = {}
    pool_of(found, workers=3).run([f"case {number}" for number in range(40)])
    assert len(found) == 40 and all("error" not in answer for answer in found.values())


def test_what_is_dropped_is_not_asked():
    found: dict[str, dict[str, Any]] = {}
    pool_of(found, drop=lambda case: case.startswith("crash") and "crash" in found).run(["crash", "crash 2", "a"])
    assert list(found) == ["crash", "a"]


def test_a_worker_that_cannot_start_is_told_for_each_case():
    found: dict[str, dict[str, Any]] = {}
    pool_of(found, code="import nowhere_to_be_found # {root}").run(["a", "b"])
    assert {answer["error"] for answer in found.values()} == {"crashed: exit code 1"}


# The checks and the timing, as far as a CPU goes


def test_the_matrix_covers_what_is_used_most():
    from benchmarks.gpu_checks import FORMATS, Name, case_names

    names = case_names(with_cuda=True)
    assert {name.format for name in names} == {"kivi-2bit", "boost-2bit", "kivi-4bit", "int8", "dense", "none"}
    for format_name in FORMATS:
        mine = [name for name in names if name.format == format_name and name.kernels == "triton"]
        assert {name.head_dim for name in mine} == {64, 128} and {name.dtype for name in mine} == {
            "float16",
            "bfloat16",
        }
        assert len({name.group for name in mine}) >= 3
    assert {name.format for name in names if name.kernels == "cuda"} == {"kivi-2bit", "boost-2bit", "kivi-4bit"}
    assert all(Name.of(str(name)) == name for name in names)
    assert not [name for name in case_names(with_cuda=False) if name.kernels == "cuda"]


def test_a_check_fails_where_kernels_answer_something_else(monkeypatch: pytest.MonkeyPatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    from benchmarks import gpu_cases
    from benchmarks.gpu_checks import Name, answer_of
    from kvserve.attention.reference import ReferenceAttention

    class Wrong(ReferenceAttention):
        """Attends as if keys were a bit larger, and only in what a head keeps."""

        def _kept_rows(self, cells: Any, request: Any, head: int) -> Any:
            rows = super()._kept_rows(cells, request, head)
            return rows * torch.tensor([1.5, 1.0])[:, None] if len(rows) else rows

    name, cpu = Name("kivi-4bit", "triton", 64, "float16", 2), torch.device("cpu")
    for kernels, wrong in ((ReferenceAttention, set()), (Wrong, {"kept, extend", "kept, decode"})):
        monkeypatch.setattr(gpu_cases, "attention_of", lambda _, *layer, made=kernels: made(*layer))
        answer = answer_of("check", name, cpu)
        assert answer["passed"] == (not wrong)
        assert {part.removesuffix(", lse") for part in answer["wrong"]} - {"received"} == wrong


def test_samples_are_timed_in_the_order_of_value_and_every_round_has_all():
    from benchmarks.gpu_headline import COPY, HEADLINE_ROUNDS, Sample, samples
    from benchmarks.gpu_targets import HEADLINE, MAIN

    made = samples("headline", ["sdpa, group as queries"], with_cuda=True)
    assert {sample.sizes for sample in made} == {MAIN}
    expected = {COPY, "sdpa, group as queries", *HEADLINE} | {f"{name}, cuda" for name in HEADLINE if name != "none"}
    for number in range(HEADLINE_ROUNDS):
        variants = [sample.variant for sample in made if sample.round == number]
        assert set(variants) == expected and len(variants) == len(expected)
    others = samples("others", [], with_cuda=False)
    assert all(Sample.of(str(sample)) == sample for sample in [*made, *others])
    assert {"append, no tile full", "decode, kept pages, ragged"} <= {sample.what for sample in others}


def test_rows_are_medians_and_ratios_are_taken_within_a_round():
    from benchmarks.gpu_headline import COPY, Results, Sample
    from benchmarks.gpu_targets import MAIN, headline_lines, targets

    results = Results(None, frozenset({"slow", "fast"}))

    def found(number: int, variant: str, **answer: Any) -> None:
        results.found(str(Sample(number, "decode", variant, MAIN)), answer)

    for number, (slow, fast, mine) in enumerate([(90, 60, 10), (45, 50, 10), (400, 200, 40)]):
        found(number, COPY, us=100, moved=4e8)
        found(number, "slow", us=slow, moved=1)
        found(number, "fast", us=fast, moved=1)
        found(number, "kivi-2bit", us=mine, moved=3e7)
    found(0, "int8", error="crashed: ended by SIGSEGV")
    row = next(row for row in results.rows() if row.variant == "kivi-2bit")
    assert (row.time_us, row.low_us, row.high_us) == (10, 10, 40)
    assert (row.speedup, row.low_speedup, row.high_speedup) == (5.0, 4.5, 6.0), "60/10, 45/10, 200/40"
    assert row.copy_share == pytest.approx((3e7 / 10e-6) / (4e8 / 100e-6))
    assert [target.met for target in targets(results.rows()) if target.measured is not None] == [True, True]
    line = headline_lines(results.rows())[0]
    assert "10.0 us (10.0 .. 40.0), 75%" in line and "5.00x (4.50 .. 6.00) the fastest" in line and "Triton" in line
    assert results.content()["left_out"] == ["decode|int8|(32768, 16, 128, 4): crashed: ended by SIGSEGV"]


# The script


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    for name in ("PYTHONPATH", "TRITON_CACHE_DIR", "PYTHONUNBUFFERED"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    import gpu_run

    return gpu_run


def machine_of(script: Any, dry: bool = False, missing: tuple[str, ...] = (), capability: tuple[int, int] = (9, 0)):
    device = {"name": "A GPU 9", "capability": list(capability)}
    return script.Machine({"device": device, "missing": dict.fromkeys(missing, "x"), "cores": 16}, dry)


def test_the_plan_is_in_the_order_of_value_and_fits_into_nine_minutes(script: Any):
    machine = machine_of(script, missing=("vllm",))
    groups = script.Plan(machine).groups()
    names = [[step.name for step in group] for group in groups]
    expected = [["build", "warm-up"], ["check"], ["time"], ["serve"], ["graph"], ["sanitize"], ["sizes"]]
    assert names == expected and machine.name == "a-gpu-9"
    can = [group for group in groups if not group[0].cannot]
    assert sum(max(step.times.estimate_s for step in group) for group in can) < 400
    assert (
        groups[3][0].cannot == "no vllm" and "90a" in groups[0][0].command and "--dry-run" not in groups[1][0].command
    )


@pytest.mark.parametrize(("capability", "target"), [((8, 0), "80"), ((8, 9), "89"), ((9, 0), "90a"), ((10, 0), "100")])
def test_the_gpus_own_architecture_is_built_for(script: Any, capability: tuple[int, int], target: str):
    assert machine_of(script, capability=capability).target == target


def test_a_machine_without_a_gpu_is_told_so(script: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(
        script, "look", lambda dry: {"problem": "torch 2 sees no CUDA device; `--dry-run` runs without"}
    )
    assert script.main([]) == 2
    assert capsys.readouterr().err == "gpu-run: error: torch 2 sees no CUDA device; `--dry-run` runs without\n"


def test_a_look_that_hangs_is_ended(script: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(script, "LOOK_S", 0.05)
    assert "did not find the GPU within" in script.look(False)["problem"]


def test_kernels_whose_check_failed_are_named_beside_their_times(script: Any, tmp_path: Path, capsys: Any):
    journal = Journal(tmp_path / "x.json", SUBJECT)
    cases = {"kivi-2bit/cuda/64/float16/8": {"passed": False}, "kivi-2bit/triton/64/float16/8": {"passed": True}}
    for group in (groups := script.Plan(machine_of(script)).groups()):
        for step_ in group:
            journal.records[step_.name] = script.Record("passed", result={"cases": cases, "rows": []})
    script.conclude(journal)
    script.print_summary(journal, groups, dry=False)
    out = capsys.readouterr().out
    assert journal.more["distrusted"] == ["kivi-2bit cuda"] and "DO NOT TRUST kivi-2bit cuda" in out
    assert "check: passed; 1 of 2 cases passed" in out and out.count("not measured") == 4 + len(journal.more["targets"])


def test_a_library_is_kept_only_where_it_is_of_these_sources_and_targets(script: Any, tmp_path: Path):
    import build_cuda

    source, library = tmp_path / "stamp.c", tmp_path / "_cuda.so"
    assert build_cuda.unfit(library, ["90a"]) == "there is none"
    for number, (stamp, target, reason) in enumerate(
        [
            (build_cuda.sources_digest() + " 80 90a", "90a", None),
            (build_cuda.sources_digest() + " 80", "90a", "it was not built for sm_90a"),
            ("0123 90a", "90a", "it was built from other sources"),
        ]
    ):
        made = library.with_name(f"{number}.so")  # a loaded library stays what it was
        source.write_text(f'const char* kvs_cuda_built(void) {{ return "{stamp}"; }}')
        assert os.system(f"gcc -shared -fPIC -o {made} {source}") == 0
        assert build_cuda.unfit(made, [target]) == reason
    library.write_text("no library")
    assert "cannot be used here" in build_cuda.unfit(library, ["90a"])


BLOCKED = ("vllm", "pydantic", "yaml", "rich")


def test_steps_import_with_torch_and_triton_alone():
    from tests.cases.triton_cases import run_python

    modules = ("checks", "compile", "headline", "baselines", "machine")
    names = ", ".join(f"benchmarks.gpu_{module}" for module in modules)
    code = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED})); import {names}; print('imported')"
    assert run_python("-c", code).strip() == "imported"


@pytest.mark.slow
def test_a_dry_run_walks_through_all_steps_and_a_second_one_has_nothing_left_to_do(tmp_path: Path):
    from tests.cases.triton_cases import run_python

    # No step, and no worker of one, may import what a machine with torch and Triton may lack.
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules.update(dict.fromkeys({BLOCKED}))")
    path = tmp_path / "dry.json"
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path),
    }  # fmt: skip
    asked = (str(ROOT / "scripts" / "gpu_run.py"), "--dry-run", "--budget-s", "900", "--output", str(path))
    out = run_python(*asked, **environment)
    steps = json.loads(path.read_text())["steps"]
    ran = ("warm-up", "check", "time", "sizes")
    assert {name: steps[name]["status"] for name in ran} == dict.fromkeys(ran, "passed")
    assert {steps[name]["reason"] for name in ("serve", "graph", "sanitize")} == {"needs a GPU"}
    assert steps["warm-up"]["result"]["cases"] and "SKIPPED: needs a GPU" in out
    assert "Triton kernels took" in out or "Triton compiled nothing in the warm-up" in out, "it may have, before"
    assert all(case["passed"] for case in steps["check"]["result"]["cases"].values())
    again = run_python(*asked, **environment)
    assert "goes on from" in again and again.count("passed before") >= len(ran)
