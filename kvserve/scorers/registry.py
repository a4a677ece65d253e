"""Scorers by the name that YAML files use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvserve.scorers.accumulated_attention import AccumulatedAttention
from kvserve.scorers.base import Scorer
from kvserve.scorers.expected_attention import ExpectedAttention
from kvserve.scorers.key_diff import KeyDiff
from kvserve.scorers.key_norm import KeyNorm
from kvserve.scorers.position import Position
from kvserve.scorers.random import Random
from kvserve.scorers.window_attention import WindowAttention

SCORERS: dict[str, type[Scorer]] = {
    cls.model_fields["name"].default: cls
    for cls in (AccumulatedAttention, ExpectedAttention, KeyDiff, KeyNorm, Position, Random, WindowAttention)
}


def scorer_class(name: str) -> type[Scorer]:
    """The class of a name.

    Raises:
        ValueError: there is none; the message lists the names.
    """
    if name not in SCORERS:
        raise ValueError(f"there is no scorer {name!r}; the scorers are {', '.join(sorted(SCORERS))}")
    return SCORERS[name]


def make_scorer(content: Mapping[str, Any]) -> Scorer:
    """The scorer of a YAML mapping: its name and those parameters that differ from the defaults.

    Raises:
        ValueError: unknown name (or none), unknown parameter or a value out of range.
    """
    return scorer_class(str(content.get("name"))).model_validate(content)
