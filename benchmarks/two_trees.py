#!/usr/bin/env python3
"""Attention of one layer by the libraries of two source trees, in turn: what a change of the kernels costs.

    python -m benchmarks.two_trees --other ../before [--policies kivi-2bit int8] --out benchmarks/results/NAME.json

Each tree, this one and the other, has its own process with the same random rows in its arena (8 sequences of 4096
tokens, 4 layers); they take turns, and only one of them computes at a time. A ratio is the other tree's time over this
one's, of two runs that follow each other. Both trees must be built (`python setup.py build_ext --inplace`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from kvserve.measuring.machine import machine
from kvserve.measuring.results import ratios, spread, write_json

ROOT = Path(__file__).resolve().parent.parent
POLICIES = ("kivi-2bit", "boost-2bit", "kivi-4bit", "int8")
SHAPE, NUM_SEQS, CONTEXT, PREFILL, STEPS = (4, 9, 3, 64), 8, 4096, 2048, 15
CHILD = """
import json, sys
from kvserve.bench.operators import OperatorHost
from kvserve.measuring.shape import ModelShape
shape, num_seqs, context, prefill, steps, dtype = json.loads(sys.argv[1])
host = OperatorHost(ModelShape(*shape), dtype, num_seqs, context, 0)
for line in sys.stdin:
    action, policy = line.split()
    if action == "fill":
        found = host.fill(policy)["isa"]
    elif action == "decode":
        found = host.decode(policy, context, steps)
    else:
        found = host.prefill(policy, prefill)
    print(json.dumps(found), flush=True)
"""


class Tree:
    """A process of one source tree."""

    def __init__(self, folder: Path, dtype: str) -> None:
        sizes = json.dumps([SHAPE, NUM_SEQS, CONTEXT, PREFILL, STEPS, dtype])
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, sizes], cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, action: str, policy: str) -> Any:
        """Seconds of "decode" or "prefill"; the instruction set after "fill"."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{action} {policy}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the process of {self.folder} ended; build the tree, or see its message above")
        return json.loads(line)


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--other", type=Path, required=True, help="the source tree to compare with")
    parser.add_argument("--revision", default="", help="what the record calls the other tree, for example its commit")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="result file")
    options = parser.parse_args()
    trees = (Tree(options.other.resolve(), options.dtype), Tree(ROOT, options.dtype))
    record: dict[str, Any] = {
        "schema": 1,
        "command": ["python", "-m", "benchmarks.two_trees", *(Path(word).name for word in sys.argv[1:])],
        "other": options.revision, "machine": machine(), "isa": "", "dtype": options.dtype,
        "sequences": NUM_SEQS, "context": CONTEXT, "prefill": PREFILL, "speed": {}, "seconds": {},
    }  # fmt: skip
    for policy in options.policies:
        record["isa"] = [tree.ask("fill", policy) for tree in trees][1]
        for action in ("decode", "prefill"):
            pairs = []
            for repeat in range(options.repeats):
                order = trees if repeat % 2 else trees[::-1]  # whoever is first has it no better
                found = {id(tree): tree.ask(action, policy) for tree in order}
                pairs.append([found[id(tree)] for tree in trees])
            name = f"{policy} {action}"
            record["seconds"][name] = pairs
            record["speed"][name] = spread(ratios(*zip(*pairs, strict=True)))._asdict()
            print(name, record["speed"][name], flush=True)
            if options.out:
                write_json(options.out, record)
    for tree in trees:
        tree.process.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
