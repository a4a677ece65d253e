"""README's table "Which policy": what each situation calls for, with the figures of the atlas' records."""

from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.reports.atlas import PREFIX, RECORDS, Atlas, Point, form
from kvserve.evals.statistics import Estimate

CONTEXT = 4096  # tokens of the requests whose bytes are compared

# What a reader wants, and the policy that gives it.
CHOICES = (
    ("stock vLLM's answers: the baseline", "none"),
    ("the same answers in about half the memory", "int8"),
    ("little loss", "kivi-4bit"),
    ("small, and no token dropped: the default of `make serve`", "boost-2bit"),
    ("long prompts that end with the question", "kv-compress@4"),
    ("the same, as small as it gets", "kv-compress-2bit@4"),
    ("the same, and long answers: cut again while generating", "kv-compress-live@4"),
    ("long texts to go on with, few exact look-ups", "h2o@4"),
)


class Choice(NamedTuple):
    """A situation, its policy, and what that gains and costs.

    Attributes:
        memory: how many times fewer bytes a request of CONTEXT tokens holds than in a 16-bit cache.
        speed: of a decode step, in times of stock vLLM's; None: it was not timed.
    """

    situation: str
    policy: str
    memory: float
    point: Point
    speed: Estimate | None


def choices(atlas: Atlas) -> Iterator[Choice]:
    """In the order of CHOICES."""
    points = {one.label: one for one in atlas.points() if one.family.startswith("kvserve")}
    speeds = {one.label: one.speed for one in atlas.timed() if one.family.startswith("kvserve")}
    for situation, policy in CHOICES:
        yield Choice(situation, policy, atlas.memory(policy, CONTEXT), points[policy], speeds.get(policy))


def table() -> str:
    """Markdown."""
    lines = [
        "| you want | policy | fewer bytes | perplexity, % | answers, % | decode step |",
        "|---|---|---|---|---|---|",
    ]
    for one in choices(Atlas(RECORDS, PREFIX)):
        cells = (
            one.situation, f"`{one.policy}`", f"{one.memory:.1f}x", form(one.point.perplexity, "+.1f"),
            form(one.point.score, ".0f"), f"{one.speed.value:.1f}x as fast" if one.speed else "",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
