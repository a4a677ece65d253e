#!/usr/bin/env python3
"""docs/atlas.md and its pictures, from the result files of benchmarks/atlas.py.

    python -m benchmarks.reports.atlas [--folder benchmarks/results] [--prefix NAME] [--tables]

The pictures need matplotlib (`pip install kvserve[plot]`); with --tables they are left as they are.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.reports.documents import command_of, fill
from benchmarks.reports.eviction import plot
from kvserve.cli.policies import context_ratio
from kvserve.evals.options import TEXT
from kvserve.evals.report import format_estimate, perplexity_increase
from kvserve.evals.statistics import Estimate, bootstrap, share_interval
from kvserve.pages.layout import PageLayout
from kvserve.policies.loading import load_policy

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "benchmarks" / "results"
PREFIX = "cpu-zen4"
DOCUMENT = ROOT / "docs" / "atlas.md"
QUALITY_PICTURE, SPEED_PICTURE = ROOT / "docs" / "atlas-quality.png", ROOT / "docs" / "atlas-speed.png"
PARTS = ("eval", "peers", "step", "peers-step")
STOCK, PEER_DENSE = "stock", "hf-dense"
FAMILIES = {
    "kvserve": ("C0", "o"),
    "kvserve, evicting": ("C1", "s"),
    "kvpress": ("C2", "^"),
    "transformers": ("C3", "D"),
}


@dataclass(frozen=True)
class Point:
    """One policy or peer.

    Attributes:
        label: its name, with the rate where it has one.
        family: whose it is, of FAMILIES.
        memory: how many times fewer bytes it holds behind a prompt than a 16-bit cache.
        perplexity: over the dense cache of the same program, %, on the same tokens.
        kl: mean divergence from it, nats.
        agreement: tokens whose most likely successor is the same, %.
        score: expected answers that were given, %.
    """

    label: str
    family: str
    memory: float
    perplexity: Estimate
    kl: Estimate
    agreement: Estimate
    score: Estimate


@dataclass(frozen=True)
class Timed:
    """Speed of one decode step: how many times faster than the dense cache of the same program, repeat by repeat."""

    label: str
    family: str
    memory: float
    speed: Estimate


class Atlas:
    """All result files of one run.

    Raises:
        SystemExit: one is missing.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        try:
            self.records = {
                part: json.loads((folder / f"{prefix}-atlas-{part}.json").read_text(encoding="utf-8")) for part in PARTS
            }
        except FileNotFoundError as error:
            raise SystemExit(f"{error.filename} is missing: run `make atlas`") from None
        self.shape, self.contexts = self.records["peers"]["model"], self.records["peers"]["context_tokens"]

    def points(self) -> list[Point]:
        """Policies, then peers."""
        ours, theirs = self.records["eval"], self.records["peers"]
        found = [
            point(label, family_of(label), statistics.mean(self.memory(label, n) for n in self.contexts), result)
            for label, result in ours["raw"].items()
        ]
        return found + [
            point(label, peer_family(label), 1 / statistics.mean(theirs["held"][label]), result)
            for label, result in theirs["raw"].items()
        ]

    def timed(self) -> list[Timed]:
        """Those whose steps were timed."""
        step, peers = self.records["step"]["raw"]["step"], self.records["peers-step"]
        times = {name: [statistics.mean(one) for one in found] for name, found in step["step_seconds"].items()}
        found = [
            Timed(name, family_of(name), self.memory(name, step["context_tokens"]), speed(times[STOCK], times[name]))
            for name in times
            if name != STOCK
        ]
        seconds = peers["step_seconds"]
        return found + [
            Timed(name, peer_family(name), 1 / peers["held"][name], speed(seconds[PEER_DENSE], seconds[name]))
            for name in seconds
            if name != PEER_DENSE
        ]

    def memory(self, label: str, num_tokens: int) -> float:
        """Of a shipped policy in a 16-bit model, tail, sinks and partly filled blocks counted."""
        policy, group = load_policy(label), self.shape["heads"] // self.shape["kv_heads"]
        layout = PageLayout.build(
            policy, self.shape["head_dim"], policy.tile_tokens, torch.float16, query_group=group,
            num_layers=self.shape["layers"],
        )  # fmt: skip
        return context_ratio(layout, num_tokens)


def family_of(label: str) -> str:
    """Of a policy."""
    return "kvserve, evicting" if load_policy(label).eviction else "kvserve"


def peer_family(label: str) -> str:
    """Of a peer."""
    return "transformers" if label.startswith("hf-") else "kvpress"


def point(label: str, family: str, memory: float, result: dict[str, Any]) -> Point:
    """The figures of one raw result of `kvserve eval`."""

    def values(name: str) -> np.ndarray:
        return np.array([window[name] for window in result[TEXT]["windows"]])

    scores = np.array([100 * one["score"] for task, found in result.items() if task != TEXT for one in found])
    return Point(
        label, family, memory, perplexity_increase(result[TEXT]), bootstrap(values("kl")),
        bootstrap(100 * values("agrees")), share_interval(scores, 0, 100),
    )  # fmt: skip


def speed(dense: Sequence[float], found: Sequence[float]) -> Estimate:
    """Median and range of the repeats."""
    ratios = [a / b for a, b in zip(dense, found, strict=True)]
    return Estimate(statistics.median(ratios), min(ratios), max(ratios))


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both memory and perplexity, by their values, from the largest cache down."""
    found: list[Point] = []
    for one in sorted(points, key=lambda one: (-one.memory, one.perplexity.value)):
        if not found or one.perplexity.value < found[-1].perplexity.value:
            found.append(one)
    return found[::-1]


# -- the document ---------------------------------------------------------------------------------------------------


def quality_table(points: Sequence[Point]) -> str:
    """By memory; the front is bold."""
    best = {one.label + one.family for one in front(points)}
    lines = [
        "| | whose | fewer bytes | perplexity, % | KL, nats | same token, % | answers, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in sorted(points, key=lambda one: (one.memory, one.perplexity.value)):
        name = f"**`{one.label}`**" if one.label + one.family in best else f"`{one.label}`"
        cells = (name, one.family, f"{one.memory:.2f}x", form(one.perplexity, "+.1f"), form(one.kl, ".3f"),
                 form(one.agreement, ".1f"), form(one.score, ".0f"))  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def speed_table(timed: Sequence[Timed]) -> str:
    """By memory."""
    lines = ["| | whose | fewer bytes | decode step, times as fast as dense |", "|---|---|---|---|"]
    lines += [
        f"| `{one.label}` | {one.family} | {one.memory:.2f}x | {form(one.speed, '.2f')} |"
        for one in sorted(timed, key=lambda one: one.memory)
    ]
    return "\n".join(lines)


def commands(atlas: Atlas) -> str:
    """How each result file was made."""
    lines = ["| result file | command |", "|---|---|"]
    for part, record in atlas.records.items():
        lines.append(f"| {part} | `{command_of(record)}` |")
    return "\n".join(lines)


def form(measured: Estimate, digits: str) -> str:
    return format_estimate(measured, lambda number: format(number, digits))


def tables(atlas: Atlas) -> dict[str, str]:
    """What stands between the markers of the document."""
    points = atlas.points()
    return {
        "quality": quality_table(points),
        "front": ", ".join(f"`{one.label}` ({one.family})" for one in front(points)),
        "speed": speed_table(atlas.timed()),
        "commands": commands(atlas),
    }


def filled(text: str, atlas: Atlas) -> str:
    """The document with its tables made anew."""
    for name, content in tables(atlas).items():
        text = fill(text, name, content)
    return text


# -- the pictures ---------------------------------------------------------------------------------------------------

LABEL_PIXELS, NEIGHBOUR_PIXELS = 11, 40  # height of a label; how near, across, labels could lie over each other

Values = Sequence[tuple[Point | Timed, Estimate]]


def draw_family(axes: Any, values: Values) -> None:
    """Marks with intervals, by family, over memory; labels when the axes have their limits."""
    for name, (color, marker) in FAMILIES.items():
        family = [(one, value) for one, value in values if one.family == name]
        look = {"color": color, "marker": marker, "linestyle": "", "capsize": 2, "alpha": 0.7}
        plot(axes, [one.memory for one, _ in family], [value for _, value in family], look, name, 1)
    memory_axis(axes)


def add_labels(axes: Any, values: Values) -> None:
    """Names beside the marks, pushed up where they would lie over one another."""
    axes.figure.canvas.draw()
    placed: list[tuple[float, float]] = []
    for one, value in sorted(values, key=lambda pair: pair[1].value):
        x, y = axes.transData.transform((one.memory, value.value))
        top, side = y, -1 if one.family == "kvpress" else 1
        for other_x, other_y in sorted(placed, key=lambda place: place[1]):
            if abs(other_x - x - side * NEIGHBOUR_PIXELS) < NEIGHBOUR_PIXELS and abs(other_y - top) < LABEL_PIXELS:
                top = other_y + LABEL_PIXELS
        placed.append((x + side * NEIGHBOUR_PIXELS, top))
        axes.annotate(
            one.label, (x, y), (x + 9 * side, top - 3), xycoords="figure pixels", textcoords="figure pixels",
            fontsize=7, color=FAMILIES[one.family][0], ha="left" if side > 0 else "right", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "0.8", "linewidth": 0.5} if top > y else None,
        )  # fmt: skip


def draw_quality(points: Sequence[Point], path: Path) -> None:
    """Left perplexity with the front, right answers, over memory."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(16, 9), layout="constrained")
    perplexities, scores = ([(one, getattr(one, name)) for one in points] for name in ("perplexity", "score"))
    draw_family(left, perplexities)
    draw_family(right, scores)
    best = front(points)
    left.plot(
        [one.memory for one in best], [one.perplexity.value for one in best], color="0.6", zorder=0, label="front"
    )
    left.set_yscale("symlog", linthresh=10)
    left.set_ylabel("perplexity over the dense cache, % (linear up to 10, then logarithmic)")
    left.legend(loc="upper left")
    right.set_ylabel("expected answers given, %")
    figure.canvas.draw()
    figure.set_layout_engine("none")
    add_labels(left, perplexities)
    add_labels(right, scores)
    figure.savefig(path, dpi="figure")


def draw_speed(timed: Sequence[Timed], path: Path) -> None:
    """Speed of a decode step over memory."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    speeds = [(one, one.speed) for one in timed]
    draw_family(axes, speeds)
    axes.axhline(1, color="0.6", zorder=0)
    axes.set_ylabel("decode step: times as fast as the dense cache of the same program")
    axes.legend(loc="upper left")
    figure.canvas.draw()
    figure.set_layout_engine("none")
    add_labels(axes, speeds)
    figure.savefig(path, dpi="figure")


def memory_axis(axes: Any) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.6, 16)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_xlabel("fewer bytes than a 16-bit cache")


def main() -> int:
    """Write document and pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=RECORDS)
    parser.add_argument("--prefix", default=PREFIX)
    parser.add_argument("--tables", action="store_true", help="leave the pictures as they are")
    options = parser.parse_args()
    atlas = Atlas(options.folder, options.prefix)
    DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8"), atlas), encoding="utf-8")
    if not options.tables:
        import matplotlib

        matplotlib.use("Agg")
        draw_quality(atlas.points(), QUALITY_PICTURE)
        draw_speed(atlas.timed(), SPEED_PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
