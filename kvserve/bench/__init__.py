"""`kvserve bench`: stock vLLM and kvserve's policies, measured side by side."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Run the benchmark; returns the exit code (0 done, 1 something could not be measured, 2 refused)."""
    from kvserve.bench.command import main as run

    return run(argv)
