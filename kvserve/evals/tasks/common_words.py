"""Common words: a long numbered list in which ten words come up to ten times as often as others."""

from __future__ import annotations

import random

from kvserve.evals.source import Source
from kvserve.evals.tasks.base import Draft, Room, Task
from kvserve.evals.tasks.words import NOUNS

_NUM_COMMON = 10
_RATIO = 10  # RULER: 30 times against 3; 10 against 1, or fewer, where the list is short
_FEWEST = 3  # times that a common word comes at least


class CommonWords(Task):
    """The ten words that come most often."""

    name = "common-words"
    summary = f"the {_NUM_COMMON} most common words of a list"
    answer_tokens = 48

    def draw(self, rng: random.Random, source: Source, room: Room, depth: float) -> Draft:
        intro = "This is a numbered list of words. Some of them come again and again."
        question = f"What are the {_NUM_COMMON} most common words in the list?"
        start = f"The {_NUM_COMMON} most common words are"
        left = room.tokens(intro, question, start)
        words = rng.sample(NOUNS, len(NOUNS))
        fewest = _NUM_COMMON * (_FEWEST + 1)
        room.check(left, len(source.encode(_listed(_entries(words, fewest)))))
        num_entries = max(fewest, left // 4)  # a number, a dot, a word and the end of its line
        body = source.encode(_listed(_shuffled(rng, _entries(words, num_entries))))
        while len(body) > left and num_entries > fewest:
            num_entries = max(fewest, min(num_entries - 1, num_entries * left // len(body)))
            body = source.encode(_listed(_shuffled(rng, _entries(words, num_entries))))
        return Draft(intro, body, question, start, words[:_NUM_COMMON])


def _entries(words: list[str], count: int) -> list[str]:
    """`count` entries; words[:_NUM_COMMON] are the common ones. The others come once, or a tenth as often."""
    common, others = words[:_NUM_COMMON], words[_NUM_COMMON:]
    proportional = count * _RATIO // (_NUM_COMMON * _RATIO + len(others))
    times = min(max(_RATIO, proportional), count // _NUM_COMMON - 1)
    return [*common * times, *(others[index % len(others)] for index in range(count - times * _NUM_COMMON))]


def _shuffled(rng: random.Random, entries: list[str]) -> list[str]:
    return rng.sample(entries, len(entries))


def _listed(entries: list[str]) -> str:
    return "".join(f"{number}. {word}\n" for number, word in enumerate(entries, 1))
