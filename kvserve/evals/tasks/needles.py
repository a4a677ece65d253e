"""Needles: sentences that give numbers to names, hidden in prose."""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvserve.evals.source import Source
from kvserve.evals.tasks.base import Draft, Room, Task, place
from kvserve.evals.tasks.words import keys, numbers


@dataclass(frozen=True)
class Needles(Task):
    """Retrieval of numbers.

    Attributes:
        num_keys: names that have numbers.
        num_values: numbers of each.
        num_queries: names that are asked for, all of their numbers.
    """

    name: str
    summary: str
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    @property
    def answer_tokens(self) -> int:  # type: ignore[override]
        """A number is up to seven tokens, its name and punctuation some more."""
        return 8 + 12 * self.num_values * self.num_queries

    @property
    def has_depth(self) -> bool:  # type: ignore[override]
        return self.num_values == self.num_queries == 1

    def draw(self, rng: random.Random, source: Source, room: Room, depth: float) -> Draft:
        names = keys(rng, self.num_keys)
        values = numbers(rng, self.num_keys * self.num_values)
        needles = [(name, value) for i, name in enumerate(names) for value in values[i :: self.num_keys]]
        asked = names[: self.num_queries]
        answers = [value for name, value in needles if name in asked]
        intro = "Read this text and remember the secret numbers in it."
        listed = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])} and {asked[-1]}"
        is_one = len(answers) == 1
        question = f"What {'is' if is_one else 'are'} the secret number{'' if is_one else 's'} of {listed}?"
        start = f"The secret number{'' if is_one else 's'} of {listed} {'is' if is_one else 'are'}"
        written = [source.encode(f" The secret number of {name} is {value}.") for name, value in needles]
        left = room.tokens(intro, question, start)
        num_needle_tokens = sum(map(len, written))
        room.check(left, num_needle_tokens + 1)
        sentences = source.prose(rng, left - num_needle_tokens)
        return Draft(intro, self._hide(rng, sentences, written, depth), question, start, answers)

    def _hide(
        self, rng: random.Random, sentences: list[list[int]], needles: list[list[int]], depth: float
    ) -> list[int]:
        """The first needle at `depth` where the task has one, all others anywhere."""
        places = [rng.randrange(len(sentences) + 1) for _ in needles]
        if self.has_depth:
            places[0] = _sentence_at(sentences, depth)
        order = sorted(range(len(needles)), key=lambda index: places[index])
        return place(sentences, [needles[index] for index in order], [places[index] for index in order])


def _sentence_at(sentences: list[list[int]], depth: float) -> int:
    """The gap between sentences that is nearest to `depth` of their tokens."""
    target = depth * sum(map(len, sentences))
    ends, total = [0], 0
    for sentence in sentences:
        total += len(sentence)
        ends.append(total)
    return min(range(len(ends)), key=lambda index: abs(ends[index] - target))
