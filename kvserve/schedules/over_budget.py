"""Whenever the sequence outgrows its limit."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from kvserve.schedules.base import Limit, Schedule


class OverBudget(Schedule):
    """Compress as soon as a head would hold more than limit.max_tokens, down to room for `interval` tokens more.

    After any step of the decode the sequence holds at most max_tokens; a prompt that is no longer than that stays
    whole. With interval 1 each new token evicts one, as in H2O (arXiv 2306.14048) and TOVA (arXiv 2401.06104).
    """

    needs_max_tokens: ClassVar[bool] = True

    name: Literal["over-budget"] = "over-budget"
    interval: Annotated[int, Field(ge=1, le=2**20)] = 64

    def kept_at(self, limit: Limit, point: int) -> int:
        return min(point, self._exempt(limit) + 1 - self._interval(limit))

    def first_evicting(self, limit: Limit, count: int, max_len: int) -> int:
        return min(self.kept_at(limit, max_len + 1) + count, max_len + 1)

    def _exempt(self, limit: Limit) -> int:
        if limit.max_tokens is None:
            raise ValueError("schedule over-budget needs a maximum of cached tokens; with a rate, use every-n")
        return limit.max_tokens

    def _interval(self, limit: Limit) -> int:
        """What protected tokens leave of `interval`; at least 1."""
        return min(self.interval, self._exempt(limit) + 1 - max(limit.protected, 1))

    def _decode_points(self, limit: Limit, prompt_len: int) -> tuple[int, int]:
        exempt, interval = self._exempt(limit), self._interval(limit)
        return (prompt_len + interval if prompt_len > exempt else exempt + 1), interval
