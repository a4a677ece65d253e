#!/usr/bin/env python3
"""`make atlas`: every shipped policy in quality, speed and memory, beside its peers; then docs/atlas.md is written.

    python -m benchmarks.atlas [--folder benchmarks/results] [--prefix NAME] [--quick]

The steps run one after another, since a step beside another would disturb its times. Each step's result file is made by
one command, which is printed and stands in the file; a run that was stopped goes on where it was, and finished steps
are skipped. The peers need an environment of their own (--peers-python, or the folder .venv-peers, made when missing).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.eviction_quality import kept_count
from kvserve.default_model import prepare_default_model
from kvserve.evals.command import Evaluation
from kvserve.evals.items import TaskItem, TextItem
from kvserve.evals.options import parse
from kvserve.evals.tasks.registry import TASKS
from kvserve.policies.loading import load_policy
from kvserve.policies.registry import policy_names

ROOT = Path(__file__).resolve().parent.parent
PEERS_PACKAGES = ("kvpress==0.5.5", "optimum-quanto==0.2.7", "ninja", "pydantic", "pyyaml")
RATES = ("2", "4", "8")
ALL_RATES = ("kv-compress", "kv-compress-2bit", "snapkv")  # the other policies that evict run at RATE
RATE = "4"
TIMED = "stock,kivi-4bit,kivi-2bit,boost-2bit,kv-compress@4,kv-compress@8,kv-compress-2bit@4"
PROMPTS = ROOT / "build" / "atlas-prompts.json"
QUICK_POLICIES, QUICK_TIMED = ["none", "kivi-2bit", "kv-compress@4"], "stock,kivi-2bit"
SIZES = ("--tasks", "text,single-needle,multi-key-needle", "--questions", "inside", "--greedy", "0")
FULL = ("--lengths", "1024", "--examples", "6", "--windows", "8", "--context", "1024", "--continuation", "96")
QUICK = ("--lengths", "256", "--examples", "1", "--windows", "2", "--context", "256", "--continuation", "8")


def policies() -> list[str]:
    """All shipped policies; those that evict with their rates."""
    found = []
    for name in policy_names():
        rates = RATES if name in ALL_RATES else (RATE,)
        found += [f"{name}@{rate}" for rate in rates] if load_policy(name).eviction else [name]
    return ["none", *(name for name in found if name != "none")]


@dataclass(frozen=True)
class Step:
    """One result file and the command that makes it."""

    out: Path
    argv: list[str]

    def run(self) -> None:
        """Run what is missing.

        Raises:
            SystemExit: the command failed.
        """
        if self.out.exists() and self._is_finished(json.loads(self.out.read_text())):
            print(f"{self.out.name}: finished already", flush=True)
            return
        print(f"{self.out.name}: {' '.join(self.argv)}", flush=True)
        code = subprocess.call(self.argv, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        if code:
            sys.exit(f"{self.out.name} could not be made (exit code {code}); the same command goes on from here")

    @staticmethod
    def _is_finished(found: dict[str, Any]) -> bool:
        """`kvserve eval` looks for itself what is missing; the others say that they are finished, or have rows."""
        return "greedy" not in found.get("settings", {}) and bool(found.get("finished") or found.get("rows"))


def export_prompts(argv: list[str], path: Path) -> None:
    """The evaluation's own windows and questions, for the peers."""
    evaluation = Evaluation(parse(argv), argv)
    content: dict[str, Any] = {"windows": [], "questions": {}}
    for item in evaluation.items:
        if isinstance(item, TextItem):
            content["windows"] = [asdict(one) | kept_tokens(len(one.context), evaluation) for one in item.windows]
        elif isinstance(item, TaskItem):
            content["questions"][item.name] = [_question(item, one, evaluation) for one in item.questions]
    content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content))


def _question(item: TaskItem, question: Any, evaluation: Evaluation) -> dict[str, Any]:
    answer_tokens = TASKS[item.name].answer_tokens
    prompt = question.request(answer_tokens).prompt
    labels = {"length": question.length, "depth": question.depth, "question": question.place,
              "expected": question.example.answers}  # fmt: skip
    return {"prompt": prompt, "answer_tokens": answer_tokens, "labels": labels} | kept_tokens(len(prompt), evaluation)


def kept_tokens(num_tokens: int, evaluation: Evaluation) -> dict[str, dict[str, int]]:
    """How many tokens of a prompt kvserve keeps at each rate."""
    head_dim = evaluation.shape.head_dim
    return {"kept_tokens": {rate: kept_count(num_tokens, rate, head_dim) for rate in RATES}}


def peers_python(given: str | None) -> str:
    """The interpreter that has kvpress; the environment is made where there is none."""
    if given:
        return given
    folder = ROOT / ".venv-peers"
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making {folder.name} with {', '.join(PEERS_PACKAGES)}", flush=True)
        subprocess.check_call([sys.executable, "-m", "venv", str(folder)])
        torch_version = torch.__version__.partition("+")[0]
        subprocess.check_call([str(python), "-m", "pip", "install", "-q", f"torch=={torch_version}", *PEERS_PACKAGES])
    return str(python)


def steps(folder: Path, prefix: str, python: str, model: str, quick: bool) -> list[Step]:
    """All result files, in order."""
    parts = ("eval", "peers", "step", "peers-step")
    outs = {part: folder / f"{prefix}-atlas-{part}.json" for part in parts}
    timed = QUICK_TIMED if quick else TIMED
    context, sequences, repeats = ("256", "2", "1") if quick else ("2048", "8", "3")
    kvserve = [sys.executable, "-m", "kvserve.cli"]
    peers = [python, "-m", "benchmarks.atlas_peers"]
    commands = {
        "eval": [*kvserve, "eval", *evaluation_argv(quick)],
        "peers": [*peers, "quality", "--model", model, "--prompts", str(PROMPTS)],
        "step": [*kvserve, "bench", "--suite", "step", "--policies", timed, "--context", context,
                 *(["--quick"] if quick else ["--repeats", repeats])],
        "peers-step": [*peers, "speed", "--model", model, "--context", context, "--sequences", sequences,
                       "--repeats", repeats],
    }  # fmt: skip
    return [Step(outs[part], [*commands[part], "--out", str(outs[part])]) for part in parts]


def evaluation_argv(quick: bool) -> list[str]:
    """Options of `kvserve eval`."""
    return ["--policies", ",".join(QUICK_POLICIES if quick else policies()), *SIZES, *(QUICK if quick else FULL)]


def main() -> int:
    """Run all steps and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks" / "results", help="of the result files")
    parser.add_argument("--prefix", default="atlas", help="of their names, for example the machine's")
    parser.add_argument("--peers-python", help="interpreter with kvpress and optimum-quanto; default: .venv-peers")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that the steps run; writes no page")
    options = parser.parse_args()
    model, python = str(prepare_default_model()), peers_python(options.peers_python)
    found = steps(options.folder.resolve(), options.prefix, python, model, options.quick)
    options.folder.mkdir(parents=True, exist_ok=True)
    PROMPTS.parent.mkdir(exist_ok=True)
    export_prompts(evaluation_argv(options.quick), PROMPTS)
    for step in found:
        step.run()
    if options.quick:
        return 0
    report = [sys.executable, "-m", "benchmarks.reports.atlas", "--folder", str(options.folder.resolve())]
    return subprocess.call([*report, "--prefix", options.prefix], cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
