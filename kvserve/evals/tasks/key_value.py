"""Key-value look-up: one value out of a JSON object of random strings (Liu et al., arXiv 2307.03172, section 3)."""

from __future__ import annotations

import random

from kvserve.evals.source import Source
from kvserve.evals.tasks.base import Draft, Room, Task

_HEX_DIGITS = 8  # the paper has UUIDs of 32, which would leave room for 15 pairs in 1,024 tokens


class KeyValue(Task):
    """The value of one key."""

    name = "key-value"
    summary = "the value of one key in a JSON object of random keys and values"
    answer_tokens = 20
    has_depth = True

    def draw(self, rng: random.Random, source: Source, room: Room, depth: float) -> Draft:
        intro = "This JSON object has random keys and values."
        key, value = _word(rng), _word(rng)
        question, start = f'What is the value of the key "{key}"?', f'The value of the key "{key}" is "'
        left = room.tokens(intro, question, start)
        asked = source.encode(f' "{key}": "{value}",\n')
        opening, closing = source.encode("{\n"), source.encode("}")
        room.check(left, len(asked) + len(opening) + len(closing))
        left -= len(opening) + len(closing)
        pairs, total = [asked], len(asked)
        while True:
            pair = source.encode(f' "{_word(rng)}": "{_word(rng)}",\n')
            if total + len(pair) > left:
                break
            pairs.append(pair)
            total += len(pair)
        pairs.insert(round(depth * (len(pairs) - 1)), pairs.pop(0))
        body = [token for pair in pairs for token in pair]
        return Draft(intro, [*opening, *body, *closing], question, start, [value])


def _word(rng: random.Random) -> str:
    return f"{rng.getrandbits(4 * _HEX_DIGITS):0{_HEX_DIGITS}x}"
