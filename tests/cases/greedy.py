"""Comparing greedy texts that went through different batches.

A request alone and the same request among others, or recomputed after a preemption, go through matrix products of
other shapes, which round differently (stock vLLM too); a key that lies on the border of two codes then takes the other
one, which a 2-bit cache turns into a whole step of its scale. Where the two best tokens are closer than that noise,
either may come first; anywhere else the texts must agree.
"""

from __future__ import annotations

from typing import NamedTuple

NEAR_TIE_NATS = 0.05


class Step(NamedTuple):
    """One greedy token and by how many nats it beat the second best."""

    token: str
    margin: float


def steps_of(tokens: list[str], top_logprobs: list[dict[str, float]]) -> list[Step]:
    """Steps from an OpenAI completion's `logprobs` (requested with two or more alternatives)."""
    steps = []
    for token, alternatives in zip(tokens, top_logprobs, strict=True):
        best, second, *_ = sorted(alternatives.values(), reverse=True)
        steps.append(Step(token, best - second))
    return steps


def differs_only_behind_a_near_tie(expected: list[Step], actual: list[Step]) -> bool:
    """Whether the texts agree up to the first step at which the two best tokens were nearly equal."""
    for want, got in zip(expected, actual, strict=True):
        if want.token != got.token:
            return want.margin < NEAR_TIE_NATS
    return True


def assert_same_texts(expected: list[list[Step]], actual: list[list[Step]]) -> None:
    """All texts agree but for near ties, and at least three in four are identical."""
    assert all(differs_only_behind_a_near_tie(*pair) for pair in zip(expected, actual, strict=True))
    same = sum([s.token for s in a] == [s.token for s in b] for a, b in zip(expected, actual, strict=True))
    assert same >= 0.75 * len(expected), f"only {same} of {len(expected)} texts are identical"
