"""`make gpu-run`: everything that a GPU must be asked, in the order of value, within a few minutes.

    python scripts/gpu_run.py [--budget-s 540] [--output FILE] [--dry-run]

Builds the CUDA kernels for this GPU while Triton's compile, checks both against the reference, times the headline rows,
serves a model where vLLM is installed, replays a decode step as a CUDA graph, runs a check under compute-sanitizer, and
times the rest of what targets are set for. Each step is a process with a time limit of its own; results are written
after each step, and a second call does what did not pass. Needs torch and Triton. `--dry-run` needs no GPU: it walks
through the same steps on tiny shapes, interpreted, and compiles for sm_90a; its times are no measurement.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_steps import (  # noqa: E402
    FAILED,
    PASSED,
    SKIPPED,
    Journal,
    Record,
    Runner,
    Step,
    Times,
    digest_of,
    end_group,
    line_of,
)
from benchmarks.gpu_targets import Row, headline_lines, table_lines, targets  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "build" / "gpu_run"
LIBRARY = ROOT / "kvserve" / "native" / "_cuda.so"
CACHE = WORK / "triton"
LOOK_S = 90.0  # to import torch and ask for the GPU
SOURCES = ("kernels/**/*.py", "kvserve/**/*.py", "csrc/*.h", "csrc/codecs/*.h", "csrc/cuda/*", "benchmarks/gpu*")
SCRIPTS = ("gpu_run.py", "build_cuda.py", "sanitize_gpu.py")
# As compiled for sm_90a with nvcc 13.0 and Triton 3.6, in seconds of one core of a Zen 4 server.
NVCC_S, KERNEL_S, WARM_KERNELS, START_S = 25.0, 0.7, 400, 15.0


@dataclass(frozen=True)
class Machine:
    """What benchmarks.gpu_machine found."""

    found: dict[str, Any]
    dry: bool

    @property
    def name(self) -> str:
        return str(self.found["device"]["name"]).lower().replace(" ", "-")

    @property
    def target(self) -> str:
        """The GPU's own architecture, as nvcc calls it; a dry run compiles for an H100."""
        major, minor = self.found["device"].get("capability", (9, 0))
        return f"{major}{minor}a" if (major, minor) == (9, 0) else f"{major}{minor}"

    def lacks(self, *names: str) -> str | None:
        """Why what needs these cannot run; None: it can."""
        missing = [name for name in names if name in self.found["missing"]]
        return f"no {', no '.join(missing)}" if missing else None


@dataclass
class Plan:
    """The steps for a machine."""

    machine: Machine
    dry: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dry = ["--dry-run"] if self.machine.dry else []

    def groups(self) -> list[list[Step]]:
        """In the order of value; steps of a group run at the same time."""
        on_gpu = "needs a GPU" if self.machine.dry else None
        graph = self._module(
            "graph", "a decode step as a CUDA graph", "gpu_checks", Times(60, 15, 20), "--part", "graph"
        )
        groups = [
            [self._build(), self._warm_up()],
            [self._module("check", "kernels against the reference", "gpu_checks", Times(120, 30, 45))],
            [self._timing("time", "the headline rows, side by side", "headline", Times(150, 30, 45))],
            [self._serve(on_gpu)],
            [replace(graph, cannot=on_gpu)],
            [self._sanitize(on_gpu)],
            [self._timing("sizes", "the other rows with targets", "others", Times(200, 30, 60))],
        ]
        return [[self._patient(step) for step in group] for group in groups]

    def _patient(self, step: Step) -> Step:
        """The step with more time in a dry run: an interpreter on a busy machine is no GPU."""
        return replace(step, times=step.times._replace(limit_s=3 * step.times.limit_s)) if self.machine.dry else step

    def _build(self) -> Step:
        output = WORK / "_cuda.so" if self.machine.dry else LIBRARY
        command = [sys.executable, str(ROOT / "scripts" / "build_cuda.py"), "--if-needed"]
        command += ["--targets", self.machine.target, "--output", str(output)]
        output.parent.mkdir(parents=True, exist_ok=True)
        cannot = self.machine.lacks("nvcc") if not output.exists() else None
        what = f"the CUDA kernels for sm_{self.machine.target}"
        return Step("build", what, command, Times(120, 20, NVCC_S + 5), cannot, output.exists)

    def _warm_up(self) -> Step:
        cores = self.machine.found["cores"]
        times = Times(150, 20, START_S + WARM_KERNELS * KERNEL_S / cores)
        target = self.machine.target.rstrip("a")
        what = f"Triton's kernels for sm_{target}, on {cores} cores"
        step = self._module("warm-up", what, "gpu_checks", times, "--part", "compile", "--target", target)
        return replace(step, still_there=lambda: CACHE.exists() and any(CACHE.iterdir()))

    def _timing(self, name: str, what: str, rows: str, times: Times) -> Step:
        return self._module(name, what, "gpu_headline", times, "--rows", rows, "--time-limit-s", "{limit_s}")

    def _serve(self, on_gpu: str | None) -> Step:
        command = [sys.executable, "-m", "benchmarks.gpu_serve", "--policies", "kivi-2bit"]
        cannot = on_gpu or self.machine.lacks("vllm", "pydantic", "pyyaml", "rich")
        return Step("serve", "the default model with kivi-2bit", command, Times(240, 90, 180), cannot)

    def _sanitize(self, on_gpu: str | None) -> Step:
        command = [sys.executable, str(ROOT / "scripts" / "sanitize_gpu.py"), "--smallest", "--tools", "memcheck"]
        command += ["--kernels", *(["cuda"] if LIBRARY.exists() or not self.machine.lacks("nvcc") else []), "triton"]
        cannot = on_gpu or self.machine.lacks("compute-sanitizer")
        return Step("sanitize", "a check under compute-sanitizer", command, Times(100, 25, 60), cannot)

    def _module(self, name: str, what: str, module: str, times: Times, *options: str) -> Step:
        command = [sys.executable, "-m", f"benchmarks.{module}", *options, *self.dry]
        return Step(name, what, command, times)


def look(dry: bool) -> dict[str, Any]:
    """What is on this machine, found by a process that may hang."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "machine.json"
        command = [sys.executable, "-m", "benchmarks.gpu_machine", "--result", str(result)]
        child = subprocess.Popen([*command, *(["--dry-run"] if dry else [])], start_new_session=True)
        try:
            child.wait(LOOK_S)
        except subprocess.TimeoutExpired:
            return {"problem": f"torch did not find the GPU within {LOOK_S:.0f} s"}
        finally:
            end_group(child)
        if not result.exists():
            return {"problem": "this machine could not be examined; the messages are above"}
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found


def sources_digest() -> str:
    """Of all that a step runs or compiles."""
    paths = {path for pattern in SOURCES for path in ROOT.glob(pattern)}
    return digest_of((path for path in paths | {ROOT / "scripts" / name for name in SCRIPTS} if path.is_file()), ROOT)


def commit() -> str | None:
    """The checked-out commit, with a plus behind it where files differ; None: no git here."""
    try:
        asked = ["git", "-C", str(ROOT)]
        head = subprocess.run([*asked, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=20)
        changed = subprocess.run([*asked, "status", "--porcelain"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") if head.returncode == 0 else None


def print_plan(machine: Machine, groups: Sequence[Sequence[Step]], budget_s: float) -> None:
    """What is here, what is missing, and what will be done."""
    device = machine.found["device"]
    versions = machine.found["versions"]
    print(f"{device['name']}, driver {device.get('driver') or 'unknown'}, {machine.found['cores']} cores; "
          + ", ".join(f"{name} {number}" for name, number in versions.items()))  # fmt: skip
    for name, words in machine.found["missing"].items():
        print(f"  without {name}: {words}")
    print(f"{'step':10} {'estimate':>8} {'limit':>6}  what (budget {budget_s:.0f} s)")
    for group in groups:
        for step in group:
            beside = "" if step is group[0] else "  (beside the one above)"
            note = f"  SKIPPED: {step.cannot}" if step.cannot else beside
            print(f"{step.name:10} {step.times.estimate_s:6.0f} s {step.times.limit_s:4.0f} s  {step.what}{note}")
    sys.stdout.flush()


def rows_of(journal: Journal) -> list[Row]:
    """The timed rows of all steps."""
    found = [journal.records[name].result for name in ("time", "sizes") if name in journal.records]
    return [Row(**row) for result in found if result for row in result["rows"]]


def distrusted(journal: Journal) -> list[str]:
    """Kernels whose check failed: their times mean nothing."""
    record = journal.records.get("check")
    cases = ((record.result or {}) if record else {}).get("cases", {})
    return sorted({" ".join(case.split("/")[:2]) for case, answer in cases.items() if not answer.get("passed")})


def conclude(journal: Journal) -> None:
    """What follows from all steps together, in the file."""
    rows = rows_of(journal)
    journal.more["headline"] = headline_lines(rows)
    journal.more["targets"] = [target.to_dict() for target in targets(rows)]
    journal.more["distrusted"] = distrusted(journal)


def print_summary(journal: Journal, groups: Sequence[Sequence[Step]], dry: bool) -> None:
    """Rows, targets, headline and steps; the last lines matter most."""
    rows = rows_of(journal)
    print("\n".join(["", *table_lines(rows)]))
    for record in journal.records.values():
        for line in (record.result or {}).get("left_out", []) if isinstance(record.result, dict) else []:
            print("left out:", line)
    print("\n".join(target.line() for target in targets(rows)))
    print("\nsteps")
    for step in (step for group in groups for step in group):
        record = journal.records[step.name]
        print(f"  {line_of(step.name, record)}{checked(record)}")
        for line in record.log if record.status == FAILED else []:
            print(f"    | {line}")
    print("\ndecode attention, 32k tokens, batch 16, head_dim 128, 4 query heads to a KV head"
          + (" (a dry run measures nothing)" if dry else ""))  # fmt: skip
    print("\n".join(f"  {line}" for line in headline_lines(rows)))
    for name in distrusted(journal):
        print(f"  DO NOT TRUST {name}: its check failed")


def checked(record: Record) -> str:
    """How many cases of a step passed, where it has cases."""
    cases = record.result.get("cases") if isinstance(record.result, dict) else None
    if not cases:
        return ""
    passed = sum(bool(answer.get("passed")) for answer in cases.values())
    return f"; {passed} of {len(cases)} cases passed"


def compile_note(journal: Journal) -> str:
    """What compiling took, and so what it will take on 16 cores."""
    record = journal.records["warm-up"]
    cases = ((record.result or {}).get("cases") or {}).values()
    kernels = sum(case.get("kernels", 0) for case in cases)
    cpu = sum(case.get("cpu_seconds", 0.0) for case in cases)
    build = (journal.records["build"].result or {}).get("seconds")
    nvcc = "nvcc did not run" if build is None else f"nvcc took {build:.0f} s"
    if not (record.result or {}).get("new_cache_entries"):
        return f"{nvcc}; Triton compiled nothing in the warm-up"
    each = cpu / kernels
    return (
        f"{nvcc}; {kernels} Triton kernels took {each:.2f} CPU-s each, so {WARM_KERNELS} take "
        f"{math.ceil(WARM_KERNELS * each / 16)} s on 16 cores"
    )


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, 1 where a step did not pass, 2 where nothing can run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--budget-s", type=float, default=540, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu-<device>.json")
    parser.add_argument("--dry-run", action="store_true", help="all steps without a GPU, on tiny shapes")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.budget_s
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ["TRITON_CACHE_DIR"] = str(CACHE)
    found = look(options.dry_run)
    if "problem" in found:
        print(f"gpu-run: error: {found['problem']}", file=sys.stderr)
        return 2
    machine = Machine(found, options.dry_run)
    groups = Plan(machine).groups()
    print_plan(machine, groups, options.budget_s)
    usual = (WORK if options.dry_run else RESULTS) / f"gpu-{machine.name}.json"
    subject = {"device": found["device"], "versions": found["versions"], "sources": sources_digest()}
    journal, line = Journal.open(options.output or usual, subject, [usual])
    print(line, flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    Runner(journal, deadline, WORK / "logs", commit(), conclude, lambda words: print(words, flush=True)).run(groups)
    conclude(journal)
    journal.save()
    print_summary(journal, groups, options.dry_run)
    print(f"\n{compile_note(journal)}\nwrote {journal.path}")
    return int(any(record.status not in (PASSED, SKIPPED) for record in journal.records.values()))


if __name__ == "__main__":
    sys.exit(main())
