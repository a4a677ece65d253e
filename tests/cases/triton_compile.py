"""Compiles Triton kernels for GPUs that need not be there; prints the shared memory of each kernel.

    python tests/cases/triton_compile.py 90:boosted:128:4:float16 ...     (architecture:family:head_dim:group:dtype)
    python tests/cases/triton_compile.py --once 90:boosted:128:4:float16  (each kernel in the form that does most)

A family that ends in "-mass" has pages with log-masses, one in "-logits" capped logits and learned sinks.

The launchers run as they are, on CPU tensors, under a driver that only names a target: a launch compiles and does not
run. It must be its own process, since Triton decides on import whether it interprets.
"""

from __future__ import annotations

import sys

import torch
import triton

from benchmarks.gpu_compile import SHARED_BYTES, compile_only, use_target
from kvserve.attention.base import Answers, NewRows, Received, Stored
from kvserve.attention.triton import TritonAttention
from kvserve.codecs.affine import Affine
from kvserve.pages.kept import Header, Kept, KeptRows, KeptTable, Run, arena_of, write_header
from tests.cases.attention_cases import NUM_LAYERS, Case, build_case, make_policy
from tests.cases.kept_cases import demoting, with_masses

ROW = torch.arange(9, dtype=torch.int32)


def build(family: str, head_dim: int, group: int, dtype: torch.dtype) -> Case:
    """Of a family of make_policy, with what its suffix says, or of int8 with kept tokens in 2 bits (demoting)."""
    has_logits, family = family.endswith("-logits"), family.removesuffix("-logits")
    policy = make_policy("int8" if family == "demoting" else family.removesuffix("-mass"))
    if family == "demoting":
        policy = demoting(policy, Affine(bits=2, group_size=32), Affine(bits=2, group_size=64))
    policy = with_masses(policy) if family.endswith("-mass") else policy
    logits = {"soft_cap": 50.0, "sinks": True} if has_logits else {}
    return build_case(policy, computed=[3, 0], new_tokens=[1, 80], head_dim=head_dim, group=group,
                      model_dtype=dtype, **logits)  # fmt: skip


def launch_plain(case: Case) -> None:
    """The kernels of one layer without evicted requests."""
    attention = TritonAttention(case.layout, case.spec, case.tables)
    case.run(attention)
    attention.attention_sums(case.query[:9], Stored(case.cells, ROW, 80), 2)
    if case.layout.has_pages:
        attention.read(Stored(torch.zeros_like(case.cells), ROW, 100), 0, 100)
        launch_received(attention, case)


def launch_received(attention: TritonAttention, case: Case) -> None:
    received = Received(2, {0: torch.zeros(case.spec.num_kv_heads, 80)})
    attention.forward(
        NewRows(case.query, case.key, case.value), case.cells, case.batch, Answers(case.query.clone()), received
    )


def launch_evicted(case: Case, head_dim: int, dtype: torch.dtype) -> None:
    """Every kernel of one layer, with evicted requests: those that attend do all they do without, and more."""
    layout = type(case.layout).build(case.layout.policy, head_dim, 64, dtype, state_blocks=1, num_layers=NUM_LAYERS)
    attention = TritonAttention(layout, case.spec, case.tables)
    kept, cells = Kept(64, (4, 5)), torch.zeros_like(case.cells)
    case.batch.kept = KeptTable.of([kept, kept])
    case.run(attention)
    attention.read(Stored(cells, ROW, 100), 0, 100)
    rows, masses = [torch.zeros(3, head_dim)] * 2, [torch.zeros(3)] * 2 if attention.geometry.mass else None
    counts = (1, 2) if layout.other_formats else (3,)
    attention.write_kept(cells, 0, kept, [0, 2], KeptRows(rows, rows, masses, [counts] * 2))
    for head in range(2):
        runs = tuple(Run(number, 0, count) for number, count in enumerate(counts))
        write_header(arena_of(cells, layout), 0, head, Header(64, runs))
    attention.read_kept(cells, 0, kept)
    attention.attention_sums(case.query[:9], Stored(cells, ROW, 80, kept), 2)
    launch_received(attention, case)


def main(arguments: list[str]) -> None:
    once, compiled = arguments[0] == "--once", compile_only()
    for name in arguments[once:]:
        number, family, head_dim, group, dtype_name = name.split(":")
        architecture, dtype = int(number), getattr(torch, dtype_name)
        use_target(architecture)
        case = build(family, int(head_dim), int(group), dtype)
        key = case.layout.policy.key
        can_evict = family.removesuffix("-logits") != "dense" and not (key and key.needs_positions)
        if not (once and can_evict):
            launch_plain(case)
        if can_evict:
            launch_evicted(case, int(head_dim), dtype)
        for kernel in compiled:
            about = kernel.metadata
            assert kernel.asm["cubin"] and about.target.arch == architecture, about
            assert about.shared <= SHARED_BYTES[architecture], about
            print(f"triton {triton.__version__} {name} {about.name}: {about.shared} bytes of shared memory")
        compiled.clear()


if __name__ == "__main__":
    main(sys.argv[1:])
