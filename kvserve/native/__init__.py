"""Home of the compiled kernel libraries, one per instruction set (built by setup.py, loaded by ctypes)."""

from __future__ import annotations

from pathlib import Path

LIBRARY_DIR = Path(__file__).resolve().parent


def library_path(isa: str) -> Path:
    """Where setup.py puts the library of one instruction set. No Python's name is in it: ctypes alone loads it."""
    return LIBRARY_DIR / f"_{isa}.so"


def has_cpu_kernels() -> bool:
    """Whether this kvserve was built with its CPU kernels; then the portable ones are there on every machine."""
    return library_path("portable").exists()
