"""When the prompt is processed, and then at regular distances."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kvserve.schedules.base import Limit, Schedule


class EveryN(Schedule):
    """Compress the prompt, and again after every `interval` generated tokens (KV-Compress' continual compression).

    After any step of the decode the sequence holds less than limit.target(length) + interval tokens per head.
    """

    name: Literal["every-n"] = "every-n"
    interval: Annotated[int, Field(ge=1, le=2**20)] = 64

    def _decode_points(self, limit: Limit, prompt_len: int) -> tuple[int, int]:
        return prompt_len + self.interval, self.interval
