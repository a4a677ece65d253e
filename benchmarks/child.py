"""A measurement in a process of its own: one process can hold engines of one policy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from kvserve.measuring.results import write_json

ROOT = Path(__file__).resolve().parent.parent


def report_record(record: dict[str, Any], out: Path | None) -> None:
    """Print a record, and write it where a file is asked for."""
    print(json.dumps(record, indent=1))
    if out:
        write_json(out, record)


def run_child(module: str, *arguments: str) -> dict[str, Any]:
    """What `python -m MODULE ARGUMENTS` prints last, one line of JSON; its threads are bound to no cores.

    Raises:
        subprocess.CalledProcessError: it failed; what it had to say is on stderr.
    """
    environment = {
        **os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.rstrip().rsplit("\n", 1)[-1])
    return found
