"""Teacher forcing inside the engine: the next tokens of a request are given, and what the model thought is recorded.

The tokens behind a prompt are decoded one at a time, so that every distribution comes from the cache as it is served:
paged, filled in chunks, quantised and evicted.

Seams: `LogitsProcessor` and `process_dict_updates` of vllm.v1.sample.logits_processor, `SamplingParams.extra_args`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

PROCESSOR = "kvserve.evals.forcing:ForcedTokens"  # as vLLM's `logits_processors` names it
FORCED, RECORD = "forced_token_ids", "record_path"


class ForcedTokens(LogitsProcessor):
    """Reads two of a request's extra_args.

    `forced_token_ids` are its first output tokens, whatever the model prefers; behind them it generates freely.
    `record_path` is a .npy file that receives the log-softmax before each forced token, [tokens, vocabulary] float32.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, _Request] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse what cannot be followed.

        Raises:
            ValueError: which argument, and what it takes.
        """
        extra = sampling_params.extra_args or {}
        forced = extra.get(FORCED, [])
        if not isinstance(forced, list) or not all(type(token) is int and token >= 0 for token in forced):
            raise ValueError(f"{FORCED} must be a list of token ids")
        if RECORD in extra and not forced:
            raise ValueError(f"{RECORD} needs {FORCED}: only forced tokens are recorded")

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, _Request.of)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, request in self._rows.items():
            request.apply(logits[row])
        return logits


class _Request:
    """One row of the batch.

    Args:
        output: the request's output tokens, a list that grows with it. A step that computes only a part of the prompt
            also asks for logits, and adds no token: the next step writes over its record.
    """

    def __init__(self, forced: Sequence[int], record: Path | None, output: Sequence[int]) -> None:
        self.forced, self.record, self.output = forced, record, output

    @classmethod
    def of(cls, params: Any, prompt: list[int] | None, output: list[int]) -> _Request | None:
        extra = params.extra_args or {}
        if not extra.get(FORCED):
            return None
        return cls(extra[FORCED], Path(extra[RECORD]) if RECORD in extra else None, output)

    def apply(self, logits: torch.Tensor) -> None:
        """Record and overwrite the logits of one row, [vocabulary]."""
        step = len(self.output)
        if step >= len(self.forced):
            return
        if self.record is not None:
            self._write(step, logits.log_softmax(-1, dtype=torch.float32).cpu().numpy())
        logits.fill_(-float("inf"))
        logits[self.forced[step]] = 0.0

    def _write(self, step: int, logprobs: np.ndarray) -> None:
        assert self.record is not None
        exists = self.record.exists()  # also after a preemption, which makes a new _Request
        shape = (len(self.forced), len(logprobs))
        rows = np.lib.format.open_memmap(
            self.record, "r+" if exists else "w+", dtype=None if exists else np.float32, shape=None if exists else shape
        )
        rows[step] = logprobs
