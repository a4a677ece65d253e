"""`make bench-gpu`: checks the GPU kernels on this GPU, times them, prints one table and writes one JSON file.

    python -m kvserve.bench.gpu [--output FILE] [--time-limit-s 480] [--dry-run]

Needs torch and Triton, nothing else; the CUDA kernels take part where `make cuda` has built them. Every timing is the
median of CUDA-graph replays with a cold L2 cache (compaction: of plain calls that read, choose and write). The share of
the copy bandwidth is the bytes that attention must read, over time, over the bandwidth that a large device copy reaches
in the same run (bytes read plus bytes written). `--dry-run` runs tiny sizes in Triton's interpreter: it shows that the
script works, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
ERROR_LIMIT = 3e-2  # bfloat16 weights and outputs, on values of order 1
DIFFERING_BYTES_LIMIT = 1e-3  # rare ties of rotated values
CHECK_PROCESSES = 8  # each holds a CUDA context
MEMORY_SHARE = 0.4  # of free device memory, for the largest K and V of a workload


@dataclass
class Row:
    """One line of the table; times in microseconds, None where there is no such number."""

    what: str
    variant: str
    context: int
    batch: int
    head_dim: int
    group: int
    time_us: float
    moved_bytes: int | None = None
    copy_share: float | None = None
    speedup: float | None = None  # over the fastest dense attention of torch


@dataclass
class Run:
    """Settings and results of one run."""

    device: torch.device
    dry: bool
    deadline: float
    output: Path | None
    checks: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    copy_bytes_per_s: float = 0.0

    def time_us(self, launch: Callable[[], Any], graph: bool = True) -> float:
        """Median time of a launch."""
        if self.dry:
            start = time.perf_counter()
            launch()
            return (time.perf_counter() - start) * 1e6
        from triton.testing import do_bench

        launch()
        torch.cuda.synchronize()
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                launch()
            launch = captured.replay
        return float(do_bench(launch, warmup=20, rep=100, return_mode="median")) * 1e3

    def add(
        self, what: str, variant: str, work: Any, time_us: float, moved: int | None, dense_us: float | None
    ) -> None:
        share = None if moved is None else moved / (time_us * 1e-6) / self.copy_bytes_per_s
        speedup = None if dense_us is None else dense_us / time_us
        sizes = (work.context, work.batch, work.head_dim, work.group)
        self.rows.append(Row(what, variant, *sizes, time_us, moved, share, speedup))

    def free_bytes(self) -> int:
        """Device memory that is left once torch gives back what it only caches."""
        if self.dry:
            return 1 << 40
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])

    def save(self) -> None:
        """Write what there is so far: a run that is cut off leaves a file."""
        if self.output is not None:
            write_json(self.output, self)

    def has_room(self, work: Any) -> bool:
        """Whether a workload may still start; notes it where not."""
        if time.monotonic() > self.deadline:
            self.left_out.append(f"{work}: the time limit was reached")
        elif work.dense_bytes > MEMORY_SHARE * self.free_bytes():
            self.left_out.append(f"{work}: {work.dense_bytes / 2**30:.0f} GiB of K and V do not fit")
        else:
            return True
        return False


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns 0, or 1 where a kernel disagrees with the reference."""
    parser = argparse.ArgumentParser(prog="kvserve.bench.gpu", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/gpu-<device>.json)")
    parser.add_argument("--time-limit-s", type=float, default=480, help="start no workload after this many seconds")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in Triton's interpreter, without a GPU")
    options = parser.parse_args(arguments)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print("kvserve.bench.gpu: error: no CUDA device; `--dry-run` runs without one", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.dry_run else "cuda")
    name = "dry-run" if options.dry_run else torch.cuda.get_device_name().lower().replace(" ", "-")
    output = options.output or (None if options.dry_run else RESULTS / f"gpu-{name}.json")
    run = Run(device, options.dry_run, time.monotonic() + options.time_limit_s, output)
    run.checks = run_checks(run)
    if failed := [check for check in run.checks if not check["passed"]]:
        print("\n".join(f"FAILED {check}" for check in failed), file=sys.stderr)
        return 1
    print(f"{len(run.checks)} checks against the reference passed", flush=True)
    run.copy_bytes_per_s = copy_bandwidth(run)
    first, *cross = workloads(run)
    time_decode(run, first)
    time_launch_parameters(run, first)
    time_others(run)
    for work in cross:
        time_decode(run, work)
    print_table(run)
    if output is not None:
        print("wrote", output)
    return 0


def run_checks(run: Run) -> list[dict[str, Any]]:
    """Every format, head_dim and group size against the PyTorch reference, before anything is timed.

    Most of the time goes into compiling, which the processes share through Triton's cache.
    """
    from kvserve.bench.gpu_cases import FORMATS, kernels_for

    if run.dry:
        return [check_one(name, 64, 2, "triton", True) for name in FORMATS]
    sizes = [*itertools.product((64, 128), (1, 4, 8)), (256, 4)]
    cases = [
        (name, *size, kernels)
        for name, size in itertools.product(FORMATS, sizes)
        for kernels in kernels_for(name, size[0], run.device)
    ]
    workers = min(len(cases), CHECK_PROCESSES, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        results = [pool.submit(check_one, *case, False) for case in cases]
        return [result.result() for result in results]


def check_one(name: str, head_dim: int, group: int, kernels: str, dry: bool) -> dict[str, Any]:
    """One format and shape against the reference."""
    from kvserve.bench import gpu_cases

    work = gpu_cases.Workload(70 if dry else 333, 1, head_dim, group, 1 if dry else 8)
    device, dtype = ("cpu", torch.float16) if dry else ("cuda", torch.bfloat16)
    error, differing = gpu_cases.check(name, work, dtype, torch.device(device), kernels)
    passed = error <= ERROR_LIMIT and differing <= DIFFERING_BYTES_LIMIT
    result = {"format": name, "kernels": kernels, "head_dim": head_dim, "group": group, "error": error}
    return result | {"differing_bytes": differing, "passed": passed}


def copy_bandwidth(run: Run) -> float:
    """Bytes read and written per second by a large copy on the device."""
    size = 1 << 20 if run.dry else 1 << 30
    source = torch.empty(size, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    return 2 * size / (run.time_us(lambda: target.copy_(source)) * 1e-6)


def workloads(run: Run) -> list[Any]:
    """The workload that targets are set for first, then the cross product from small to large."""
    from kvserve.bench.gpu_cases import Workload

    if run.dry:
        return [Workload(130, 2, 64, 2, 1)]
    first = Workload(32768, 16, 128, 4)
    cross = itertools.product((1024, 4096, 32768, 131072), (1, 4, 16, 64), (128, 64), (4, 1, 8))
    return [first, *(work for sizes in cross if (work := Workload(*sizes)) != first)]


def time_decode(run: Run, work: Any) -> None:
    """Decode attention of every format beside torch's dense attention."""
    from kvserve.bench import gpu_cases

    if not run.has_room(work):
        return
    dtype = torch.bfloat16 if not run.dry else torch.float16
    dense = {name: run.time_us(launch) for name, launch in gpu_cases.dense_attention(work, dtype, run.device).items()}
    dense_us = min(dense.values())
    for name, time_us in dense.items():
        run.add("decode", name, work, time_us, work.dense_bytes, dense_us)
    for name in gpu_cases.FORMATS:
        for kernels in gpu_cases.kernels_for(name, work.head_dim, run.device):
            step = gpu_cases.decode_step(name, work, dtype, run.device, kernels=kernels)
            run.add("decode", variant(name, kernels), work, run.time_us(step.attend), step.moved_bytes, dense_us)
            del step
    run.save()


def variant(name: str, kernels: str) -> str:
    """What a row of the table calls a format; Triton's kernels go without saying."""
    return name if kernels == "triton" else f"{name}, {kernels}"


def time_launch_parameters(run: Run, work: Any) -> None:
    """Decode attention of the low-bit formats by launch parameters, to choose the kernels' own from."""
    from kvserve.bench import gpu_cases

    dtype = torch.bfloat16 if not run.dry else torch.float16
    for name in gpu_cases.CUDA_FORMATS:
        for kernels in gpu_cases.kernels_for(name, work.head_dim, run.device):
            step = gpu_cases.decode_step(name, work, dtype, run.device, kernels=kernels)
            for launch in launches(kernels, run.dry):
                time_us = run.time_us(lambda step=step, launch=launch: step.attend_with(**launch))  # type: ignore[misc]
                what = "decode, " + ", ".join(f"{count} {name}" for name, count in launch.items())
                run.add(what, variant(name, kernels), work, time_us, step.moved_bytes, None)
            del step
    run.save()


def launches(kernels: str, dry: bool) -> list[dict[str, int]]:
    """Launch parameters to try."""
    if dry:
        return [{"splits": 1, "warps": 4}]
    if kernels == "triton":
        return [{"splits": s, "warps": w} for s, w in itertools.product((1, 2, 4, 8, 16, 32), (2, 4, 8))]
    tried = itertools.product((1, 2, 4, 8, 16), (2, 4), (2, 3))
    return [{"splits": splits, "warps": warps, "stages": stages} for splits, warps, stages in tried]


def time_others(run: Run) -> None:
    """Storing, compaction, and ragged against uniform tables."""
    from kvserve.bench import gpu_cases

    dtype = torch.bfloat16 if not run.dry else torch.float16
    work = gpu_cases.Workload(*((128, 2, 64, 2, 2) if run.dry else (32768, 16, 128, 4)))
    for name in gpu_cases.FORMATS:
        for what, context in (("append, no tile full", work.context - 1), ("append, every tile full", work.context)):
            sizes = gpu_cases.Workload(context, work.batch, work.head_dim, work.group, work.num_kv_heads)
            step = gpu_cases.decode_step(name, sizes, dtype, run.device)
            run.add(what, name, sizes, run.time_us(step.store), None, None)
            del step
        if name == "none":
            continue
        launch, _ = gpu_cases.compaction(name, work, dtype, run.device)
        run.add("compaction to half, 1 request", name, work, run.time_us(launch, graph=False), None, None)
        sizes = gpu_cases.Workload(work.context // 4, work.batch, work.head_dim, work.group, work.num_kv_heads)
        for kernels, ragged in itertools.product(
            gpu_cases.kernels_for(name, sizes.head_dim, run.device), (False, True)
        ):
            step = gpu_cases.kept_step(name, sizes, dtype, run.device, ragged, kernels)
            what = "decode, kept pages, " + ("ragged" if ragged else "uniform")
            run.add(what, variant(name, kernels), sizes, run.time_us(step.attend), step.moved_bytes, None)
    run.save()


def print_table(run: Run) -> None:
    """The rows, in aligned columns."""
    print(f"copy bandwidth {run.copy_bytes_per_s / 1e9:.0f} GB/s{' (interpreted: no measurement)' if run.dry else ''}")
    head = ("what", "variant", "context", "batch", "head_dim", "group", "us", "MB", "of copy", "vs sdpa")
    print("{:36} {:24} {:>8} {:>6} {:>8} {:>6} {:>10} {:>9} {:>8} {:>8}".format(*head))
    for row in run.rows:
        moved = "" if row.moved_bytes is None else f"{row.moved_bytes / 1e6:.1f}"
        share = "" if row.copy_share is None else f"{row.copy_share:.0%}"
        speedup = "" if row.speedup is None else f"{row.speedup:.2f}x"
        sizes = f"{row.context:>8} {row.batch:>6} {row.head_dim:>8} {row.group:>6}"
        print(f"{row.what:36} {row.variant:24} {sizes} {row.time_us:>10.1f} {moved:>9} {share:>8} {speedup:>8}")
    for line in run.left_out:
        print("left out:", line)


def write_json(path: Path, run: Run) -> None:
    """Everything that was measured, with what it was measured on."""
    import triton

    device = {"name": "interpreter"} if run.dry else {"name": torch.cuda.get_device_name()}
    if not run.dry:
        properties = torch.cuda.get_device_properties(run.device)
        device |= {"multiprocessors": properties.multi_processor_count, "memory_bytes": properties.total_memory}
    content = {
        "schema_version": 1,
        "suite": "gpu",
        "device": device,
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "copy_bytes_per_s": run.copy_bytes_per_s,
        "checks": run.checks,
        "rows": [asdict(row) for row in run.rows],
        "left_out": run.left_out,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
