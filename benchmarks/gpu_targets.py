"""What `benchmarks.gpu` aims at, and whether a run met it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

TILE_TOKENS = 64  # a tile is sealed once in so many steps
TWO_BITS, FOUR_BITS, DENSE = ("kivi-2bit", "boost-2bit"), ("kivi-4bit",), "none"
VLLM_16_BIT = ("vllm, flash attention", "vllm, triton")


@dataclass
class Row:
    """One line of the table; times in microseconds, None where there is no such number.

    Attributes:
        time_us: the median where it was measured again and again; low_us and high_us: its range.
        speedup: over the fastest 16-bit decode; low_speedup and high_speedup: the range of the repeats.
        launches: kernels, copies and fills.
    """

    what: str
    variant: str
    context: int
    batch: int
    head_dim: int
    group: int
    time_us: float
    moved_bytes: int | None = None
    copy_share: float | None = None
    speedup: float | None = None
    launches: int | None = None
    low_us: float | None = None
    high_us: float | None = None
    low_speedup: float | None = None
    high_speedup: float | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.context, self.batch, self.head_dim, self.group


class Target(NamedTuple):
    """One aim; `measured` None: the run has no such number."""

    what: str
    limit: float
    at_least: bool
    measured: float | None

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def line(self) -> str:
        aim = f"{'at least' if self.at_least else 'at most'} {self.limit:g}"
        measured = "-" if self.measured is None else f"{self.measured:.3f}"
        return f"{self.what:76} {aim:>14} {measured:>10}  {VERDICTS[self.met]}"

    def to_dict(self) -> dict[str, Any]:
        return self._asdict() | {"met": self.met}


VERDICTS = {True: "met", False: "MISSED", None: "not measured"}
MAIN = (32768, 16, 128, 4)  # context, batch, head_dim, group
SMALL = ((4096, 1, 128, 4), (4096, 4, 128, 4))


HEADLINE = (*TWO_BITS, *FOUR_BITS, DENSE)
COLUMNS = "{:36} {:24} {:>8} {:>6} {:>8} {:>6} {:>10} {:>17} {:>9} {:>8} {:>9} {:>8}"
HEADINGS = (
    *("what", "variant", "context", "batch", "head_dim", "group"),
    *("us", "range", "MB", "of copy", "vs 16 bit", "launches"),
)


def table_lines(rows: Iterable[Row]) -> list[str]:
    """The rows in aligned columns."""
    lines = [COLUMNS.format(*HEADINGS)]
    for row in rows:
        span = "" if row.low_us is None or row.high_us is None else f"{row.low_us:.1f} .. {row.high_us:.1f}"
        moved = "" if row.moved_bytes is None else f"{row.moved_bytes / 1e6:.1f}"
        share = "" if row.copy_share is None else f"{row.copy_share:.0%}"
        speedup = "" if row.speedup is None else f"{row.speedup:.2f}x"
        numbers = (f"{row.time_us:.1f}", span, moved, share, speedup, "" if row.launches is None else row.launches)
        lines.append(COLUMNS.format(row.what, row.variant, *row.sizes, *numbers))
    return lines


def headline_lines(rows: Sequence[Row]) -> list[str]:
    """One line for each format that is in use, at the main size and with its fastest kernels."""
    own = fastest(rows, "decode", DENSE, MAIN)
    return [f"{name:12} {_headline(fastest(rows, 'decode', name, MAIN), own)}" for name in HEADLINE]


def _headline(row: Row | None, own: Row | None) -> str:
    if row is None:
        return "not measured"
    kernels = "CUDA" if row.variant.endswith(", cuda") else "Triton"
    words = [f"{row.time_us:.1f} us"]
    if row.low_us is not None and row.high_us is not None:
        words[0] += f" ({row.low_us:.1f} .. {row.high_us:.1f})"
    if row.copy_share is not None:
        words.append(f"{row.copy_share:.0%} of the copy bandwidth")
    if row.speedup is not None:
        span = "" if row.low_speedup is None else f" ({row.low_speedup:.2f} .. {row.high_speedup:.2f})"
        words.append(f"{row.speedup:.2f}x{span} the fastest 16-bit decode of others")
    if own is not None and own is not row:
        words.append(f"{own.time_us / row.time_us:.2f}x kvserve's 16-bit pages")
    return ", ".join([*words, f"{kernels} kernels"])


def targets(rows: Sequence[Row]) -> list[Target]:
    """All aims with what `rows` say of them. A format's row is that of its fastest kernels."""
    return [
        *(
            Target(f"{name}, decode at 32k x 16: share of the copy bandwidth", 0.75, True, share(rows, name))
            for name in TWO_BITS
        ),
        *(
            Target(
                f"{name}, decode at 32k x 16: over the fastest 16-bit decode", limit, True, speedup(rows, name, MAIN)
            )
            for names, limit in ((TWO_BITS, 5.0), (FOUR_BITS, 3.2))
            for name in names
        ),
        *(
            Target(
                f"{name}, decode at 4k x {size[1]}: over the fastest 16-bit decode",
                1.0,
                True,
                speedup(rows, name, size),
            )
            for name in (*TWO_BITS, *FOUR_BITS)
            for size in SMALL
        ),
        Target("none, decode at 32k x 16: over vLLM's own attention", 0.97, True, over_vllm(rows)),
        *(
            Target(
                f"{name}: storing, tiles sealed in turn, over attention at 32k x 16", 0.03, False, storing(rows, name)
            )
            for name in (*TWO_BITS, *FOUR_BITS)
        ),
        Target("kept pages, ragged over uniform heads: time per byte, worst format", 1.08, False, ragged(rows)),
    ]


def fastest(rows: Iterable[Row], what: str, name: str, sizes: tuple[int, int, int, int]) -> Row | None:
    """The fastest row of a format, whichever kernels it is of."""
    found = [row for row in rows if row.what == what and row.sizes == sizes and row.variant.split(", ")[0] == name]
    return min(found, key=lambda row: row.time_us, default=None)


def share(rows: Sequence[Row], name: str) -> float | None:
    row = fastest(rows, "decode", name, MAIN)
    return row.copy_share if row else None


def speedup(rows: Sequence[Row], name: str, sizes: tuple[int, int, int, int]) -> float | None:
    row = fastest(rows, "decode", name, sizes)
    return row.speedup if row else None


def over_vllm(rows: Sequence[Row]) -> float | None:
    """The time of vLLM's fastest 16-bit attention over that of 16-bit pages."""
    mine = fastest(rows, "decode", DENSE, MAIN)
    theirs = [row.time_us for row in rows if row.what == "decode" and row.sizes == MAIN and row.variant in VLLM_16_BIT]
    return min(theirs) / mine.time_us if mine and theirs else None


def storing(rows: Sequence[Row], name: str) -> float | None:
    """What a step stores on average, over its attention: of so many steps one seals a tile."""
    attend = fastest(rows, "decode", name, MAIN)
    append = fastest(rows, "append, no tile full", name, (MAIN[0] - 1, *MAIN[1:]))
    seal = fastest(rows, "append, every tile full", name, MAIN)
    if attend is None or append is None or seal is None:
        return None
    return (append.time_us * (TILE_TOKENS - 1) + seal.time_us) / TILE_TOKENS / attend.time_us


def ragged(rows: Sequence[Row]) -> float | None:
    """The largest ratio of a format's times per byte; ragged heads hold the bytes of uniform ones but for rounding."""
    times = {
        (row.what, row.variant): row.time_us / row.moved_bytes
        for row in rows
        if row.what.startswith("decode, kept pages") and row.moved_bytes
    }
    names = {variant for _, variant in times}
    kinds = [(f"decode, kept pages, {kind}", name) for name in names for kind in ("ragged", "uniform")]
    pairs = zip(kinds[::2], kinds[1::2], strict=True)
    return max((times[of] / times[to] for of, to in pairs if of in times and to in times), default=None)
