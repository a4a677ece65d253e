"""Frequent words: made-up words with Zipf frequencies; which three come most often?"""

from __future__ import annotations

import random
import string

from kvserve.evals.source import Source
from kvserve.evals.tasks.base import Draft, Room, Task

_NUM_ASKED = 3
_NUM_WORDS = 40
_EXPONENT = 2.0  # RULER's default
_LETTERS = 6
_FEWEST = 80  # words; below, the fourth and the fifth rank come equally often
_NOISE = "..."  # stands for the most frequent word, which would be too easy


class FrequentWords(Task):
    """The three most frequent words."""

    name = "frequent-words"
    summary = f"the {_NUM_ASKED} most frequent of made-up words, their frequencies after Zipf"
    answer_tokens = 28

    def draw(self, rng: random.Random, source: Source, room: Room, depth: float) -> Draft:
        intro = f"This is a coded text. Ignore the dots ({_NOISE})."
        question = f"What are the {_NUM_ASKED} words that come most often in the coded text?"
        start = f"The {_NUM_ASKED} words that come most often are"
        left = room.tokens(intro, question, start)
        words = [_NOISE, *_made_up(rng)]
        tokens = [len(source.encode(f" {word}")) for word in words]
        room.check(left, _total(tokens, _counts(_FEWEST)))
        num_words = max(_FEWEST, left)
        while _total(tokens, _counts(num_words)) > left:
            num_words -= 1
        drawn = [word for word, count in zip(words, _counts(num_words), strict=True) for _ in range(count)]
        rng.shuffle(drawn)
        body = source.encode(" " + " ".join(drawn))
        return Draft(intro, body, question, start, words[1 : 1 + _NUM_ASKED])


def _counts(num_words: int) -> list[int]:
    """How often each rank comes: the expected numbers, so that no chance changes the order."""
    weights = [(rank + 1) ** -_EXPONENT for rank in range(_NUM_WORDS + 1)]
    return [int(num_words * weight / sum(weights)) for weight in weights]


def _total(tokens: list[int], counts: list[int]) -> int:
    return sum(one * count for one, count in zip(tokens, counts, strict=True))


def _made_up(rng: random.Random) -> list[str]:
    found: list[str] = []
    while len(found) < _NUM_WORDS:
        word = "".join(rng.choices(string.ascii_lowercase, k=_LETTERS))
        if word not in found:
            found.append(word)
    return found
