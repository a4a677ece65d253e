"""Compiles Triton kernels for GPUs that need not be there.

Launchers run as they are, on CPU tensors, under a driver that only names a target: a launch compiles, and what it
compiles is where a launch on that GPU finds it (TRITON_CACHE_DIR), but it does not run.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from kvserve.kernels import geometry

SHARED_BYTES = {80: 166912, 89: 101376, 90: 232448, 100: 232448}  # what one program may have


def compile_only() -> list[Any]:
    """Let every launch compile and not run; returns where the compiled kernels are collected."""
    compiled: list[Any] = []
    launch = JITFunction.run

    def run(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(launch(self, *arguments, grid=grid, warmup=True, **options))

    JITFunction.run = run
    geometry.interpreted = lambda: True  # CPU tensors are good enough
    return compiled


def use_target(architecture: int) -> None:
    """Launches are for `architecture` from now on."""
    properties = {"max_shared_mem": SHARED_BYTES[architecture]}
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", architecture, 32),
            get_current_device=lambda: architecture,  # a kernel's compiled forms are kept by device
            get_current_stream=lambda device: 0,
            utils=SimpleNamespace(get_device_properties=lambda device: properties),
        )
    )
