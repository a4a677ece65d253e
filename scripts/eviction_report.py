#!/usr/bin/env python3
"""The tables of docs/eviction.md and the picture docs/quality-vs-memory.png, from the records in benchmarks/results.

    python scripts/eviction_report.py --ours OURS.json ... --kvpress KVPRESS.json ...

Records of one kind with the same prompts are joined. The picture needs matplotlib (`pip install kvserve[plot]`).
"""

import argparse
import json
import math
import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT, PICTURE = ROOT / "docs" / "eviction.md", ROOT / "docs" / "quality-vs-memory.png"
Z = 1.959964  # of a 95 % interval
RESAMPLES = 2000


class Estimate(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


class Results:
    """What one implementation reached: hits[policy][rate], one bool a needle; nats likewise, one sum a text."""

    def __init__(self, records: list[dict[str, Any]], expected: list[str]) -> None:
        self.hits: dict[str, dict[str, list[bool]]] = {}
        self.nats: dict[str, dict[str, list[float]]] = {}
        for record in records:
            for name, rates in record["answers"].items():
                self.hits[name] = {rate: found(answers, expected) for rate, answers in rates.items()}
            self.nats |= record["log_likelihoods_nats"]

    def num_texts(self) -> int:
        """Texts that all policies have."""
        return min((len(sums) for rates in self.nats.values() for sums in rates.values()), default=0)

    def cut(self, num_texts: int) -> None:
        """Keep the first texts."""
        for rates in self.nats.values():
            rates |= {rate: sums[:num_texts] for rate, sums in rates.items()}


def found(answers: list[str], expected: list[str]) -> list[bool]:
    """Which answers contain their number."""
    return [number in answer.replace(",", "") for answer, number in zip(answers, expected, strict=False)]


def wilson(hits: list[bool]) -> Estimate:
    """Share of hits with Wilson's interval."""
    n, share = len(hits), sum(hits) / len(hits)
    centre, spread = share + Z * Z / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return Estimate(share, (centre - spread) / (1 + Z * Z / n), (centre + spread) / (1 + Z * Z / n))


def excess(nats: list[float], dense: list[float], num_tokens: int) -> Estimate:
    """Perplexity over the dense one's on the same texts, less 1, in percent; bootstrap over texts."""
    losses = [(b - a) / num_tokens for a, b in zip(nats, dense, strict=False)]
    rng = random.Random(0)
    means = sorted(sum(rng.choices(losses, k=len(losses))) / len(losses) for _ in range(RESAMPLES))
    middle = sum(losses) / len(losses)
    ends = means[round(0.025 * RESAMPLES)], means[round(0.975 * RESAMPLES) - 1]
    return Estimate(*(100 * math.expm1(x) for x in (middle, *ends)))


def sign_test(a: list[bool], b: list[bool]) -> float:
    """Two-sided p of the exact sign test on the prompts that only one of the two answers."""
    only_a = sum(x and not y for x, y in zip(a, b, strict=False))
    only_b = sum(y and not x for x, y in zip(a, b, strict=False))
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2**n
    return min(1.0, 2 * tail)


def needle_table(ours: Results, theirs: Results, rates: list[str]) -> str:
    """Needles found, both implementations side by side."""
    count = len(next(iter(ours.hits["none"].values())))
    rows = [f"| needles found of {count} | " + " | ".join(f"rate {rate}" for rate in rates) + " |"]
    rows.append("|---" * (len(rates) + 1) + "|")
    rows.append(f"| `none` | {sum(ours.hits['none']['1'])} (rate 1) |" + " |" * (len(rates) - 1))
    for label, results in (("`{}`", ours), ("kvpress {}", theirs)):
        for name in sorted(set(results.hits) - {"none"}, key=lambda name: -total(results.hits[name], rates)):
            cells = [needle_cell(results.hits[name][rate]) for rate in rates]
            rows.append(f"| {label.format(name)} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def total(hits: dict[str, list[bool]], rates: list[str]) -> int:
    """Needles found at all rates."""
    return sum(sum(hits[rate]) for rate in rates)


def needle_cell(hits: list[bool]) -> str:
    """Count, and the interval in the same unit."""
    _, low, high = wilson(hits)
    return f"{sum(hits)} ({low * len(hits):.0f} to {high * len(hits):.0f})"


def perplexity_table(ours: Results, theirs: Results, rates: list[str], num_tokens: int) -> str:
    """Perplexity of the continuation over the dense one's."""
    dense = ours.nats["none"]["1"]
    rows = [
        f"| perplexity over `none`, % ({len(dense)} texts) | " + " | ".join(f"rate {rate}" for rate in rates) + " |"
    ]
    rows.append("|---" * (len(rates) + 1) + "|")
    for label, results in (("`{}`", ours), ("kvpress {}", theirs)):
        for name in sorted(set(results.nats) - {"none"}):
            found = [excess(results.nats[name][rate], dense, num_tokens) for rate in rates]
            cells = [f"{e.value:+.1f} ({e.low:+.1f} to {e.high:+.1f})" for e in found]
            rows.append(f"| {label.format(name)} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def parity_table(ours: Results, theirs: Results, rates: list[str]) -> str:
    """Policies of the same name: needles that only one of the two finds, and the sign test's p."""
    rows = ["| only kvserve / only kvpress (p) | " + " | ".join(f"rate {rate}" for rate in rates) + " |"]
    rows.append("|---" * (len(rates) + 1) + "|")
    for name in sorted(set(ours.hits) & set(theirs.hits)):
        cells = []
        for rate in rates:
            a, b = ours.hits[name][rate], theirs.hits[name][rate]
            only = (
                sum(x and not y for x, y in zip(a, b, strict=False)),
                sum(y and not x for x, y in zip(a, b, strict=False)),
            )
            cells.append(f"{only[0]} / {only[1]} ({sign_test(a, b):.2g})")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def draw(ours: Results, theirs: Results, rates: list[str], num_tokens: int) -> None:
    """Left: needles; right: perplexity. kvpress is dashed, in the colour of the policy of the same name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 6), layout="constrained")
    names = sorted((set(ours.hits) | set(theirs.hits)) - {"none"})
    dense, spots = ours.nats["none"]["1"], [math.log2(float(rate)) for rate in rates]
    for results, style, label in ((ours, "-", "{}"), (theirs, "--", "kvpress {}")):
        for number, name in enumerate(names):
            if name not in results.hits:
                continue
            look = {"color": f"C{number}" if number < 10 else "black", "linestyle": style, "capsize": 2}
            at = [spot + 0.012 * (number - len(names) / 2) for spot in spots]
            plot(left, at, [wilson(results.hits[name][rate]) for rate in rates], look, label.format(name), 100)
            if name in results.nats:
                plot(right, at, [excess(results.nats[name][rate], dense, num_tokens) for rate in rates], look, None, 1)
    left.set_ylabel("needles found, % (95 % interval)")
    right.set_ylabel("perplexity of the continuation over the dense cache's, %")
    right.set_yscale("symlog", linthresh=1)
    for axes in (left, right):
        axes.set_xticks(spots, rates)
        axes.set_xlabel("compression rate (tokens of the prompt / tokens kept)")
    figure.legend(loc="outside right upper")
    figure.savefig(PICTURE, dpi=110)


def plot(
    axes: Any, at: list[float], estimates: list[Estimate], look: dict[str, Any], label: str | None, by: int
) -> None:
    """One line with its intervals."""
    values = [by * e.value for e in estimates]
    errors = [[by * max(e.value - e.low, 0) for e in estimates], [by * max(e.high - e.value, 0) for e in estimates]]
    axes.errorbar(at, values, errors, label=label, linewidth=1.3, elinewidth=0.6, **look)


def fill(text: str, name: str, content: str) -> str:
    """Replace what stands between the markers of `name`."""
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    before, _, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_end:
        raise SystemExit(f"{DOCUMENT} has no {begin} ... {end}")
    return f"{before}{begin}\n{content}\n{end}{after}"


def main() -> int:
    """Write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ours", type=Path, nargs="+", required=True)
    parser.add_argument("--kvpress", type=Path, nargs="+", required=True)
    parser.add_argument("--print", action="store_true", help="only print the tables")
    options = parser.parse_args()
    ours = [json.loads(path.read_text()) for path in options.ours]
    theirs = [json.loads(path.read_text()) for path in options.kvpress]
    if len({record["prompts_sha256"] for record in ours + theirs}) != 1:
        raise SystemExit("the records are of different prompts")
    rates, num_tokens, expected = ours[0]["rates"], ours[0]["continuation_tokens"], ours[0]["expected"]
    results, others = Results(ours, expected), Results(theirs, expected)
    counts = [part.num_texts() for part in (results, others) if part.nats]
    for part in (results, others):  # a run may have been stopped between two texts
        part.cut(min(counts, default=0))
    tables = {
        "needles": needle_table(results, others, rates),
        "parity": parity_table(results, others, rates),
        "perplexity": perplexity_table(results, others, rates, num_tokens) if results.nats else "",
    }
    if options.print:
        print("\n\n".join(tables.values()))
        return 0
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, table in tables.items():
        text = fill(text, name, table)
    DOCUMENT.write_text(text, encoding="utf-8")
    draw(results, others, rates, num_tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
