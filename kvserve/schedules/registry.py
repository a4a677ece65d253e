"""Schedules by the name that YAML files use."""

from __future__ import annotations

from kvserve.part_registry import PartRegistry
from kvserve.schedules.base import Schedule
from kvserve.schedules.end_of_prefill import EndOfPrefill
from kvserve.schedules.every_n import EveryN
from kvserve.schedules.over_budget import OverBudget

SCHEDULES: PartRegistry[Schedule] = PartRegistry("schedule", Schedule, (EndOfPrefill, EveryN, OverBudget))
schedule_class = SCHEDULES.class_of
make_schedule = SCHEDULES.make
