#!/usr/bin/env python3
"""docs/overview.svg: one request's cache under a few policies, to scale, with what they gain and cost.

    python -m benchmarks.reports.overview

A picture's area is memory: tokens across, bits of an element up, as the layout of pages has them. Figures are those of
README's table.
"""

import sys
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import torch

from benchmarks.reports.atlas import PREFIX, RECORDS, Atlas
from benchmarks.reports.choices import CONTEXT, Choice, choices
from kvserve.accounting.plan import policy_plan
from kvserve.pages.layout import PageLayout
from kvserve.policies.loading import load_policy

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "overview.svg"
SHOWN = ("none", "kivi-4bit", "boost-2bit", "kv-compress@4", "kv-compress-2bit@4")
HEAD_DIM = 64  # of the model that the figures are of

LEFT, TOP, PITCH = 150, 62, 50  # pixels: where the first bar begins, and from bar to bar
PER_TOKEN, PER_BIT = 430 / CONTEXT, 2.25
COLUMNS = ((652, "fewer bytes"), (762, "perplexity"), (862, "decode step"))
WIDTH, HEIGHT = 910, TOP + PITCH * len(SHOWN) + 34
DENSE, CODED, FREED = "#5b7fa6", "#e0823d", "#b9c2cc"  # 16 bits, quantised, what a 16-bit cache has more


class Span(NamedTuple):
    """Tokens next to each other that are kept with the same number of bits."""

    tokens: int
    bits: float
    color: str


def spans(policy: str) -> list[Span]:
    """What one KV head of one layer holds of a request of CONTEXT tokens, on average over the heads: in a row."""
    layout = PageLayout.build(load_policy(policy), HEAD_DIM, 64, torch.float16)
    if not layout.has_pages:
        return [Span(CONTEXT, 16, DENSE)]
    plan, sinks = policy_plan(layout, CONTEXT), layout.policy.sink_tokens
    sealed = plan.last_cut(CONTEXT).kept_blocks * layout.block_size if plan else CONTEXT - sinks
    coded = Span(sealed, layout.bits_per_element(), CODED)
    tail = Span(layout.tile_tokens, 16, DENSE)  # room that every request holds for its unfinished tile
    return [Span(sinks, 16, DENSE), coded, tail] if sinks else [coded, tail]


def drawn() -> str:
    """The picture, as SVG."""
    found = {one.policy: one for one in choices(Atlas(RECORDS, PREFIX))}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13" fill="#24292f">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
        text(LEFT, 26, f"the cache of one request of {CONTEXT:,} tokens: area is memory", weight="bold"),
        *(text(x, 46, title, anchor="end", color="#57606a") for x, title in COLUMNS),
    ]
    for index, policy in enumerate(SHOWN):
        parts += bar(TOP + PITCH * index, found[policy])
    parts += [*legend(HEIGHT - 16), "</svg>"]
    return "\n".join(parts) + "\n"


def bar(top: float, choice: Choice) -> list[str]:
    """One policy: its name, its memory in front of a 16-bit cache's, and its figures."""
    bottom = top + 16 * PER_BIT
    parts = [
        text(LEFT - 10, bottom - 12, choice.policy, anchor="end", weight="bold"),
        f'<rect x="{LEFT}" y="{top:.1f}" width="{CONTEXT * PER_TOKEN:.1f}" height="{16 * PER_BIT:.1f}" fill="none" '
        f'stroke="{FREED}" stroke-dasharray="3 3"/>',
    ]
    x = float(LEFT)
    for span in spans(choice.policy):
        width, height = span.tokens * PER_TOKEN, span.bits * PER_BIT
        parts.append(
            f'<rect x="{x:.1f}" y="{bottom - height:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill="{span.color}"/>'
        )
        x += width
    speed = f"{choice.speed.value:.1f}x as fast" if choice.speed else ""
    figures = (f"{choice.memory:.1f}x", f"{choice.point.perplexity.value:+.1f} %", speed)
    return parts + [
        text(column, bottom - 12, figure, anchor="end")
        for (column, _), figure in zip(COLUMNS, figures, strict=True)
        if figure
    ]


def legend(y: float) -> list[str]:
    """What the colours mean."""
    entries = ((DENSE, "16 bits"), (CODED, "quantised tiles of 64 tokens"), (FREED, "free for other requests"))
    parts, x = [], LEFT
    for color, meaning in entries:
        look = f'fill="none" stroke="{color}" stroke-dasharray="3 3"' if color == FREED else f'fill="{color}"'
        parts += [f'<rect x="{x}" y="{y - 11}" width="16" height="12" {look}/>', text(x + 22, y, meaning)]
        x += 40 + 7 * len(meaning)
    return parts


def text(
    x: float, y: float, content: str, *, anchor: str = "start", weight: str = "normal", color: str = "#24292f"
) -> str:
    """One line of text."""
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-weight="{weight}" fill="{color}">'
        f"{escape(content)}</text>"
    )


def main() -> int:
    """Write the picture."""
    PICTURE.write_text(drawn(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
