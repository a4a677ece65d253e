"""Schedules by the name that YAML files use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvserve.schedules.base import Schedule
from kvserve.schedules.end_of_prefill import EndOfPrefill
from kvserve.schedules.every_n import EveryN
from kvserve.schedules.over_budget import OverBudget

SCHEDULES: dict[str, type[Schedule]] = {
    cls.model_fields["name"].default: cls for cls in (EndOfPrefill, EveryN, OverBudget)
}


def schedule_class(name: str) -> type[Schedule]:
    """The class of a name.

    Raises:
        ValueError: there is none; the message lists the names.
    """
    if name not in SCHEDULES:
        raise ValueError(f"there is no schedule {name!r}; the schedules are {', '.join(sorted(SCHEDULES))}")
    return SCHEDULES[name]


def make_schedule(content: Mapping[str, Any]) -> Schedule:
    """The schedule of a YAML mapping: its name and those parameters that differ from the defaults.

    Raises:
        ValueError: unknown name (or none), unknown parameter or a value out of range.
    """
    return schedule_class(str(content.get("name"))).model_validate(content)
