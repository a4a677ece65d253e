#!/usr/bin/env python3
"""Fill the matrix of policies and features: each policy in a process of its own, its cells written as it ends.

python -m benchmarks.matrix [POLICY ...]
"""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.reports.compatibility import RECORD
from kvserve.policies.registry import policy_names

ROOT = Path(__file__).resolve().parents[1]
TESTS = ["tests/engine/test_compatibility.py", "tests/engine/test_compatible_engines.py"]


def run(policy: str) -> bool:
    """Whether all cells of the policy hold."""
    environment = os.environ | {"KVSERVE_MATRIX": str(RECORD), "KVSERVE_MATRIX_POLICIES": policy}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:warnings", *TESTS]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


def main() -> int:
    """Run the policies that the command line names, else all."""
    policies = sys.argv[1:] or policy_names()
    failed = []
    for number, policy in enumerate(policies, 1):
        print(f"{number}/{len(policies)} {policy}", flush=True)
        if not run(policy):
            failed.append(policy)
    print(f"failed: {', '.join(failed)}" if failed else "every cell holds")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
