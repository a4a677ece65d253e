"""Scores the heads of a worker while they read a prompt, for calibration (kvserve/calibration/head_scores.py).

Seams: those of kvserve/engine/probe_worker.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvserve.attention.base import Batch, LayerSpec
from kvserve.calibration.head_scores import HeadScores, Repeats, head_scores
from kvserve.engine.backend import KvserveImpl
from kvserve.engine.own_layers import check_own_layers
from kvserve.engine.probe_worker import owners
from kvserve.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

EXTENSION_PATH = "kvserve.engine.head_worker.HeadWorker"

# Per layer: first KV head of the rank, echo and induction scores of its query heads.
Found = dict[int, tuple[int, list[float], list[float]]]


class HeadRecorder:
    """Takes the place of a probe at one layer; sees one step, that of the whole prompt."""

    def __init__(self, spec: LayerSpec, prompt: Repeats) -> None:
        self.spec, self.prompt = spec, prompt
        self.scores: HeadScores | None = None

    def observe(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor, cells: torch.Tensor,
        batch: Batch,
    ) -> None:  # fmt: skip
        """Score the heads."""
        assert self.scores is None and len(query) == self.prompt.num_tokens, "the prompt runs alone, in one step"
        self.scores = head_scores(query, key, self.spec, self.prompt)


class HeadWorker:
    """Mixed into vLLM's worker class."""

    vllm_config: VllmConfig

    def kvserve_heads_start(self, prompt: list[int]) -> str | None:
        """Score the heads on the next prompt, a `Repeats`; why that cannot be, or None."""
        try:
            check_own_layers(self.vllm_config, KvserveImpl)
        except UnsupportedError as error:
            return str(error)
        for _, impl in owners(self.vllm_config):
            impl.probe = HeadRecorder(impl.attention.spec, Repeats(*prompt))
        return None

    def kvserve_heads_finish(self) -> Found:
        """What was found of this rank's heads, by layer of the model."""
        found: Found = {}
        for layer, impl in owners(self.vllm_config):
            recorder, impl.probe = impl.probe, None
            assert isinstance(recorder, HeadRecorder) and recorder.scores is not None, "the prompt comes first"
            echo, induction = (part.tolist() for part in recorder.scores)
            found[layer] = (impl.attention.spec.first_head, echo, induction)
        return found
