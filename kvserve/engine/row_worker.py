"""Writes the rows that a worker's attention layers get into files, for calibration (kvserve/calibration/rows.py).

Seams: those of kvserve/engine/probe_worker.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvserve.attention.base import Batch
from kvserve.calibration.rows import RowWriter, write_rotary
from kvserve.engine.backend import KvserveImpl
from kvserve.engine.own_layers import check_own_layers
from kvserve.engine.probe_worker import owners
from kvserve.engine.rotary import NoRotaryError, rotary_table
from kvserve.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

EXTENSION_PATH = "kvserve.engine.row_worker.RowWorker"


class RowRecorder:
    """Takes the place of a probe at one layer."""

    def __init__(self, writer: RowWriter) -> None:
        self.writer = writer
        self.num_tokens = 0

    def observe(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor, cells: torch.Tensor,
        batch: Batch,
    ) -> None:  # fmt: skip
        """Note the rows of a step of one request."""
        assert batch.num_reqs == 1, "requests have to run alone"
        self.writer.put("key", self.num_tokens, key)
        self.writer.put("value", self.num_tokens, value)
        self.num_tokens += len(key)


class RowWorker:
    """Mixed into vLLM's worker class."""

    vllm_config: VllmConfig

    def kvserve_rows_start(self, folder: str, num_tokens: int) -> str | None:
        """Write the rows of the next `num_tokens` tokens; why that cannot be, or None."""
        try:
            check_own_layers(self.vllm_config, KvserveImpl)
        except UnsupportedError as error:
            return str(error)
        for layer, impl in owners(self.vllm_config):
            writer = RowWriter(Path(folder), layer, num_tokens, impl.attention.spec.first_head)
            impl.probe = RowRecorder(writer)
        return None

    def kvserve_rows_finish(self, folder: str, segment: int) -> dict[str, Any]:
        """The tokens that every layer has seen, and why there is no rotary embedding; one that is there is written.

        Args:
            segment: positions that were read.
        """
        seen: set[int] = set()
        for _, impl in owners(self.vllm_config):
            recorder, impl.probe = impl.probe, None
            assert isinstance(recorder, RowRecorder), "kvserve_rows_start comes first"
            seen.add(recorder.num_tokens)
        try:
            write_rotary(Path(folder), rotary_table(self.vllm_config.model_config, segment))
        except NoRotaryError as error:
            return {"seen": sorted(seen), "no_rotary": error.reason}
        return {"seen": sorted(seen), "no_rotary": ""}
