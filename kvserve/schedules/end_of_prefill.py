"""Once, when the prompt is processed."""

from __future__ import annotations

from typing import ClassVar, Literal

from kvserve.schedules.base import Limit, Schedule


class EndOfPrefill(Schedule):
    """Compress the prompt and keep every generated token (SnapKV, arXiv 2404.14469, and most others)."""

    decodes: ClassVar[bool] = False

    name: Literal["end-of-prefill"] = "end-of-prefill"

    def _decode_points(self, limit: Limit, prompt_len: int) -> tuple[int, int]:
        return 0, 0
