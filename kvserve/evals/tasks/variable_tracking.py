"""Variable tracking: a chain of assignments through prose; which variables have the first one's value?"""

from __future__ import annotations

import random
import string

from kvserve.evals.source import Source
from kvserve.evals.tasks.base import Draft, Room, Task, spread
from kvserve.evals.tasks.words import numbers

_NUM_HOPS = 4  # RULER's default: five variables
_NAME_LETTERS = 4


class VariableTracking(Task):
    """All variables of one chain."""

    name = "variable-tracking"
    summary = f"the variables that a value reaches over {_NUM_HOPS} assignments"
    answer_tokens = 40

    def draw(self, rng: random.Random, source: Source, room: Room, depth: float) -> Draft:
        (value,) = numbers(rng, 1, digits=5)
        names: list[str] = []
        while len(names) <= _NUM_HOPS:
            name = "".join(rng.choices(string.ascii_uppercase, k=_NAME_LETTERS))
            if name not in names:
                names.append(name)
        intro = "Read this text and keep track of the variables that are set in it."
        question = (
            f"Which variables have the value {value}, directly or through other variables? There are {len(names)}."
        )
        start = f"The variables with the value {value} are"
        values = [value, *(f"VAR {name}" for name in names)]
        written = [source.encode(f" VAR {name} = {origin}.") for name, origin in zip(names, values, strict=False)]
        left = room.tokens(intro, question, start)
        num_tokens = sum(map(len, written))
        room.check(left, num_tokens + 1)
        body = spread(rng, source.prose(rng, left - num_tokens), written)
        return Draft(intro, body, question, start, names)
