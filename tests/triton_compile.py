"""Compiles every Triton kernel for a GPU that need not be there; prints the shared memory of each kernel.

    python tests/triton_compile.py 90 boosted:128:4:float16 ...     (architecture, then family:head_dim:group:dtype)

The launchers run as they are, on CPU tensors, under a driver that only names a target: a launch compiles and does not
run. It must be its own process, since Triton decides on import whether it interprets.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
import triton
from attention_cases import build_case, make_policy
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from kvserve.attention.triton import TritonAttention
from kvserve.kernels import geometry
from kvserve.pages.kept import NOT_KEPT, Header, Kept, KeptTable, arena_of, write_header

SHARED_BYTES = {80: 166912, 89: 101376, 90: 232448, 100: 232448}  # what one program may have


def use_target(architecture: int) -> dict[str, Any]:
    """Let every launch compile for `architecture`; returns where the compiled kernels are collected, by name."""
    compiled: dict[str, Any] = {}
    properties = {"max_shared_mem": SHARED_BYTES[architecture]}
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", architecture, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            utils=SimpleNamespace(get_device_properties=lambda device: properties),
        )
    )
    launch = JITFunction.run

    def compile_only(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled[self.fn.__name__] = launch(self, *arguments, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only
    geometry.interpreted = lambda: True  # CPU tensors are good enough
    return compiled


def launch_all(family: str, head_dim: int, group: int, dtype: torch.dtype) -> None:
    """Every kernel of one layer, with and without evicted requests."""
    case = build_case(make_policy(family), computed=[3, 0], new_tokens=[1, 80], head_dim=head_dim, group=group,
                      model_dtype=dtype)  # fmt: skip
    attention = TritonAttention(case.layout, case.spec)
    case.run(attention)
    row = torch.arange(9, dtype=torch.int32)
    attention.attention_sums(case.query[:9], case.cells, row, 80, NOT_KEPT, 2)
    if family == "dense":
        return
    layout = type(case.layout).build(case.layout.policy, head_dim, 64, dtype, state_blocks=1)
    attention = TritonAttention(layout, case.spec)
    kept, cells = Kept(64, (4,)), torch.zeros_like(case.cells)
    case.batch.kept = KeptTable.of([kept, kept])
    case.run(attention)
    attention.read(cells, row, 0, 100)
    rows = [torch.zeros(3, head_dim)] * 2
    attention.write_kept(cells, 0, kept, [0, 1], rows, rows)
    for head in range(2):
        write_header(arena_of(cells, layout), 0, head, Header(64, head, 1, 3))
    attention.read_kept(cells, 0, kept)
    attention.attention_sums(case.query[:9], cells, row, 80, kept, 2)


def main(architecture: int, cases: list[str]) -> None:
    compiled = use_target(architecture)
    for case in cases:
        family, head_dim, group, dtype = case.split(":")
        launch_all(family, int(head_dim), int(group), getattr(torch, dtype))
        for name, kernel in compiled.items():
            shared = kernel.metadata.shared
            assert kernel.asm["cubin"] and shared <= SHARED_BYTES[architecture], (name, shared)
            print(f"triton {triton.__version__} sm_{architecture} {case} {name}: {shared} bytes of shared memory")
        compiled.clear()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
