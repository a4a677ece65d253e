"""What prompts are made of: the tokenizer, its chat template, and prose to hide things in."""

from __future__ import annotations

import random
import re
from typing import Any, NamedTuple

from kvserve.measuring.tokenizer import start_of
from kvserve.prose import clean, shuffled_prose

PACKAGED_SENTENCES = 2000
_MARKER = "KVSERVE-CONTEXT"


class Chat(NamedTuple):
    """The chat template of one user message, without the message."""

    head: str
    tail: str


class Source:
    """Tokens of prose and of prompts.

    Args:
        tokenizer: a transformers tokenizer.
        text: prose; None: the packaged sentences (see kvserve/prose.py), shuffled with a fixed seed.

    Attributes:
        start: the token that the tokenizer puts before every text, if it does; a chat template brings its own.
    """

    def __init__(self, tokenizer: Any, text: str | None = None) -> None:
        self.tokenizer = tokenizer
        prose = clean(text) if text is not None else shuffled_prose(0, PACKAGED_SENTENCES)
        sentences = [" " + sentence for sentence in re.split(r"(?<=[.!?])\s+", " ".join(prose.split())) if sentence]
        self._sentences: list[list[int]] = tokenizer(sentences, add_special_tokens=False, verbose=False).input_ids
        self.chat = self._chat()
        self.start = start_of(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def prose(self, rng: random.Random, num_tokens: int) -> list[list[int]]:
        """Consecutive sentences from a random place, `num_tokens` tokens together; the last one may be cut short."""
        start, found, missing = rng.randrange(len(self._sentences)), [], num_tokens
        while missing > 0:
            sentence = self._sentences[start % len(self._sentences)][:missing]
            found.append(sentence)
            missing -= len(sentence)
            start += 1
        return found

    def _chat(self) -> Chat:
        if not getattr(self.tokenizer, "chat_template", None):
            return Chat("", "\n")
        message = [{"role": "user", "content": _MARKER}]
        chat = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        head, _, tail = chat.partition(_MARKER)
        return Chat(head, tail)
