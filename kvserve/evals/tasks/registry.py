"""The tasks by name."""

from __future__ import annotations

from kvserve.evals.tasks.base import Task
from kvserve.evals.tasks.common_words import CommonWords
from kvserve.evals.tasks.frequent_words import FrequentWords
from kvserve.evals.tasks.key_value import KeyValue
from kvserve.evals.tasks.needles import Needles
from kvserve.evals.tasks.variable_tracking import VariableTracking

_TASKS: tuple[Task, ...] = (
    Needles("single-needle", "one number in prose"),
    Needles("multi-key-needle", "the number of one name among four", num_keys=4),
    Needles("multi-value-needle", "all four numbers of one name", num_values=4),
    Needles("multi-query-needle", "the numbers of four names", num_keys=4, num_queries=4),
    KeyValue(),
    VariableTracking(),
    CommonWords(),
    FrequentWords(),
)
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}
