"""The prompts that evicting policies are measured on: needles in prose, and texts with their continuation.

They are plain token ids, so that another implementation can be measured on the same ones.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict, dataclass
from typing import Any

from kvserve.prose import Prose

TILE_TOKENS = 64  # lengths differ by up to a tile, so that the unfinished one is no constant help


@dataclass(frozen=True)
class Question:
    """A prompt whose greedy answer must contain the digits `answer`."""

    tokens: list[int]
    answer: str


@dataclass(frozen=True)
class Continued:
    """A text and what follows it."""

    tokens: list[int]
    continuation: list[int]


@dataclass(frozen=True)
class PromptSet:
    """Everything one run measures.

    Attributes:
        seed: of lengths, numbers and places in the text.
        end_tokens: ids that end an answer.
    """

    seed: int
    end_tokens: list[int]
    questions: list[Question]
    texts: list[Continued]

    @classmethod
    def draw(
        cls, tokenizer: Any, text: str | None, seed: int, longest: int, needles: int, windows: int, continuation: int
    ) -> PromptSet:
        """Needles at even depths and disjoint windows, each of `longest` tokens or up to 63 fewer.

        More windows begin with the ones of fewer.
        """
        rng, prose = random.Random(seed), Prose(tokenizer, text, seed)
        questions = []
        for index in range(needles):
            needle = prose.needle(longest - rng.randrange(TILE_TOKENS), (index + 0.5) / needles)
            questions.append(Question(needle.tokens, needle.answer))
        texts = []
        for tokens in prose.disjoint(longest + continuation, windows):
            length = longest - rng.randrange(TILE_TOKENS)
            texts.append(Continued(tokens[:length], tokens[length : length + continuation]))
        return cls(seed, [tokenizer.eos_token_id], questions, texts)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> PromptSet:
        """The inverse of `to_json`."""
        questions = [Question(**question) for question in content["questions"]]
        return cls(content["seed"], content["end_tokens"], questions, [Continued(**text) for text in content["texts"]])

    def digests(self) -> dict[str, str]:
        """SHA-256 of the questions and of the texts: what ties records of other implementations to ours."""
        content = self.to_json()
        return {kind: hashlib.sha256(json.dumps(content[kind]).encode()).hexdigest() for kind in ("questions", "texts")}

    def to_json(self) -> dict[str, Any]:
        """Plain lists, for a file."""
        return asdict(self)
