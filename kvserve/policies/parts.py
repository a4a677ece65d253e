"""The parts of an eviction policy, from the content of a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvserve.budgets.registry import make_budget
from kvserve.schedules.registry import make_schedule
from kvserve.scorers.registry import make_scorer

_MAKERS = {"scorer": make_scorer, "budget": make_budget, "schedule": make_schedule}


def make_part(kind: str, content: Any) -> Any:
    """The scorer, budget or schedule that `content` names; a bare name stands for its defaults.

    Raises:
        ValueError: unknown name or parameter, or a value out of range.
    """
    if not isinstance(content, str | Mapping):
        return content
    return _MAKERS[kind]({"name": content} if isinstance(content, str) else content)
