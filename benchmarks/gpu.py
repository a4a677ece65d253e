"""`make bench-gpu`: checks the GPU kernels on this GPU, times them, prints one table and writes one JSON file.

    python -m benchmarks.gpu [--output FILE] [--time-limit-s 480] [--dry-run]

Needs torch and Triton, nothing else; the CUDA kernels take part where `make cuda` has built them, and other projects'
decode kernels (gpu_baselines.py) where they are installed. Every timing is the median of CUDA-graph replays with a cold
L2 cache (compaction: of plain calls that read, choose and write). The share of the copy bandwidth is the bytes that
attention must read, over time, over the bandwidth that a large device copy reaches in the same run (bytes read plus
bytes written). `--dry-run` runs tiny sizes in Triton's interpreter: it shows that the script works, and its times mean
nothing.
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

from benchmarks.gpu_targets import Row, table_lines, targets

RESULTS = Path(__file__).resolve().parent / "results"
ERROR_LIMIT = 3e-2  # bfloat16 weights and outputs, on values of order 1
DIFFERING_BYTES_LIMIT = 1e-3  # rare ties of rotated values
CHECK_PROCESSES = 8  # each holds a CUDA context
MEMORY_SHARE = 0.3  # of free device memory, for K and V of a workload; baselines hold them three times while they start


@dataclass
class Run:
    """Settings and results of one run."""

    device: torch.device
    dry: bool
    deadline: float
    output: Path | None
    checks: list[dict[str, Any]] = field(default_factory=list)
    baselines: list[Any] = field(default_factory=list)  # classes of gpu_baselines.py
    baseline_checks: dict[tuple[str, int, int], dict[str, Any]] = field(default_factory=dict)
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

    def launches(self, launch: Callable[[], Any]) -> int | None:
        """Kernels, copies and fills of a call that has run before; None where nothing counts them."""
        if self.dry:
            return None
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            launch()
            torch.cuda.synchronize()
        return sum(event.device_type == DeviceType.CUDA for event in profiled.events()) or None

    def add(
        self, what: str, variant: str, work: Any, time_us: float, moved: int | None = None,
        dense_us: float | None = None, launches: int | None = None,
    ) -> None:  # fmt: skip
        share = None if moved is None else moved / (time_us * 1e-6) / self.copy_bytes_per_s
        speedup = None if dense_us is None else dense_us / time_us
        sizes = (work.context, work.batch, work.head_dim, work.group)
        self.rows.append(Row(what, variant, *sizes, time_us, moved, share, speedup, launches))

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
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/gpu-<device>-bench.json)")
    parser.add_argument("--time-limit-s", type=float, default=480, help="start no workload after this many seconds")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in Triton's interpreter, without a GPU")
    options = parser.parse_args(arguments)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print("benchmarks.gpu: error: no CUDA device; `--dry-run` runs without one", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.dry_run else "cuda")
    name = "dry-run" if options.dry_run else torch.cuda.get_device_name().lower().replace(" ", "-")
    output = options.output or (None if options.dry_run else RESULTS / f"gpu-{name}-bench.json")
    run = Run(device, options.dry_run, time.monotonic() + options.time_limit_s, output)
    run.checks = run_checks(run)
    if failed := [check for check in run.checks if not check["passed"]]:
        print("\n".join(f"FAILED {check}" for check in failed), file=sys.stderr)
        return 1
    print(f"{len(run.checks)} checks against the reference passed", flush=True)
    run.copy_bytes_per_s = copy_bandwidth(run)
    from benchmarks.gpu_baselines import usable

    run.baselines, run.left_out = usable(device)
    first, *others = workloads(run)
    time_decode(run, first)
    time_launch_parameters(run, first)
    time_others(run)
    for work in others:
        time_decode(run, work)
    print_table(run)
    run.save()
    if output is not None:
        print("wrote", output)
    return 0


def run_checks(run: Run) -> list[dict[str, Any]]:
    """Every format, head_dim and group size against the PyTorch reference, before anything is timed.

    Most of the time goes into compiling, which the processes share through Triton's cache.
    """
    from benchmarks.gpu_cases import FORMATS, kernels_for

    if run.dry:
        return [check_one(name, 64, 2, "triton", True) for name in FORMATS]
    sizes = [*itertools.product((64, 128), (1, 4, 8)), (96, 4), (256, 4)]
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
    from benchmarks import gpu_cases

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
    """Those that targets are set for first, then the cross product from small to large."""
    from benchmarks.gpu_cases import Workload

    if run.dry:
        return [Workload(130, 2, 64, 2, 1)]
    aimed = [Workload(32768, 16, 128, 4), Workload(4096, 1, 128, 4), Workload(4096, 4, 128, 4)]
    cross = itertools.product((1024, 4096, 32768, 131072), (1, 4, 16, 64, 128), (128, 64), (4, 1, 8))
    return [*aimed, *(work for sizes in cross if (work := Workload(*sizes)) not in aimed)]


def time_decode(run: Run, work: Any) -> None:
    """Decode attention of every format beside that of other projects."""
    from benchmarks import gpu_cases

    if not run.has_room(work):
        return
    dtype = torch.bfloat16 if not run.dry else torch.float16
    dense_us = time_baselines(run, work, dtype)
    for name in gpu_cases.FORMATS:
        for kernels in gpu_cases.kernels_for(name, work.head_dim, run.device):
            step = gpu_cases.decode_step(name, work, dtype, run.device, kernels=kernels)
            run.add("decode", variant(name, kernels), work, run.time_us(step.attend), step.moved_bytes, dense_us)
            del step
    run.save()


def time_baselines(run: Run, work: Any, dtype: torch.dtype) -> float | None:
    """Decode attention of other projects; returns the time of the fastest with a 16-bit cache."""
    from benchmarks.gpu_baselines import Rows

    rows, times = Rows.random(work, dtype, run.device), {}
    for baseline in run.baselines:
        if not is_sound(run, baseline, work, dtype):
            continue
        try:
            made = baseline(rows)
            times[baseline] = run.time_us(made.attend), made.moved_bytes(work)
            del made
        except Exception as error:  # of whatever kind another project fails with
            run.left_out.append(f"{work}: {baseline.name}: {type(error).__name__}: {error}")
    dense_us = min((time_us for baseline, (time_us, _) in times.items() if baseline.is_16_bit), default=None)
    for baseline, (time_us, moved) in times.items():
        run.add("decode", baseline.name, work, time_us, moved, dense_us)
    return dense_us


def is_sound(run: Run, baseline: Any, work: Any, dtype: torch.dtype) -> bool:
    """Whether a baseline's answer is that of float32 attention for this head_dim and group, checked once for each."""
    from benchmarks.gpu_baselines import Rows
    from benchmarks.gpu_cases import Workload

    asked = (baseline.name, work.head_dim, work.group)
    if asked not in run.baseline_checks:
        small = Workload(333, 3, work.head_dim, work.group, work.num_kv_heads)
        rows = Rows.random(small, dtype, run.device)
        try:
            error, failure = baseline(rows).error(rows), ""
        except Exception as failed:  # of whatever kind another project fails with
            error, failure = float("inf"), f": {type(failed).__name__}: {failed}"
        passed = error <= baseline.error_limit
        sizes = {"baseline": baseline.name, "head_dim": work.head_dim, "group": work.group}
        run.baseline_checks[asked] = sizes | {"relative_error": error if not failure else None, "passed": passed}
        if not passed:
            of = f"baseline {baseline.name}, head_dim {work.head_dim}, group {work.group}"
            run.left_out.append(of + (failure or f": its error {error:.3f} is above {baseline.error_limit}"))
    return bool(run.baseline_checks[asked]["passed"])


def variant(name: str, kernels: str) -> str:
    """What a row of the table calls a format; Triton's kernels go without saying."""
    return name if kernels == "triton" else f"{name}, {kernels}"


def time_launch_parameters(run: Run, work: Any) -> None:
    """Decode attention of the low-bit formats by launch parameters, to choose the kernels' own from."""
    from benchmarks import gpu_cases

    dtype = torch.bfloat16 if not run.dry else torch.float16
    for name in gpu_cases.CUDA_FORMATS:
        for kernels in gpu_cases.kernels_for(name, work.head_dim, run.device):
            step = gpu_cases.decode_step(name, work, dtype, run.device, kernels=kernels)
            for launch in launches(kernels, run.dry):
                time_us = run.time_us(lambda step=step, launch=launch: step.attend_with(**launch))  # type: ignore[misc]
                what = "decode, " + ", ".join(f"{count} {name}" for name, count in launch.items())
                run.add(what, variant(name, kernels), work, time_us, step.moved_bytes)
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
    """A layer's whole step, storing, compaction, and ragged against uniform tables."""
    from benchmarks import gpu_cases

    dtype = torch.bfloat16 if not run.dry else torch.float16
    work = gpu_cases.Workload(*((128, 2, 64, 2, 2) if run.dry else (32768, 16, 128, 4)))
    for name in gpu_cases.FORMATS:
        for kernels in gpu_cases.kernels_for(name, work.head_dim, run.device):
            step = gpu_cases.decode_step(name, work, dtype, run.device, kernels=kernels)
            time_us = run.time_us(step.forward)
            run.add(
                "layer, store and attend", variant(name, kernels), work, time_us, launches=run.launches(step.forward)
            )
            del step
        for what, context in (("append, no tile full", work.context - 1), ("append, every tile full", work.context)):
            sizes = gpu_cases.Workload(context, work.batch, work.head_dim, work.group, work.num_kv_heads)
            step = gpu_cases.decode_step(name, sizes, dtype, run.device)
            run.add(what, name, sizes, run.time_us(step.store))
            del step
        if name == "none":
            continue
        step = gpu_cases.decode_step(name, work, dtype, run.device)
        run.add("attention received, added up", name, work, run.time_us(step.receiver(), graph=False))
        del step
        launch, _ = gpu_cases.compaction(name, work, dtype, run.device)
        run.add("compaction to half, 1 request", name, work, run.time_us(launch, graph=False))
        sizes = gpu_cases.Workload(work.context // 4, work.batch, work.head_dim, work.group, work.num_kv_heads)
        for kernels, ragged in itertools.product(
            gpu_cases.kernels_for(name, sizes.head_dim, run.device), (False, True)
        ):
            step = gpu_cases.kept_step(name, sizes, dtype, run.device, ragged, kernels)
            what = "decode, kept pages, " + ("ragged" if ragged else "uniform")
            run.add(what, variant(name, kernels), sizes, run.time_us(step.attend), step.moved_bytes)
    run.save()


def print_table(run: Run) -> None:
    """The rows, in aligned columns, what was left out, and the targets."""
    print(f"copy bandwidth {run.copy_bytes_per_s / 1e9:.0f} GB/s{' (interpreted: no measurement)' if run.dry else ''}")
    print("\n".join(table_lines(run.rows)))
    for line in run.left_out:
        print("left out:", line)
    for target in targets(run.rows):
        print(target.line())


def write_json(path: Path, run: Run) -> None:
    """Everything that was measured, with what it was measured on."""
    import triton

    device = {"name": "interpreter"} if run.dry else {"name": torch.cuda.get_device_name()}
    if not run.dry:
        properties = torch.cuda.get_device_properties(run.device)
        device |= {"multiprocessors": properties.multi_processor_count, "memory_bytes": properties.total_memory}
    content = {
        "schema_version": 2,
        "suite": "gpu",
        "device": device,
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "copy_bytes_per_s": run.copy_bytes_per_s,
        "checks": run.checks,
        "baseline_checks": list(run.baseline_checks.values()),
        "rows": [asdict(row) for row in run.rows],
        "targets": [target.to_dict() for target in targets(run.rows)],
        "left_out": run.left_out,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
