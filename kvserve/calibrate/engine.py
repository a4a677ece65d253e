"""Collects rows from a vLLM engine in a child process: whatever vLLM serves can be calibrated.

Seams: those of kvserve/measuring/engines.py, and `LLM(worker_extension_cls=...)`, `LLM.collective_rpc`.
"""

from __future__ import annotations

from typing import Any

from kvserve.measuring.engines import EngineConfig, EngineHost

HOST = "kvserve.calibrate.engine:RowHost"


class RowHost(EngineHost):
    """The child's side: an engine of the policy `none`, whose layers write down the rows that they get."""

    def __init__(self, name: str, config: EngineConfig) -> None:
        from kvserve.engine.row_worker import EXTENSION_PATH

        super().__init__(name, config, worker_extension_cls=EXTENSION_PATH)

    def start(self, folder: str, num_tokens: int) -> None:
        """Write the rows of the next `num_tokens` tokens into a folder.

        Raises:
            RuntimeError: some layers of the model are not kvserve's.
        """
        for reason in filter(None, self.llm.collective_rpc("kvserve_rows_start", args=(folder, num_tokens))):
            raise RuntimeError(reason)

    def read(self, tokens: list[int]) -> None:
        """Read one part of the text."""
        prompt: Any = {"prompt_token_ids": tokens}
        self.llm.generate([prompt], self._params(1, ignore_eos=True, reuse_prefixes=False), use_tqdm=False)

    def finish(self, folder: str, segment: int) -> dict[str, Any]:
        """What the worker with the first heads says about the rows and the rotary embedding."""
        found: dict[str, Any] = self.llm.collective_rpc("kvserve_rows_finish", args=(folder, segment))[0]
        return found
