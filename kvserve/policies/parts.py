"""The parts of an eviction policy, from the content of a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from kvserve.budgets.registry import make_budget
from kvserve.retention.registry import make_retention
from kvserve.schedules.registry import make_schedule
from kvserve.scorers.registry import make_scorer

_MAKERS = {"scorer": make_scorer, "budget": make_budget, "retention": make_retention, "schedule": make_schedule}


def make_part(kind: str, content: Any) -> Any:
    """The scorer, budget, retention or schedule that `content` names; a bare name stands for its defaults.

    Raises:
        ValueError: unknown name or parameter, or a value out of range.
    """
    if isinstance(content, BaseModel):
        return content  # made before
    if not isinstance(content, str | Mapping):
        raise ValueError(
            f"eviction.{kind} is {content!r:.60}, it must be the name of a {kind}, or a mapping with its name and "
            "parameters"
        )
    return _MAKERS[kind]({"name": content} if isinstance(content, str) else content)
