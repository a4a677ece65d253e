"""The formats that are used most, on this GPU against the PyTorch reference: small shapes, every kind of launch.

    python -m benchmarks.gpu_checks [--part check|graph|compile] [--cases NAME ...] [--result FILE] [--dry-run]

A case is named FORMAT/KERNELS/HEAD_DIM/DTYPE/GROUP. Each stores prompts, extends them beside decode steps, decodes, is
cut (what is read, scored, re-packed and read again) and attends to ragged kept tables; after each part the arena is
the reference's again, so that errors do not add up. `graph` captures a decode step and replays it at other lengths.
`compile` compiles what the checks launch and runs nothing: no GPU is needed, and the checks find it in Triton's cache.
Needs torch and Triton.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

from benchmarks.gpu_steps import write_result
from benchmarks.gpu_workers import Limits, Pool, serve_cases
from kvserve.attention.base import Answers, NewRows, Stored

if TYPE_CHECKING:
    import torch

    from kvserve.attention.base import Batch
    from kvserve.pages.kept import Kept
    from kvserve.pages.layout import PageLayout

FORMATS = ("kivi-2bit", "boost-2bit", "kivi-4bit", "none", "int8", "dense")
SHAPES = ((128, "bfloat16", 4), (64, "float16", 8), (128, "float16", 1), (64, "bfloat16", 3))
CUDA_FORMATS = FORMATS[:3]
NUM_KV_HEADS, NUM_LAYERS, LAYER = 2, 2, 1
END = 128  # where request 0 is cut
KEPT = (70, 3)  # tokens that its KV heads keep
WRONG = 1e30  # the error of what is no number
POISON = 0xFF  # a NaN in every dtype
# Rounding of queries, weights and outputs on values of order 1; of float32 sums; bytes: rare ties.
LIMITS = {"float16": 4e-3, "bfloat16": 3e-2}
SUMS_LIMIT, READ_LIMIT, BYTES_LIMIT = 1e-4, 1e-5, 1e-3
CHECK_WORKERS = 8  # each holds a CUDA context
LIMITS_S = {"check": 90.0, "graph": 60.0, "compile": 240.0}


class Name(NamedTuple):
    """A case."""

    format: str
    kernels: str
    head_dim: int
    dtype: str
    group: int

    @classmethod
    def of(cls, text: str) -> Name:
        parts = text.split("/")
        return cls(parts[0], parts[1], int(parts[2]), parts[3], int(parts[4]))

    def __str__(self) -> str:
        return "/".join(map(str, self))


def case_names(with_cuda: bool) -> list[Name]:
    """The matrix, in the order of what is used most: shapes first, then formats, CUDA beside Triton."""
    return [
        Name(format_name, kernels, *shape)
        for shape, format_name in itertools.product(SHAPES, FORMATS)
        for kernels in (("triton", "cuda") if with_cuda and format_name in CUDA_FORMATS else ("triton",))
    ]


@dataclass
class Check:
    """One case: the reference on the CPU, kernels on the device, and what differs.

    Attributes:
        arena: the reference's, uint8 [blocks, heads, layers, cell_bytes].
        found: by part, the largest error and its limit.
        ignored: whether nothing runs, so that there is nothing to compare.
    """

    name: Name
    device: torch.device
    ignored: bool = False
    found: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import torch

        from benchmarks.gpu_cases import attention_of, layout_of
        from kvserve.attention.base import LayerSpec
        from kvserve.attention.reference import ReferenceAttention

        self.dtype = getattr(torch, self.name.dtype)
        dense = self.name.format == "none"
        self.layout: PageLayout = layout_of(self.name.format, self.name.head_dim, self.dtype, 0 if dense else 1)
        self.spec = LayerSpec(self.name.group * NUM_KV_HEADS, NUM_KV_HEADS, self.name.head_dim**-0.5)
        self.reference = ReferenceAttention(self.layout, self.spec)
        self.kernels = attention_of(self.name.kernels, self.layout, self.spec)
        self.generator = torch.Generator().manual_seed(crc32(str(self.name).encode()))
        self.arena = torch.zeros(0)
        self.table = torch.zeros(0)

    def run(self) -> dict[str, dict[str, float]]:
        """Every part that the format and the kernels have."""
        self._lay_out([260, 150, 64])
        if self.name.kernels == "triton":
            self._step("prompts", [0, 0, 0], [150, 100, 37])
            self._step("extend beside decode", [150, 100, 37], [1, 50, 1])
        else:
            self._store([0, 0, 0], [151, 150, 38])
        self._step("decode", [151, 150, 38], [1, 1, 1])
        if self.name.kernels == "triton":
            self._scores(152)
        if self.layout.has_pages:
            self._cut(152)
        return self.found

    def graph(self) -> dict[str, dict[str, float]]:
        """A decode step, captured once and replayed at other lengths."""
        import torch

        computed = [190, 140, 70]
        self._lay_out([260, 150, 80])
        self._store([0, 0, 0], computed)
        query, key, value = self._rows(3)
        moved = (query.to(self.device), key.to(self.device), value.to(self.device))
        batch = self._on_device(self._batch(computed, [1, 1, 1]))
        arena, output = self.arena.clone().to(self.device), torch.empty_like(moved[0])
        lengths = batch.seq_lens.clone()
        self.kernels.forward(NewRows(*moved), arena[:, :, LAYER], batch, Answers(output))  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.kernels.forward(NewRows(*moved), arena[:, :, LAYER], batch, Answers(output))
        for shorter in (0, 9, 65):
            batch.seq_lens.copy_(lengths - shorter)
            arena.copy_(self.arena)
            output.fill_(torch.nan)
            graph.replay()
            past = self._batch([count - shorter for count in computed], [1, 1, 1])
            expected = torch.full_like(query, torch.nan)
            self.reference.forward(NewRows(query, key, value), self.arena.clone()[:, :, LAYER], past, Answers(expected))
            self._compare(f"replayed, {shorter} tokens fewer", output, expected, LIMITS[self.name.dtype])
        return self.found

    # -- the parts

    def _lay_out(self, lengths: list[int]) -> None:
        """A poisoned arena, and block tables in random order with room for kept pages."""
        import torch

        counts = [self.layout.blocks_for(length) for length in lengths]
        spare = 2 if self.layout.has_pages else 0
        ids = torch.randperm(sum(counts) + spare + 1, generator=self.generator).int()
        wide = torch.full((len(lengths), max(counts) + 3), 1 << 30, dtype=torch.int32)
        for row, first, count in zip(wide, accumulate([0, *counts]), counts, strict=False):
            row[:count] = ids[first : first + count]
        self.table, self.spare = wide[:, : max(counts)], ids[sum(counts) : sum(counts) + spare].tolist()
        shape = (len(ids), NUM_KV_HEADS, NUM_LAYERS, self.layout.cell_bytes)
        self.arena = torch.full(shape, POISON, dtype=torch.uint8)

    def _step(self, part: str, computed: list[int], new: list[int], kept: Kept | None = None) -> None:
        """One forward of both sides: outputs, lse and the arena's bytes; the arena stays the reference's."""
        import torch

        rows, batch = self._rows(sum(new)), self._batch(computed, new, kept)
        mine = self.arena.clone().to(self.device)
        answers = []
        for attention, arena, device in (
            (self.reference, self.arena, torch.device("cpu")), (self.kernels, mine, self.device),
        ):  # fmt: skip
            output = torch.full_like(rows[0], torch.nan, device=device)
            lse = torch.full(rows[0].shape[:2], torch.nan, device=device)
            moved = batch if attention is self.reference else self._on_device(batch)
            query, key, value = (part.to(device) for part in rows)
            attention.forward(NewRows(query, key, value), arena[:, :, LAYER], moved, Answers(output, lse))
            answers.append((output, lse))
        limit = LIMITS[self.name.dtype]
        self._compare(part, answers[1][0], answers[0][0], limit)
        self._compare(f"{part}, lse", answers[1][1], answers[0][1], limit)
        self._compare_bytes(f"{part}, bytes", mine)

    def _store(self, computed: list[int], new: list[int]) -> None:
        """Tokens stored by the reference alone."""
        key, value = self._rows(sum(new))[1:]
        self.reference.store(key, value, self.arena[:, :, LAYER], self._batch(computed, new))

    def _scores(self, stored: int) -> None:
        """What a window before a cut pays to each token, by both reductions."""
        query, row = self._rows(20)[0], self.table[0].contiguous()
        mine = self.arena.to(self.device)[:, :, LAYER]
        for power, reduce in ((1, "sum"), (2, "max")):
            how: Any = {"power": power, "reduce": reduce}
            there = Stored(mine, row.to(self.device), stored)
            there = Stored(mine, row.to(self.device), stored)
            there = Stored(mine, row.to(self.device), stored)
            expected = self.reference.attention_sums(query, Stored(self.arena[:, :, LAYER], row, stored), **how)
            found = self.kernels.attention_sums(query.to(self.device), there, **how)
            self._compare(f"attention, {reduce}", found, expected, LIMITS[self.name.dtype])

    def _cut(self, stored: int) -> None:
        """Request 0 keeps a few tokens, each KV head its own number; both sides re-pack and attend to them."""
        import torch

        from kvserve.pages.kept import Kept, KeptRows

        kept, state_block = Kept(END, tuple(self.spare)), int(self.table[0, 0])
        cells, row = self.arena[:, :, LAYER], self.table[0].contiguous()
        rows = self.reference.read(Stored(cells, row, stored), 0, END)
        sinks = self.layout.policy.sink_tokens
        chosen = [sinks + torch.randperm(END - sinks, generator=self.generator)[:count].sort().values for count in KEPT]
        assert rows[1] is not None
        keys, values = ([side[head][tokens] for head, tokens in enumerate(chosen)] for side in (rows[0], rows[1]))
        mine = self.arena.clone().to(self.device)
        if self.name.kernels == "triton":
            found = self.kernels.read(Stored(mine[:, :, LAYER], row.to(self.device), stored), 0, END)
            for side, expected in zip(found, rows, strict=True):
                assert side is not None and expected is not None
                self._compare("read", side, expected, READ_LIMIT)
            moved = ([side.to(self.device) for side in sides] for sides in (keys, values))
            place = (mine[:, :, LAYER], state_block, kept, [1, 0][:NUM_KV_HEADS])
            self.kernels.write_kept(*place, KeptRows(*moved))
        self.reference.write_kept(cells, state_block, kept, [1, 0], KeptRows(keys, values))
        if self.name.kernels == "triton":
            self._compare_bytes("cut, bytes", mine)
            self._read_kept(state_block, kept)
            self._step("kept, extend", [stored, 150, 38], [20, 1, 1], kept)
            self._received([stored + 20, 151, 39], kept)
        self._step("kept, decode", [stored, 150, 38], [1, 1, 1], kept)

    def _read_kept(self, state_block: int, kept: Kept) -> None:
        mine = self.arena.to(self.device)[:, :, LAYER]
        expected = self.reference.read_kept(self.arena[:, :, LAYER], state_block, kept)
        found = self.kernels.read_kept(mine, state_block, kept)
        for rows, wanted in ((found.keys, expected.keys), (found.values, expected.values)):
            for head in range(NUM_KV_HEADS):
                self._compare("kept, read", rows[head], wanted[head], READ_LIMIT)

    def _received(self, computed: list[int], kept: Kept) -> None:
        """What tokens receive in a decode step, added up (h2o)."""
        import torch

        from kvserve.attention.base import Received

        rows, batch = self._rows(3), self._batch(computed, [1, 1, 1], kept)
        before, tables = self.arena.clone(), []
        for attention, device in ((self.reference, torch.device("cpu")), (self.kernels, self.device)):
            sums = {r: torch.ones(NUM_KV_HEADS, computed[r] + 4, device=device) for r in (0, 1)}
            arena = before.to(device) if attention is self.kernels else before.clone()
            moved = batch if attention is self.reference else self._on_device(batch)
            output = torch.empty_like(rows[0], device=device)
            query, key, value = (part.to(device) for part in rows)
            attention.forward(NewRows(query, key, value), arena[:, :, LAYER], moved, Answers(output), Received(2, sums))
            tables.append(sums)
        for r, expected in tables[0].items():
            self._compare("received", tables[1][r], expected, LIMITS[self.name.dtype])

    # -- helpers

    def _rows(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value of `count` tokens; keys with a channel's own offset, as real ones have."""
        import torch

        def random(heads: int) -> torch.Tensor:
            return torch.randn(count, heads, self.name.head_dim, generator=self.generator)

        offset = torch.randn(NUM_KV_HEADS, self.name.head_dim, generator=torch.Generator().manual_seed(7))
        key = random(NUM_KV_HEADS) + offset
        query, value = random(self.spec.num_heads), random(NUM_KV_HEADS)
        return query.to(self.dtype), key.to(self.dtype), value.to(self.dtype)

    def _batch(self, computed: list[int], new: list[int], kept: Kept | None = None) -> Batch:
        """A step of the requests; with `kept`, the first of them was cut."""
        import torch

        from kvserve.attention.base import Batch
        from kvserve.pages.kept import NOT_KEPT, KeptTable

        starts = torch.tensor([0, *accumulate(new)], dtype=torch.int32)
        lengths = torch.tensor([c + n for c, n in zip(computed, new, strict=True)], dtype=torch.int32)
        cuts = None if kept is None else KeptTable.of([kept, NOT_KEPT, NOT_KEPT])
        return Batch(starts, lengths, self.table, cuts)

    def _on_device(self, batch: Batch) -> Batch:
        from kvserve.attention.base import Batch
        from kvserve.pages.kept import KeptTable

        kept = None if batch.kept is None else KeptTable(*(table.to(self.device) for table in batch.kept))
        longest = int(batch.query_start_loc.diff().max())
        tables = (batch.query_start_loc, batch.seq_lens, batch.block_table)
        starts, lengths, table = (part.contiguous().to(self.device) for part in tables)  # strides as without a GPU
        return Batch(starts, lengths, table, kept, longest)

    def _compare(self, part: str, found: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
        """The largest error of a part; what is no number is as wrong as can be."""
        if self.ignored:
            return
        difference = (found.float().cpu() - expected.float()).abs().nan_to_num(WRONG, WRONG)
        self._note(part, float(difference.max()) if difference.numel() else 0.0, limit)

    def _compare_bytes(self, part: str, mine: torch.Tensor) -> None:
        """The share of bytes that differ from the reference's arena, other layers' included."""
        if not self.ignored:
            self._note(part, float((mine.cpu() != self.arena).float().mean()), BYTES_LIMIT)

    def _note(self, part: str, error: float, limit: float) -> None:
        earlier = self.found.get(part, {"error": 0.0})["error"]
        self.found[part] = {"error": max(error, earlier), "limit": limit}


def answer_of(part: str, name: Name, device: torch.device) -> dict[str, Any]:
    """What a case's check found, with its verdict."""
    start = time.monotonic()
    check = Check(name, device, ignored=part == "compile")
    found = check.graph() if part == "graph" else check.run()
    wrong = [key for key, value in found.items() if not value["error"] <= value["limit"]]
    return {"passed": not wrong, "wrong": wrong, "parts": found, "seconds": round(time.monotonic() - start, 2)}


def worker(part: str, target: int, dry: bool) -> Callable[[], Callable[[str], dict[str, Any]]]:
    """How a worker starts: what it imports, and what answers a case."""

    def prepare() -> Callable[[str], dict[str, Any]]:
        if dry and part != "compile":
            os.environ["TRITON_INTERPRET"] = "1"
        import torch

        torch.set_num_threads(1)
        on_cpu = dry or part == "compile"
        device = torch.device("cpu" if on_cpu else "cuda")
        if part != "compile":
            return lambda text: answer_of(part, Name.of(text), device)
        from benchmarks.gpu_compile import compile_only, use_target

        compiled = compile_only()
        use_target(target)

        def compile_one(text: str) -> dict[str, Any]:
            before, cpu = len(compiled), cpu_seconds()
            answer = answer_of(part, Name.of(text), device)
            forms = {kernel.hash for kernel in compiled[before:]}
            return answer | {"kernels": len(forms), "cpu_seconds": round(cpu_seconds() - cpu, 1)}

        return compile_one

    return prepare


def cpu_seconds() -> float:
    """Of this process and of the assemblers that it started."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 where a case failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--part", choices=tuple(LIMITS_S), default="check")
    parser.add_argument("--cases", nargs="+", help="default: the whole matrix")
    parser.add_argument("--target", type=int, default=90, help="compute capability to compile for")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: by the cores)")
    parser.add_argument("--result", type=Path, help="JSON file, written after each case")
    parser.add_argument("--dry-run", action="store_true", help="two cases in Triton's interpreter, without a GPU")
    parser.add_argument("--in-process", action="store_true", help="no workers: for a debugger or a sanitizer")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    prepare = worker(options.part, options.target, options.dry_run)
    if options.worker:
        return serve_cases(prepare)
    cases = options.cases or chosen(options.part, options.dry_run)
    if options.in_process:
        run = prepare()
        answers = {case: run(case) for case in cases}
        print("\n".join(line_of(case, answer) for case, answer in answers.items()))
        return int(not all(answer["passed"] for answer in answers.values()))
    return run_all(options, cases)


def chosen(part: str, dry: bool) -> list[str]:
    """The cases of a part where none are named."""
    if dry and part == "compile":
        return ["kivi-2bit/triton/128/bfloat16/4"]
    if dry:
        return ["kivi-2bit/triton/64/float16/2", "none/triton/64/float16/2"]
    from benchmarks.gpu_cases import CUDA_LIBRARY

    names = case_names(with_cuda=part != "compile" and CUDA_LIBRARY.exists())
    if part == "graph":
        names = [name for name in names if (name.head_dim, name.dtype, name.group) == SHAPES[0]]
    return [str(name) for name in names]


def run_all(options: argparse.Namespace, cases: Sequence[str]) -> int:
    """All cases in workers; writes and prints what each found."""
    answers: dict[str, dict[str, Any]] = {}
    start, cached = time.monotonic(), cache_entries()

    def found(case: str, answer: dict[str, Any]) -> None:
        answers[case] = answer
        spent = {"seconds": round(time.monotonic() - start, 1), "new_cache_entries": cache_entries() - cached}
        write_result(options.result, {"cases": answers} | spent)
        print(line_of(case, answer), flush=True)

    cores = len(os.sched_getaffinity(0))
    most = cores if options.part == "compile" else min(cores, CHECK_WORKERS)
    command = [sys.executable, "-m", "benchmarks.gpu_checks", "--worker", "--part", options.part]
    command += ["--target", str(options.target), *(["--dry-run"] if options.dry_run else [])]
    limit_s = LIMITS_S[options.part] * (3 if options.dry_run else 1)
    Pool(command, Limits(options.workers or most, limit_s), found).run(cases)
    failed = [case for case, answer in answers.items() if not answer.get("passed")]
    compiled = f"{cache_entries() - cached} entries new in Triton's cache"
    print(f"{len(cases) - len(failed)} of {len(cases)} passed in {time.monotonic() - start:.0f} s; {compiled}")
    return int(bool(failed))


def cache_entries() -> int:
    """What Triton has compiled into TRITON_CACHE_DIR; 0 where that is not set."""
    folder = os.environ.get("TRITON_CACHE_DIR")
    return len(os.listdir(folder)) if folder and os.path.isdir(folder) else 0


def line_of(case: str, answer: dict[str, Any]) -> str:
    """One line about a case: its worst part, by error over limit."""
    if "error" in answer:
        return f"{case}: {answer['error']}"
    parts = answer["parts"]
    if not parts:
        return f"{case}: {answer['kernels']} kernels, {answer['cpu_seconds']:.1f} CPU-s, {answer['seconds']:.1f} s"
    name, worst = max(parts.items(), key=lambda item: item[1]["error"] / item[1]["limit"])
    verdict = "passed" if answer["passed"] else f"FAILED in {', '.join(answer['wrong'])}"
    return f"{case}: {verdict}; largest of {worst['limit']:g}: {worst['error']:.2g} ({name}), {answer['seconds']:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
