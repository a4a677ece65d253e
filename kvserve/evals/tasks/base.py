"""What a task is: prompts made from a seed, with answers that a string comparison can check.

The definitions are those of RULER (arXiv 2404.06654); prompts and word lists are kvserve's own.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from kvserve.evals.source import Source


@dataclass(frozen=True)
class Example:
    """One prompt in two parts, so that a context can be compressed before its question is known.

    Attributes:
        context: token ids, the start of the chat included.
        question: token ids that follow it, up to the first words of the answer, which are given.
        answers: strings that the continuation must contain.
    """

    context: list[int]
    question: list[int]
    answers: list[str]


class TaskError(ValueError):
    """A prompt that cannot be made; the message says what to change."""


class Task(ABC):
    """One task.

    Attributes:
        name: as `--tasks` takes it.
        summary: one line.
        answer_tokens: how many tokens an answer may have.
        has_depth: whether what is asked for lies at one place, which can be chosen.
    """

    name: str
    summary: str
    answer_tokens: int
    has_depth: bool = False

    @abstractmethod
    def draw(self, rng: random.Random, source: Source, room: Room, depth: float) -> Draft:
        """One example's text.

        Args:
            room: what a context may hold.
            depth: where what is asked for lies, 0 (start) to 1 (end of the context); only with has_depth.

        Raises:
            TaskError: it does not fit.
        """

    def example(self, source: Source, length: int, depth: float, seed: str) -> Example:
        """The example of a seed, context and question together `length` tokens or, where the task has no prose to fill
        the room with, a few fewer.

        Raises:
            TaskError: `length` is too small for the task.
        """
        room = Room(self.name, source, length)
        draft = self.draw(random.Random(f"{self.name} {seed}"), source, room, depth)
        return room.example(draft)


@dataclass(frozen=True)
class Draft:
    """What a task wrote: token ids of the body of its context, question and answers as text."""

    intro: str
    body: list[int]
    question: str
    answer_start: str
    answers: list[str]


class Room:
    """A prompt of at most `length` tokens."""

    def __init__(self, task: str, source: Source, length: int) -> None:
        self.task, self.source, self.length = task, source, length

    def tokens(self, intro: str, question: str, answer_start: str) -> int:
        """Tokens left for the body; a task checks that they are enough."""
        head, tail = self._frame(intro, question, answer_start)
        return self.length - len(head) - len(tail)

    def check(self, left: int, needed: int) -> None:
        """Refuse a body of which parts need `needed` of the `left` tokens.

        Raises:
            TaskError: they need more.
        """
        if needed > left:
            least = self.length - left + needed
            raise TaskError(
                f"task {self.task} needs a length of at least {least} tokens, got {self.length}; raise --lengths"
            )

    def example(self, draft: Draft) -> Example:
        """The draft with the chat template around it."""
        head, tail = self._frame(draft.intro, draft.question, draft.answer_start)
        return Example([*head, *draft.body], tail, draft.answers)

    def _frame(self, intro: str, question: str, answer_start: str) -> tuple[list[int], list[int]]:
        chat, encode = self.source.chat, self.source.encode
        start = [] if chat.head else self.source.start
        return [*start, *encode(f"{chat.head}{intro}\n\n")], encode(f"\n\n{question}{chat.tail}{answer_start}")


def spread(rng: random.Random, sentences: list[list[int]], parts: Sequence[list[int]]) -> list[int]:
    """`parts` in their order at random places between the sentences."""
    places = sorted(rng.randrange(len(sentences) + 1) for _ in parts)
    return place(sentences, parts, places)


def place(sentences: list[list[int]], parts: Sequence[list[int]], places: Sequence[int]) -> list[int]:
    """One list of tokens: parts[i] before sentence places[i]; places ascend."""
    body, following = [], list(zip(places, parts, strict=True))
    for index in range(len(sentences) + 1):
        while following and following[0][0] == index:
            body += following.pop(0)[1]
        body += sentences[index] if index < len(sentences) else []
    return body


def score(answer: str, expected: Sequence[str]) -> float:
    """The share of expected strings that the answer contains, letter case and commas in numbers aside (RULER's string
    match over all references)."""
    found = answer.lower().replace(",", "")
    return sum(one.lower() in found for one in expected) / len(expected)
