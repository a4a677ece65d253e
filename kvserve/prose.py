"""Prompts of real prose: slices of a given text, or of the sentences below (all from books in the public domain)."""

from __future__ import annotations

import random
import re
from typing import Any, NamedTuple

# Melville, Austen, Dickens, Darwin, Carroll, Conan Doyle, Shelley, Stevenson, Wells, Thoreau.
SENTENCES = (
    "Call me Ishmael.",
    "Some years ago, never mind how long precisely, having little or no money in my purse, and nothing particular to "
    "interest me on shore, I thought I would sail about a little and see the watery part of the world.",
    "Whenever I find myself growing grim about the mouth; whenever it is a damp, drizzly November in my soul, then I "
    "account it high time to get to sea as soon as I can.",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife.",
    "However little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth "
    "is so well fixed in the minds of the surrounding families, that he is considered the rightful property of some "
    "one or other of their daughters.",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.",
    "There were a king with a large jaw and a queen with a plain face, on the throne of England; there were a king "
    "with a large jaw and a queen with a fair face, on the throne of France.",
    "When on board the Beagle, as naturalist, I was much struck with certain facts in the distribution of the "
    "inhabitants of South America.",
    "It is interesting to contemplate an entangled bank, clothed with many plants of many kinds, with birds singing on "
    "the bushes, with various insects flitting about, and with worms crawling through the damp earth.",
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do.",
    "Once or twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it.",
    "The rabbit-hole went straight on like a tunnel for some way, and then dipped suddenly down.",
    "To Sherlock Holmes she is always the woman; I have seldom heard him mention her under any other name.",
    "You see, but you do not observe; the distinction is clear.",
    "It is a capital mistake to theorise before one has data.",
    "It was on a dreary night of November that I beheld the accomplishment of my toils.",
    "It was already one in the morning; the rain pattered dismally against the panes, and my candle was nearly burnt "
    "out.",
    "I remember him as if it were yesterday, as he came plodding to the inn door, his sea-chest following behind him "
    "in a hand-barrow.",
    "No one would have believed in the last years of the nineteenth century that this world was being watched keenly "
    "and closely by intelligences greater than man's and yet as mortal as his own.",
    "I went to the woods because I wished to live deliberately, to front only the essential facts of life, and see if "
    "I could not learn what it had to teach.",
    "The mass of men lead lives of quiet desperation.",
    "Time is but the stream I go a-fishing in; I drink at it, but while I drink I see the sandy bottom and detect how "
    "shallow it is.",
    "The Time Traveller, for so it will be convenient to speak of him, was expounding a recondite matter to us.",
    "Marley was dead, to begin with; there is no doubt whatever about that.",
)
QUESTION = "What is the secret number? Answer with the number only."


class NeedlePrompt(NamedTuple):
    """A chat prompt and the digits its answer must contain; `position` is the needle's first token in the prompt."""

    tokens: list[int]
    answer: str
    position: int


def shuffled_prose(seed: int, num_sentences: int) -> str:
    """Sentences drawn at random, as continuous text."""
    rng = random.Random(seed)
    return " ".join(rng.choice(SENTENCES) for _ in range(num_sentences))


def clean(text: str) -> str:
    """Undo the tokenisation marks of the WikiText files, so that it reads as prose; other texts stay as they are."""
    text = re.sub(r" @(.)@ ", r"\1", text.replace("<unk>", "Smith"))
    text = re.sub(r" ([.,;:!?)])", r"\1", text)
    return re.sub(r" 's\b", "'s", text)


class Prose:
    """An endless supply of token slices.

    Args:
        tokenizer: a transformers tokenizer.
        text: where slices come from; None: the sentences above, shuffled.
    """

    def __init__(self, tokenizer: Any, text: str | None, seed: int) -> None:
        self.tokenizer = tokenizer
        self._tokens = self.encode(shuffled_prose(seed, 2000) if text is None else clean(text))
        self._seed, self._random = seed, random.Random(seed)

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def slice(self, num_tokens: int) -> list[int]:
        """`num_tokens` consecutive tokens from a random place, wrapped around at the end of the text."""
        start = self._random.randrange(len(self._tokens))
        found = self._tokens[start : start + num_tokens]
        while len(found) < num_tokens:
            found += self._tokens[: num_tokens - len(found)]
        return found

    def disjoint(self, num_tokens: int, count: int) -> list[list[int]]:
        """`count` slices of `num_tokens` tokens, no two of which overlap; fewer of them are the first of more.

        Raises:
            ValueError: the text is too short.
        """
        places = len(self._tokens) // num_tokens
        if count > places:
            raise ValueError(f"{count} disjoint slices of {num_tokens} tokens need a longer text: it has {places}")
        starts = [place * num_tokens for place in random.Random(self._seed).sample(range(places), places)]
        return [self._tokens[start : start + num_tokens] for start in starts[:count]]

    def needle(self, num_tokens: int, depth: float) -> NeedlePrompt:
        """A chat prompt of `num_tokens` tokens with one sentence to be found at `depth` (0: start, 1: end)."""
        answer = str(self._random.randrange(1_000_000, 10_000_000))
        needle = self.encode(f" The secret number is {answer}. Remember it.")
        marker = "KVSERVE-HAYSTACK"
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{marker}\n\n{QUESTION}"}], tokenize=False, add_generation_prompt=True
        )
        before, _, after = chat.partition(marker)
        head, tail = self.encode(before), self.encode(after)
        room = num_tokens - len(head) - len(tail) - len(needle)
        if room < 0:
            raise ValueError(f"a needle prompt needs {num_tokens - room} tokens, got {num_tokens}")
        hay = self.slice(room)
        split = round(depth * room)
        return NeedlePrompt([*head, *hay[:split], *needle, *hay[split:], *tail], answer, len(head) + split)
