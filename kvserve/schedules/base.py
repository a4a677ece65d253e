"""What a schedule is: at which lengths a sequence is compressed.

Everything here is arithmetic on lengths, so that the scheduler knows ahead of the worker what a request will hold.
Tokens per head means the average over the KV heads of all layers.

A compression point is a length at which the sequence is cut down to what its limit allows; in between, each new token
is one more. So a request of a given prompt and length holds

    kept_at(last point) + (length - last point)

tokens per head, however it was cut into steps: in chunks, token by token, or all at once after a preemption. Steps that
end at every point on the way (`tokens_to_next_point`) also choose the tokens from the same data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field


@dataclass(frozen=True)
class Limit:
    """How much of a sequence to keep; a request may bring its own. Exactly one of the two limits is given.

    Attributes:
        rate: keep one of `rate` tokens; 1 keeps all.
        max_tokens: keep this many tokens per head.
        protected: sinks and recent tokens; a sequence is not cut below them.
    """

    rate: float | None = None
    max_tokens: int | None = None
    protected: int = 0

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.max_tokens is None):
            raise ValueError("give either a compression rate or a maximum of cached tokens")
        if self.rate is not None and not 1 <= self.rate < float("inf"):
            raise ValueError(f"the compression rate must be at least 1, got {self.rate}")
        if self.protected < 0:
            raise ValueError(f"the number of protected tokens must not be negative, got {self.protected}")
        if self.max_tokens is not None and self.max_tokens < max(self.protected, 1):
            raise ValueError(
                f"the maximum of {self.max_tokens} cached tokens does not hold the {self.protected} protected"
            )

    def target(self, length: int) -> int:
        """Tokens per head that a sequence of this length is cut down to.

        It grows with the length, by at most one per token.
        """
        limit = self.max_tokens if self.rate is None else ceil(length / self.rate)
        assert limit is not None
        return min(length, max(limit, self.protected))

    def first_evicting(self, count: int, max_len: int) -> int:
        """The first length that is `count` tokens, one at least, above its target; max_len + 1 if there is none."""
        if self.rate is None:
            return min(self.target(max_len + 1) + count, max_len + 1)
        length = max_len + 1
        if count * self.rate <= length * (self.rate - 1):
            length = ceil(count * self.rate / (self.rate - 1))
        length = max(length, count + self.protected)
        while length <= max_len and length - self.target(length) < count:  # the division rounds
            length += 1
        while length - 1 - self.target(length - 1) >= count:
            length -= 1
        return min(length, max_len + 1)


class Schedule(BaseModel, ABC):
    """Parameters of one way to time compression; subclasses add a `name` that YAML files use.

    Attributes:
        chunk_tokens: compress also within the prompt, at each multiple of this many tokens, so that the memory that a
            long prompt needs is bounded; 0: not before its end.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    chunk_tokens: Annotated[int, Field(ge=0, le=2**20)] = 0

    #: Whether the schedule only makes sense with Limit.max_tokens.
    needs_max_tokens: ClassVar[bool] = False
    #: Whether it has compression points behind the prompt.
    decodes: ClassVar[bool] = True

    @property
    def repeats(self) -> bool:
        """Whether a sequence may be cut more than once."""
        return self.decodes or self.chunk_tokens > 0

    def held_tokens(self, limit: Limit, prompt_len: int, num_computed_tokens: int) -> int:
        """Tokens per head after the step that brought the sequence to `num_computed_tokens`."""
        point = self.last_point(limit, prompt_len, num_computed_tokens)
        return self.kept_at(limit, point) + num_computed_tokens - point

    def peak_tokens(self, limit: Limit, prompt_len: int, num_computed_tokens: int, num_new_tokens: int) -> int:
        """Tokens per head during the step, before it compresses."""
        return self.held_tokens(limit, prompt_len, num_computed_tokens) + num_new_tokens

    def compress_now(self, limit: Limit, prompt_len: int, num_computed_tokens: int, num_new_tokens: int) -> bool:
        """Whether the step ends by cutting the sequence down, to held_tokens of its new length."""
        after = self.held_tokens(limit, prompt_len, num_computed_tokens + num_new_tokens)
        return self.peak_tokens(limit, prompt_len, num_computed_tokens, num_new_tokens) > after

    def last_point(self, limit: Limit, prompt_len: int, length: int) -> int:
        """The last compression point at or before `length`; 0 if there is none."""
        first, interval = self._decode_points(limit, prompt_len)
        if interval and length >= first:
            return length - (length - first) % interval
        chunk = self.chunk_tokens or prompt_len
        point = prompt_len if length >= prompt_len else length - length % chunk
        return point if point > self._exempt(limit) else 0

    def tokens_to_next_point(self, limit: Limit, prompt_len: int, num_computed_tokens: int) -> int | None:
        """New tokens after which the next compression point is reached; None if there will be none."""
        length, exempt = num_computed_tokens, self._exempt(limit)
        if length < prompt_len and prompt_len > exempt:
            chunk = self.chunk_tokens or prompt_len
            following = (max(length, exempt) // chunk + 1) * chunk
            return min(following, prompt_len) - length
        first, interval = self._decode_points(limit, prompt_len)
        if not interval:
            return None
        return first - length if length < first else interval - (length - first) % interval

    def kept_at(self, limit: Limit, point: int) -> int:
        """Tokens per head right after compression at a point."""
        return limit.target(point)

    def first_evicting(self, limit: Limit, count: int, max_len: int) -> int:
        """The first length of which a cut leaves `count` tokens, one at least, less; max_len + 1 if there is none."""
        return limit.first_evicting(count, max_len)

    def prompts_at(self, limit: Limit, lengths: Iterable[int]) -> set[int]:
        """Prompt lengths at which the last point of the prompt, or the one behind it, reaches a new one of `lengths`.

        Some may be no lengths of a prompt. Prompts that are too short to have a point count as one.
        """
        reached = {self._exempt(limit) + 1, *lengths}
        _, interval = self._decode_points(limit, self._exempt(limit) + 1)
        return reached | {length - interval for length in reached}

    def _exempt(self, limit: Limit) -> int:
        """Prompt lengths up to this are no compression points."""
        return 0

    @abstractmethod
    def _decode_points(self, limit: Limit, prompt_len: int) -> tuple[int, int]:
        """The first point after the prompt and the distance of the following ones; (0, 0) if there are none."""
