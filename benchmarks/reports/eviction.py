#!/usr/bin/env python3
"""docs/eviction-results.md's tables and docs/quality-vs-memory.png, from the records in benchmarks/results.

    python -m benchmarks.reports.eviction

The picture needs matplotlib (`pip install kvserve[plot]`); without it, `--tables` writes the document alone.
"""

import argparse
import functools
import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.reports.documents import fill

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "benchmarks" / "results"
DOCUMENT, PICTURE = ROOT / "docs" / "eviction-results.md", ROOT / "docs" / "quality-vs-memory.png"
Z = 1.959964  # of a 95 % interval
RESAMPLES = 2000
PARTNERS = {"h2o": "observed-attention"}  # presses that have another name than the policy
CANDIDATES = ("attended-spans", "h2o", "keydiff", "kv-compress")  # the best at something, against the best press
EQUAL = "no difference shown"


class Estimate(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


class Results:
    """What one implementation reached on the same prompts.

    Attributes:
        hits: policy, rate: one bool a needle.
        nats: policy, rate: per token of the continuation, one a text.
    """

    def __init__(self, record: dict[str, Any], expected: list[str], num_tokens: int) -> None:
        self.hits = {
            name: {rate: found(answers, expected) for rate, answers in rates.items()}
            for name, rates in record["answers"].items()
        }
        self.nats = {
            name: {rate: [total / num_tokens for total in totals] for rate, totals in rates.items()}
            for name, rates in record["log_likelihoods_nats"].items()
        }

    def names(self) -> list[str]:
        """Policies or presses, without the dense cache."""
        return sorted(set(self.nats) - {"none"})


class Report(NamedTuple):
    """All that is compared; `overlap` is the record of benchmarks/kvpress_overlap.py."""

    ours: Results
    theirs: Results
    rates: list[str]
    overlap: dict[str, Any]

    @classmethod
    def read(cls) -> "Report":
        """From the committed records.

        Raises:
            SystemExit: they are of different prompts.
        """
        files = ("quality", "kvpress", "overlap")
        ours, theirs, overlap = (
            json.loads((RECORDS / f"cpu-zen4-evict-{name}.json").read_text(encoding="utf-8")) for name in files
        )
        if ours["prompts_sha256"] != theirs["prompts_sha256"]:
            raise SystemExit("the records are of different prompts")
        expected, lengths = ours["expected"], ours["continuation_tokens"]
        return cls(Results(ours, expected, lengths), Results(theirs, expected, lengths), ours["rates"], overlap)


def found(answers: list[str], expected: list[str]) -> list[bool]:
    """Which answers contain their number."""
    return [number in answer.replace(",", "") for answer, number in zip(answers, expected, strict=True)]


def wilson(hits: list[bool]) -> Estimate:
    """Share of hits with Wilson's interval."""
    n, share = len(hits), sum(hits) / len(hits)
    centre, spread = share + Z * Z / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return Estimate(share, (centre - spread) / (1 + Z * Z / n), (centre + spread) / (1 + Z * Z / n))


@functools.cache
def resamples(num_texts: int) -> list[list[int]]:
    """Draws of texts with replacement, the same ones for whatever is compared."""
    rng = random.Random(0)
    return [rng.choices(range(num_texts), k=num_texts) for _ in range(RESAMPLES)]


def excess(nats: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Perplexity over the baseline's on the same texts, less 1, in percent; paired bootstrap over the texts."""
    losses = [b - a for a, b in zip(nats, baseline, strict=True)]
    means = sorted(sum(losses[text] for text in drawn) / len(losses) for drawn in resamples(len(losses)))
    ends = means[round(0.025 * RESAMPLES)], means[round(0.975 * RESAMPLES) - 1]
    return Estimate(*(100 * math.expm1(x) for x in (sum(losses) / len(losses), *ends)))


def sign_test(a: list[bool], b: list[bool]) -> float:
    """Two-sided p of the exact sign test on the prompts that only one of the two answers."""
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2**n
    return min(1.0, 2 * tail)


def table(corner: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [(corner, *columns), ["---"] * (len(columns) + 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace(" --- ", "---")


def rate_columns(rates: Sequence[str]) -> list[str]:
    """Headings."""
    return [f"rate {rate}" for rate in rates]


def needle_table(report: Report) -> str:
    """Needles found, both implementations side by side."""
    ours, theirs, rates, _ = report
    dense = ours.hits["none"]["1"]
    rows = [["`none`", f"{sum(dense)} (rate 1)", *[""] * (len(rates) - 1)]]
    for label, results in (("`{}`", ours), ("kvpress {}", theirs)):
        for name in sorted(results.names(), key=lambda name: -total(results.hits[name], rates)):
            rows.append([label.format(name), *(needle_cell(results.hits[name][rate]) for rate in rates)])
    return table(f"needles found of {len(dense)}", rate_columns(rates), rows)


def total(hits: dict[str, list[bool]], rates: list[str]) -> int:
    """Needles found at all rates."""
    return sum(sum(hits[rate]) for rate in rates)


def needle_cell(hits: list[bool]) -> str:
    """Count, and the interval in the same unit."""
    _, low, high = wilson(hits)
    return f"{sum(hits)} ({low * len(hits):.0f} to {high * len(hits):.0f})"


def excess_cell(estimate: Estimate, digits: int = 1) -> str:
    """In percent."""
    return f"{estimate.value:+.{digits}f} ({estimate.low:+.{digits}f} to {estimate.high:+.{digits}f})"


def perplexity_table(report: Report) -> str:
    """Perplexity of the continuation over the dense one's."""
    ours, theirs, rates, _ = report
    dense = ours.nats["none"]["1"]
    rows = []
    for label, results in (("`{}`", ours), ("kvpress {}", theirs)):
        for name in sorted(results.names(), key=lambda name: -sum(sum(results.nats[name][rate]) for rate in rates)):
            rows.append([label.format(name), *(excess_cell(excess(results.nats[name][r], dense)) for r in rates)])
    return table(f"perplexity over `none`, % ({len(dense)} texts)", rate_columns(rates), rows)


def pairs(report: Report) -> list[tuple[str, str]]:
    """Policies and the presses of the same method."""
    partners = [(name, PARTNERS.get(name, name)) for name in report.ours.names()]
    return [(name, press) for name, press in partners if press in report.theirs.nats]


def parity_needles(report: Report) -> str:
    """Needles that only one of the two finds, and the sign test's p."""
    ours, theirs, rates, _ = report
    rows = [
        [pair_label(name, press), *(only_cell(ours.hits[name][rate], theirs.hits[press][rate]) for rate in rates)]
        for name, press in pairs(report)
    ]
    return table("only kvserve / only kvpress (p)", rate_columns(rates), rows)


def only_cell(a: list[bool], b: list[bool]) -> str:
    """Prompts that only one of the two answers."""
    first = sum(x and not y for x, y in zip(a, b, strict=True))
    second = sum(y and not x for x, y in zip(a, b, strict=True))
    return f"{first} / {second} ({sign_test(a, b):.2g})"


def pair_label(name: str, press: str) -> str:
    """One name where both have the same."""
    return f"`{name}`" if name == press else f"`{name}`, {press}"


def parity_perplexity(report: Report) -> str:
    """Perplexity of a policy over that of the press."""
    ours, theirs, rates, _ = report
    rows = []
    for name, press in pairs(report):
        found = [excess(ours.nats[name][rate], theirs.nats[press][rate]) for rate in rates]
        rows.append([pair_label(name, press), *(excess_cell(cell, 2) for cell in found)])
    return table("perplexity over the press's, %", rate_columns(rates), rows)


def overlap_table(report: Report) -> str:
    """Tokens that both keep, on a question and on a text."""
    shared, presses = report.overlap["shared"], report.overlap["presses"]
    rows = [
        [
            pair_label(name, press),
            *(" / ".join(f"{100 * shared[kind][name][rate]:.1f}" for kind in shared) for rate in report.rates),
        ]
        for name, press in presses.items()
    ]
    return table(f"kept by both, % ({' / '.join(shared)})", rate_columns(report.rates), rows)


def best_table(report: Report) -> str:
    """The best policy and the best press at each rate, in both tasks."""
    ours, theirs, rates, _ = report
    rows = []
    for rate in rates:
        policy, press = most_needles(ours, rate), most_needles(theirs, rate)
        hits = ours.hits[policy][rate], theirs.hits[press][rate]
        row = [rate, f"`{policy}` {sum(hits[0])}", f"{press} {sum(hits[1])}", f"{sign_test(*hits):.2g}"]
        policy, press = lowest_perplexity(ours, rate), lowest_perplexity(theirs, rate)
        rows.append(
            [*row, f"`{policy}`", press, excess_cell(excess(ours.nats[policy][rate], theirs.nats[press][rate]))]
        )
    columns = ["most needles", "of a press", "p", "lowest perplexity", "of a press", "policy's over press's, %"]
    return table("rate", columns, rows)


def most_needles(results: Results, rate: str) -> str:
    """The policy or press that finds most; the first by name of equals."""
    return max(results.names(), key=lambda name: sum(results.hits[name][rate]))


def lowest_perplexity(results: Results, rate: str) -> str:
    """The policy or press with the highest likelihood."""
    return max(results.names(), key=lambda name: sum(results.nats[name][rate]))


def against_table(report: Report) -> str:
    """Perplexity of our compositions over that of SnapKV's and over the best press's at each rate."""
    ours, theirs, rates, _ = report
    rows = []
    for label, results in (("`{}`", ours), ("kvpress {}", theirs)):
        for other in ("snapkv", "ada-snapkv"):
            found = [excess(ours.nats["kv-compress"][rate], results.nats[other][rate]) for rate in rates]
            rows.append([f"`kv-compress` over {label.format(other)}", *map(excess_cell, found)])
    for name in CANDIDATES:
        found = [excess(ours.nats[name][rate], theirs.nats[lowest_perplexity(theirs, rate)][rate]) for rate in rates]
        rows.append([f"`{name}` over the best press", *map(excess_cell, found)])
    return table("perplexity, %", rate_columns(rates), rows)


def statements(report: Report) -> str:
    """What the tables show, as sentences."""
    ours, theirs, rates, _ = report
    lines = [parity_statement(report)]
    for label, results in (("`{}`", ours), ("kvpress {}", theirs)):
        for other in ("snapkv", "ada-snapkv"):
            hits = [sign_verdict(ours.hits["kv-compress"][rate], results.hits[other][rate]) for rate in rates]
            nats = [verdict(excess(ours.nats["kv-compress"][rate], results.nats[other][rate])) for rate in rates]
            what = f"`kv-compress` against {label.format(other)}"
            lines.append(f"{what}: needles {by_rate(rates, hits)}; perplexity {by_rate(rates, nats)}.")
    for name in CANDIDATES:
        press = {rate: theirs.nats[lowest_perplexity(theirs, rate)][rate] for rate in rates}
        nats = [verdict(excess(ours.nats[name][rate], press[rate])) for rate in rates]
        lines.append(f"Perplexity of `{name}` against the best press: {by_rate(rates, nats)}.")
    needles, texts = better_needles(report), better_perplexity(report)
    lines.append(f"More needles than the best press at every rate: {listed(needles)}.")
    lines.append(f"Lower perplexity than the best press at every rate: {listed(texts)}.")
    lines.append(f"Both: {listed([name for name in needles if name in texts])}.")
    return "\n".join(f"- {line}" for line in lines)


def parity_statement(report: Report) -> str:
    """How many intervals hold equality, and those that do not."""
    ours, theirs, rates, _ = report
    cells = [(name, press, rate) for name, press in pairs(report) for rate in rates]
    verdicts = [verdict(excess(ours.nats[name][rate], theirs.nats[press][rate])) for name, press, rate in cells]
    outside = [
        f"`{name}` at {rate} ({found})"
        for (name, _, rate), found in zip(cells, verdicts, strict=True)
        if found != EQUAL
    ]
    equal = f"{len(cells) - len(outside)} of {len(cells)} intervals hold 0"
    return f"Perplexity of policies over presses of the same method: {equal}. The others: {listed(outside)}."


def verdict(estimate: Estimate) -> str:
    """Of a policy's perplexity over another's."""
    if estimate.high < 0:
        return "better"
    return "worse" if estimate.low > 0 else EQUAL


def sign_verdict(a: list[bool], b: list[bool]) -> str:
    """Of needles found."""
    if sign_test(a, b) >= 0.05:
        return EQUAL
    return "better" if sum(a) > sum(b) else "worse"


def by_rate(rates: Sequence[str], verdicts: Sequence[str]) -> str:
    """Rates with the same verdict together."""
    groups = {
        found: [rate for rate, other in zip(rates, verdicts, strict=True) if other == found] for found in verdicts
    }
    return " and ".join(f"{found} at {', '.join(which)}" for found, which in groups.items())


def listed(names: Sequence[str]) -> str:
    """Names, or that there are none."""
    return ", ".join(names) or "none"


def better_needles(report: Report) -> list[str]:
    """Policies that find more than every press at every rate, chance left aside."""
    best = {rate: sum(report.theirs.hits[most_needles(report.theirs, rate)][rate]) for rate in report.rates}
    hits = report.ours.hits
    return [f"`{name}`" for name in report.ours.names() if all(sum(hits[name][rate]) > best[rate] for rate in best)]


def better_perplexity(report: Report) -> list[str]:
    """Policies of lower perplexity than every press at every rate, chance left aside."""
    best = {rate: sum(report.theirs.nats[lowest_perplexity(report.theirs, rate)][rate]) for rate in report.rates}
    nats = report.ours.nats
    return [f"`{name}`" for name in report.ours.names() if all(sum(nats[name][rate]) > best[rate] for rate in best)]


def tables(report: Report) -> dict[str, str]:
    """What stands between the markers of the document."""
    return {
        "needles": needle_table(report),
        "perplexity": perplexity_table(report),
        "best": best_table(report),
        "against": against_table(report),
        "parity": f"{parity_needles(report)}\n\n{parity_perplexity(report)}",
        "overlap": overlap_table(report),
        "statements": statements(report),
    }


def draw(report: Report) -> None:
    """Above ours, below kvpress; left needles, right perplexity. A policy has the colour of the press of its method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ours, theirs, rates, _ = report
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 10), sharex=True, sharey="col", layout="constrained")
    dense, spots = ours.nats["none"]["1"], [math.log2(float(rate)) for rate in rates]
    methods = sorted({PARTNERS.get(name, name) for name in [*ours.names(), *theirs.names()]})
    for (left, right), results, label in zip(axes, (ours, theirs), ("{}", "kvpress {}"), strict=True):
        for name in results.names():
            number = methods.index(PARTNERS.get(name, name))
            look = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else ":", "capsize": 2}
            at = [spot + 0.012 * (number - len(methods) / 2) for spot in spots]
            needles = [wilson(results.hits[name][rate]) for rate in rates]
            plot(left, at, needles, look, label.format(name), 100)
            plot(right, at, [excess(results.nats[name][rate], dense) for rate in rates], look, label.format(name), 1)
        left.set_ylabel("needles found, % (95 % interval)")
        right.set_ylabel("perplexity over the dense cache's, % (random is far above)")
        right.set_ylim(-2, 32)
        right.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    for below in axes[1]:
        below.set_xticks(spots, rates)
        below.set_xlabel("compression rate (tokens of the prompt / tokens kept)")
    figure.savefig(PICTURE, dpi=100)


def plot(
    axes: Any, at: list[float], estimates: Sequence[Any], look: dict[str, Any], label: str | None, by: int
) -> None:
    """One line with its intervals: estimates with `value`, `low` and `high`."""
    values = [by * e.value for e in estimates]
    errors = [[by * max(e.value - e.low, 0) for e in estimates], [by * max(e.high - e.value, 0) for e in estimates]]
    axes.errorbar(at, values, errors, label=label, linewidth=1.3, elinewidth=0.6, **look)


def filled(text: str, report: Report) -> str:
    """The document with its tables made anew."""
    for name, content in tables(report).items():
        text = fill(text, name, content)
    return text


def main() -> int:
    """Write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tables", action="store_true", help="leave the picture as it is")
    options = parser.parse_args()
    report = Report.read()
    DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8"), report), encoding="utf-8")
    if not options.tables:
        draw(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
