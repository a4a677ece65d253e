"""Figures with their intervals, and the sentences that the intervals allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvserve.evals.options import DENSE, TEXT
from kvserve.evals.statistics import Estimate, bootstrap, quantile, share_interval

PERPLEXITY_MARGIN_PERCENT = 1.0  # "no worse" means: by less than this
SCORE_MARGIN_POINTS = 5.0
FEWEST_SAMPLES = 8  # of fewer an interval is much too narrow to decide anything

Raw = Mapping[str, Mapping[str, Any]]  # policy, item: what the item returned


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        suite: the item it comes from.
        cell: further conditions: question, length, depth.
    """

    suite: str
    policy: str
    metric: str
    unit: str
    measured: Estimate
    samples: int
    cell: tuple[tuple[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON; bounds that one sample cannot have are null."""
        value, low, high = (None if math.isnan(number) else round(number, 6) for number in self.measured)
        return {
            "suite": self.suite, "policy": self.policy, "metric": self.metric, "unit": self.unit, **dict(self.cell),
            "samples": self.samples, "measured": {"value": value, "low": low, "high": high},
        }  # fmt: skip


def rows(raw: Raw, policies: Iterable[str]) -> list[Row]:
    """All figures of the finished items."""
    found: list[Row] = []
    for policy in policies:
        for item, result in raw.get(policy, {}).items():
            if item == TEXT:
                found += _text_rows(policy, result, raw.get(DENSE, {}).get(TEXT))
            else:
                found += _task_rows(policy, item, result)
    return found


# -- text -----------------------------------------------------------------------------------------------------------


def perplexity(samples: np.ndarray) -> np.ndarray:
    """exp of the mean negative log-probability, of each resample."""
    return np.exp(-samples.reshape(len(samples), -1).mean(1))


def _text_rows(policy: str, result: Mapping[str, Any], dense: Mapping[str, Any] | None) -> list[Row]:
    def values(name: str) -> np.ndarray:
        return np.array([window[name] for window in result["windows"]])

    def row(metric: str, unit: str, measured: Estimate) -> Row:
        return Row(TEXT, policy, metric, unit, measured, len(result["windows"]))

    found = [
        row("perplexity", "", bootstrap(values("logprobs"), perplexity)),
        row("perplexity over none", "%", perplexity_increase(result)),
        row("mean KL from none", "nats", bootstrap(values("kl"))),
        row("99th percentile of KL from none", "nats", bootstrap(values("kl"), quantile(0.99))),
        row("same most likely token as none", "%", bootstrap(100 * values("agrees"))),
    ]
    if dense is not None and dense["greedy_tokens"]:
        pairs = list(zip(result["greedy_tokens"], dense["greedy_tokens"], strict=True))
        equal = np.array([equal_tokens(*pair) for pair in pairs], float)
        found.append(row("greedy tokens before the first that differs", f"of {len(pairs[0][1])}", bootstrap(equal)))
    return found


def perplexity_increase(result: Mapping[str, Any]) -> Estimate:
    """Over the dense cache, %, on the same tokens."""
    both = [[window[name] for window in result["windows"]] for name in ("dense_logprobs", "logprobs")]
    return bootstrap(np.subtract(*map(np.array, both)), lambda samples: 100 * (1 / perplexity(samples) - 1))


def equal_tokens(found: Sequence[int], expected: Sequence[int]) -> int:
    """How many tokens are equal before the first that differs."""
    pairs = zip(found, expected, strict=True)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), len(expected))


# -- tasks ----------------------------------------------------------------------------------------------------------


def _task_rows(policy: str, item: str, result: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The score by the question's place, then by length, then by depth."""
    found = []
    length = ("length",) if len({one["length"] for one in result}) > 1 else ()
    groups = [("question",), ("question", *length)]
    if result[0]["depth"] is not None:
        groups.append(("question", *length, "depth"))
    for keys in dict.fromkeys(groups):
        for cell in dict.fromkeys(tuple((key, one[key]) for key in keys) for one in result):
            scores = [100 * one["score"] for one in result if all(one[key] == value for key, value in cell)]
            measured = share_interval(np.array(scores), 0, 100)
            found.append(Row(item, policy, "score", "%", measured, len(scores), cell))
    return found


# -- verdicts -------------------------------------------------------------------------------------------------------


def verdicts(raw: Raw, policies: Iterable[str]) -> list[str]:
    """A sentence for each policy and question that the intervals decide, and one for those they do not."""
    found = []
    for policy in policies:
        results = raw.get(policy, {})
        if policy == DENSE:
            found += _dense_differs(results.get(TEXT))
            continue
        if TEXT in results:
            increase, samples = perplexity_increase(results[TEXT]), len(results[TEXT]["windows"])
            found.append(_sentence(policy, "perplexity over none", "%", increase, samples, PERPLEXITY_MARGIN_PERCENT))
        for place in ("inside", "after"):
            differences = score_differences(results, raw.get(DENSE, {}), place)
            if len(differences):
                lost = share_interval(-differences, -100, 100)
                what = f"score lost to none, question {_WHERE[place]}"
                found.append(_sentence(policy, what, " points", lost, len(differences), SCORE_MARGIN_POINTS))
    return found


def _dense_differs(text: Mapping[str, Any] | None) -> list[str]:
    """What to know where the dense cache is no exact copy of itself."""
    largest = max((kl for window in (text or {}).get("windows", ()) for kl in window["kl"]), default=0)
    if not largest:
        return []
    return [
        f"{DENSE}: a second run differs from the first, by up to {largest:.1g} nats; all KL figures hold this noise"
    ]


_WHERE = {"inside": "inside the prompt", "after": "after compression"}


def score_differences(found: Mapping[str, Any], dense: Mapping[str, Any], place: str) -> np.ndarray:
    """Points of each question over the dense cache, on all tasks that both have."""
    return np.array([
        100 * (one["score"] - other["score"])
        for item, result in found.items() if item != TEXT and item in dense
        for one, other in zip(result, dense[item], strict=True) if one["question"] == place
    ])  # fmt: skip


def _sentence(policy: str, what: str, unit: str, lost: Estimate, samples: int, margin: float) -> str:
    """`lost` is how much worse the policy is."""
    text = f"{policy}: {what} {format_estimate(lost, lambda number: f'{number:+.1f}{unit}')}"
    if samples < FEWEST_SAMPLES:
        return f"{text}: not decided by {samples} samples"
    if lost.low > 0:
        return f"{text}: worse than none"
    if lost.high < 0:
        return f"{text}: better than none"
    if lost.high < margin:
        return f"{text}: at most {margin:g}{unit} worse than none"
    return f"{text}: not decided by {samples} samples"


def format_estimate(measured: Estimate, form: Callable[[float], str]) -> str:
    """The figure with its interval in brackets."""
    if math.isnan(measured.low):
        return form(measured.value)
    return f"{form(measured.value)} ({form(measured.low)} to {form(measured.high)})"
