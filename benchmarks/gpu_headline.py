"""The sizes that targets are set for, timed side by side and again and again: most valuable rows first.

    python -m benchmarks.gpu_headline [--rows others] [--time-limit-s 120] [--result FILE] [--dry-run]

Every round times everything of a size once, in a rotated order: a slow spell of the GPU hits all of it, and ratios are
taken within a round. One process does it all, replaced where a kernel crashes or hangs, which is then left out. Each
sample is the median of CUDA-graph replays with a cold L2 cache. `gpu_targets.py` says what is aimed at.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.gpu_steps import write_result
from benchmarks.gpu_targets import FOUR_BITS, HEADLINE, MAIN, SMALL, TWO_BITS, Row, headline_lines, table_lines
from benchmarks.gpu_targets import targets as targets_of
from benchmarks.gpu_workers import Limits, Pool, serve_cases

LOW_BITS = (*TWO_BITS, *FOUR_BITS)
KEPT_SIZE = (MAIN[0] // 4, *MAIN[1:])
HEADLINE_ROUNDS, OTHER_ROUNDS = 5, 3
CASE_S = 90.0  # one sample, with the compilation and the allocation of its first
COPY = "copy"
DRY_SIZE, DRY_HEADS = (130, 2, 64, 2), 1


class Sample(NamedTuple):
    """One thing to time, once."""

    round: int
    what: str
    variant: str  # a format with ", cuda" behind it, or a baseline
    sizes: tuple[int, int, int, int]  # context, batch, head_dim, group

    @classmethod
    def of(cls, text: str) -> Sample:
        number, what, variant, sizes = text.split("|")
        context, batch, head_dim, group = map(int, sizes.split("x"))
        return cls(int(number), what, variant, (context, batch, head_dim, group))

    def __str__(self) -> str:
        return f"{self.round}|{self.what}|{self.variant}|{'x'.join(map(str, self.sizes))}"

    @property
    def row(self) -> tuple[str, str, tuple[int, int, int, int]]:
        return self.what, self.variant, self.sizes


def samples(rows: str, baselines: Sequence[str], with_cuda: bool, dry: bool = False) -> list[Sample]:
    """All of them, in the order of value; `rows`: headline or others."""

    def variants(names: Sequence[str]) -> list[str]:
        return [v for name in names for v in ([name, f"{name}, cuda"] if with_cuda and name in LOW_BITS else [name])]

    def decode(names: Sequence[str]) -> list[tuple[str, str]]:
        return [("decode", name) for name in names]

    if rows == "headline":
        rounds, size = (2, DRY_SIZE) if dry else (HEADLINE_ROUNDS, MAIN)
        return _rounds(rounds, decode((COPY, *baselines, *variants(HEADLINE))), size)
    appends = ("append, no tile full", "append, every tile full")
    kept = [f"decode, kept pages, {kind}" for kind in ("uniform", "ragged")]
    if dry:
        return _rounds(1, [(what, LOW_BITS[0]) for what in (*appends, *kept)], DRY_SIZE)
    made = _rounds(1, decode([COPY]), MAIN)
    for size in SMALL:
        made += _rounds(OTHER_ROUNDS, decode((*baselines, *variants(LOW_BITS))), size)
    made += _rounds(OTHER_ROUNDS, [(appends[0], name) for name in LOW_BITS], (MAIN[0] - 1, *MAIN[1:]))
    made += _rounds(OTHER_ROUNDS, [(appends[1], name) for name in LOW_BITS], MAIN)
    made += _rounds(OTHER_ROUNDS, [(kind, v) for v in variants((*LOW_BITS, "int8")) for kind in kept], KEPT_SIZE)
    return made + _rounds(OTHER_ROUNDS, decode(["int8"]), MAIN)


def _rounds(count: int, things: Sequence[tuple[str, str]], sizes: tuple[int, int, int, int]) -> list[Sample]:
    """Every round has all things, and begins one further."""
    made = []
    for number in range(count):
        start = number % len(things)
        made += [Sample(number, *thing, sizes) for thing in (*things[start:], *things[:start])]
    return made


@dataclass
class Timer:
    """What a worker keeps between samples: launches that are set up, of one size at a time."""

    run: Any  # gpu.Run
    dtype: Any
    sizes: tuple[Any, ...] = ()
    launches: dict[tuple[str, str], tuple[Callable[[], Any], int | None]] = field(default_factory=dict)

    def time(self, text: str) -> dict[str, Any]:
        """The answer to a sample: microseconds, bytes, and whether a graph was replayed."""
        sample = Sample.of(text)
        kind = (sample.what.split(",")[0], sample.sizes)
        if kind != self.sizes:
            self.launches.clear()
            self.sizes = kind
        key = (sample.what, sample.variant)
        if key not in self.launches:
            self.launches[key] = self._set_up(sample)
        launch, moved = self.launches[key]
        try:
            return {"us": self.run.time_us(launch), "moved": moved, "graph": not self.run.dry}
        except RuntimeError as error:  # what cannot be captured is timed as it is, and says so
            return {
                "us": self.run.time_us(launch, graph=False),
                "moved": moved,
                "graph": False,
                "why": str(error)[:200],
            }

    def _set_up(self, sample: Sample) -> tuple[Callable[[], Any], int | None]:
        """A launch, and the bytes that it must read.

        Raises:
            RuntimeError: it cannot run here, or answers something else; the message says why.
        """
        import torch

        from benchmarks import gpu, gpu_cases
        from benchmarks.gpu_baselines import BASELINES, Rows

        if sample.variant == COPY:
            size = 1 << 20 if self.run.dry else 1 << 30
            source = torch.empty(size, dtype=torch.uint8, device=self.run.device).random_()
            target = torch.empty_like(source)
            return lambda: target.copy_(source), 2 * size
        heads = DRY_HEADS if self.run.dry else 8
        work = gpu_cases.Workload(*sample.sizes, num_kv_heads=heads)
        if not self.run.has_room(work):
            raise RuntimeError(self.run.left_out[-1])
        for baseline in BASELINES:
            if baseline.name == sample.variant:
                if reason := baseline.missing(self.run.device.type == "cpu"):
                    raise RuntimeError(reason)
                if not gpu.is_sound(self.run, baseline, work, self.dtype):
                    raise RuntimeError(self.run.left_out[-1])
                made = baseline(Rows.random(work, self.dtype, self.run.device))
                return made.attend, made.moved_bytes(work)
        name, *cuda = sample.variant.split(", ")
        kernels = "cuda" if cuda else "triton"
        if sample.what.startswith("decode, kept pages"):
            ragged = sample.what.endswith("ragged")
            step = gpu_cases.kept_step(name, work, self.dtype, self.run.device, ragged, kernels)
        else:
            step = gpu_cases.decode_step(name, work, self.dtype, self.run.device, kernels=kernels)
        if sample.what.startswith("append"):
            return step.store, None
        return step.attend, step.moved_bytes


def worker(dry: bool) -> Callable[[], Callable[[str], dict[str, Any]]]:
    """How a worker starts."""

    def prepare() -> Callable[[str], dict[str, Any]]:
        if dry:
            os.environ["TRITON_INTERPRET"] = "1"
        import torch

        from benchmarks import gpu

        torch.manual_seed(0)
        device = torch.device("cpu" if dry else "cuda")
        run = gpu.Run(device, dry, float("inf"), None)
        return Timer(run, torch.float16 if dry else torch.bfloat16).time

    return prepare


@dataclass
class Results:
    """Samples as they come in, and the rows that they make."""

    path: Path | None
    sixteen_bit: frozenset[str]  # baselines with a 16-bit cache
    times: dict[tuple[Any, ...], dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    moved: dict[tuple[Any, ...], int | None] = field(default_factory=dict)
    left_out: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def found(self, text: str, answer: dict[str, Any]) -> None:
        sample = Sample.of(text)
        if "us" in answer:
            self.times[sample.row][sample.round] = answer["us"]
            self.moved[sample.row] = answer["moved"]
            why = f", without a graph: {answer['why']}" if "why" in answer else ""
            print(f"{text}: {answer['us']:.1f} us{why}", flush=True)
        else:
            self.left_out[sample.row] = answer["error"]
            print(f"{text}: left out: {answer['error']}", flush=True)
        write_result(self.path, self.content())

    def copy_bytes_per_s(self) -> float | None:
        copies = [(key, times) for key, times in self.times.items() if key[1] == COPY]
        if not copies:
            return None
        key, times = copies[0]
        return (self.moved[key] or 0) / (median(times.values()) * 1e-6)

    def rows(self) -> list[Row]:
        """The medians of what was timed, in the order in which it came."""
        return [self._row(key) for key in self.times if key[1] != COPY]

    def _row(self, key: tuple[Any, ...]) -> Row:
        what, name, (context, batch, head_dim, group) = key
        times, moved, bandwidth = self.times[key], self.moved[key], self.copy_bytes_per_s()
        time_us = median(times.values())
        share = None if moved is None or not bandwidth else moved / (time_us * 1e-6) / bandwidth
        ratios = [dense / times[number] for number, dense in self._dense(what, key[2]).items() if number in times]
        return Row(
            what, name, context, batch, head_dim, group, time_us, moved, share, median(ratios) if ratios else None,
            low_us=min(times.values()), high_us=max(times.values()),
            low_speedup=min(ratios, default=None), high_speedup=max(ratios, default=None),
        )  # fmt: skip

    def _dense(self, what: str, sizes: tuple[int, ...]) -> dict[int, float]:
        """By round, the fastest decode of other projects with a 16-bit cache."""
        found: dict[int, float] = {}
        if what == "decode":
            for (other, name, size), times in self.times.items():
                if other == what and size == sizes and name in self.sixteen_bit:
                    for number, time_us in times.items():
                        found[number] = min(time_us, found.get(number, time_us))
        return found

    def content(self) -> dict[str, Any]:
        rows = self.rows()
        return {
            "copy_bytes_per_s": self.copy_bytes_per_s(),
            "rows": [asdict(row) for row in rows],
            "samples_us": {"|".join(map(str, key)): list(times.values()) for key, times in self.times.items()},
            "targets": [target.to_dict() for target in targets_of(rows)],
            "left_out": ["|".join(map(str, key)) + f": {why}" for key, why in self.left_out.items()],
        }


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 where one of kvserve's own rows is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", choices=("headline", "others"), default="headline", help="(default: %(default)s)")
    parser.add_argument("--time-limit-s", type=float, default=120, help="start no sample after this many seconds")
    parser.add_argument("--result", type=Path, help="JSON file, written after each sample")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in Triton's interpreter, without a GPU")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        return serve_cases(worker(options.dry_run))
    results = measure(options)
    rows = results.rows()
    print("\n".join([*table_lines(rows), *headline_lines(rows)]))
    return int(any(name.split(", ")[0] in (*HEADLINE, "int8") for _, name, _ in results.left_out))


def measure(options: argparse.Namespace) -> Results:
    """All samples that the time limit allows."""
    from benchmarks.gpu_baselines import BASELINES
    from benchmarks.gpu_cases import CUDA_LIBRARY

    deadline = time.monotonic() + options.time_limit_s
    taken = [b for b in BASELINES if b.runs_on_cpu or not options.dry_run]
    results = Results(options.result, frozenset(b.name for b in taken if b.is_16_bit))

    def dropped(text: str) -> bool:
        row = Sample.of(text).row
        if time.monotonic() > deadline and row not in results.left_out and row not in results.times:
            results.left_out[row] = "the time limit was reached"
        return time.monotonic() > deadline or row in results.left_out

    command = [sys.executable, "-m", "benchmarks.gpu_headline", "--worker"]
    command += ["--dry-run"] if options.dry_run else []
    with_cuda = CUDA_LIBRARY.exists() and not options.dry_run
    cases = samples(options.rows, [b.name for b in taken], with_cuda, options.dry_run)
    Pool(command, Limits(1, CASE_S), results.found, dropped).run([str(sample) for sample in cases])
    write_result(options.result, results.content())
    return results


if __name__ == "__main__":
    sys.exit(main())
