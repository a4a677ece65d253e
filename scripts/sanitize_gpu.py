"""`make sanitize-gpu`: a few GPU tests under NVIDIA's compute-sanitizer.

    python scripts/sanitize_gpu.py [--tools memcheck racecheck initcheck] [--kernels cuda triton] [--smallest]

memcheck finds accesses outside of an allocation, racecheck unordered accesses to shared memory, initcheck reads of
device memory that nothing wrote. Needs a CUDA device and compute-sanitizer (part of the CUDA toolkit:
$COMPUTE_SANITIZER, else the one on PATH or in /usr/local/cuda/bin); the CUDA kernels' tests need `make cuda` before.
Every tensor gets an allocation of its own (PYTORCH_NO_CUDA_MEMORY_CACHING), so that its borders are known. Slow: expect
many times the time of the tests alone. `--smallest` runs one small check of each kind of kernels instead of the tests
(benchmarks/gpu_checks.py), which needs torch and Triton only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck")
TESTS = {
    "cuda": ("tests/kernels/test_cuda.py", "decode_matches or head_dim_128 or attention_equals or shape_of_a_launch"),
    "triton": (
        "tests/kernels/test_triton.py tests/kernels/test_triton_kept.py",
        "decode_matches or beside_decode or read_gives or attention_equals or written_pages or attention_sums",
    ),
}


CHECKS = {kernels: f"kivi-2bit/{kernels}/64/float16/8" for kernels in TESTS}


def find_sanitizer() -> str | None:
    """Path of compute-sanitizer, or None."""
    name = "compute-sanitizer"
    return os.environ.get("COMPUTE_SANITIZER") or shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def command(sanitizer: str, tool: str, kernels: str, smallest: bool) -> list[str]:
    """The sanitizer with the tests of one kind of kernels, or with one check."""
    files, chosen = TESTS[kernels]
    tests = [sys.executable, "-m", "pytest", "-q", "-x", *files.split(), "-m", "not slow", "-k", chosen]
    if smallest:
        tests = [sys.executable, "-m", "benchmarks.gpu_checks", "--in-process", "--cases", CHECKS[kernels]]
    return [sanitizer, "--tool", tool, "--error-exitcode", "1", "--target-processes", "all", *tests]


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, 1 where a tool found something or a test failed, 2 where it cannot run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--kernels", nargs="+", choices=tuple(TESTS), default=tuple(TESTS))
    parser.add_argument("--smallest", action="store_true", help="one small check instead of the tests")
    parser.add_argument("--result", type=Path, help="JSON file: what ran, and what failed")
    options = parser.parse_args(arguments)
    sanitizer = find_sanitizer()
    if sanitizer is None:
        return refuse("no compute-sanitizer; install the CUDA toolkit, or name it in $COMPUTE_SANITIZER")
    if not torch.cuda.is_available():
        return refuse("no CUDA device")
    paths = (str(ROOT), os.environ.get("PYTHONPATH"))
    environment = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }  # fmt: skip
    ran: list[str] = []
    failed: list[str] = []
    for kernels in options.kernels:
        for tool in options.tools:
            print(f"{tool}, {kernels}", flush=True)
            ran.append(f"{tool}, {kernels}")
            asked = command(sanitizer, tool, kernels, options.smallest)
            if subprocess.run(asked, cwd=ROOT, env=environment).returncode:
                failed.append(ran[-1])
            if options.result is not None:
                options.result.write_text(json.dumps({"ran": ran, "failed": failed}), encoding="utf-8")
    print(f"failed: {'; '.join(failed)}" if failed else "nothing found")
    return int(bool(failed))


def refuse(reason: str) -> int:
    print(f"sanitize-gpu: error: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
