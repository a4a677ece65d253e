"""Scores the heads of a model on a prompt that repeats itself, in a vLLM engine in a child process.

Seams: those of kvserve/calibrate/engine.py.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from kvserve.arguments.model_folder import read_model_config
from kvserve.calibrate.collect import Reading
from kvserve.calibration.artefact import Cache, CalibrationError
from kvserve.calibration.head_scores import HeadScores
from kvserve.calibration.methods.razor import Razor
from kvserve.checks import text_config
from kvserve.measuring.engines import Engine, EngineConfig, EngineHost
from kvserve.measuring.tokenizer import load_tokenizer, start_of

HOST = "kvserve.calibrate.heads:HeadHost"
_UNKNOWN_CONTEXT = 2048  # of models that do not say how much they can read


class HeadHost(EngineHost):
    """The child's side: an engine of the policy `none` that scores the heads of its layers."""

    def __init__(self, name: str, config: EngineConfig) -> None:
        from kvserve.engine.head_worker import EXTENSION_PATH

        super().__init__(name, config, worker_extension_cls=EXTENSION_PATH)

    def scores(self, tokens: list[int], prompt: list[int]) -> list[dict[int, Any]]:
        """What every rank has found (`kvserve.engine.head_worker.Found`).

        Args:
            prompt: a `Repeats`.

        Raises:
            RuntimeError: some layers of the model are not kvserve's.
        """
        for reason in filter(None, self.llm.collective_rpc("kvserve_heads_start", args=(prompt,))):
            raise RuntimeError(reason)
        text: Any = {"prompt_token_ids": tokens}
        self.llm.generate([text], self._params(1, ignore_eos=True, reuse_prefixes=False), use_tqdm=False)
        found: list[dict[int, Any]] = self.llm.collective_rpc("kvserve_heads_finish")
        return found


def prompt_of(reading: Reading, method: Razor) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and the numbers of its `Repeats`.

    Raises:
        CalibrationError: the model cannot read so much.
    """
    tokenizer, config = load_tokenizer(reading.model), text_config(read_model_config(reading.model) or {})
    longest = (config.get("max_position_embeddings") or _UNKNOWN_CONTEXT) - 1
    special = set(tokenizer.all_special_ids)
    size = min(len(tokenizer), config.get("vocab_size") or len(tokenizer))
    vocabulary = [token for token in range(size) if token not in special]
    try:
        tokens, prompt = method.prompt(vocabulary, start_of(tokenizer), longest, reading.seed)
    except ValueError as error:
        raise CalibrationError(f"{method.name}: {error}") from None
    return tokens, list(prompt)


def head_tensors(reading: Reading, method: Razor, tokens: list[int], prompt: list[int]) -> dict[str, torch.Tensor]:
    """The tables of a method that looks at heads, by the name that they have in the file.

    Raises:
        CalibrationError: not every head was seen.
        ChildError: the model could not be loaded or run.
    """
    config = EngineConfig(
        reading.model, reading.shape, reading.dtype, len(tokens) + 1, reading.seed,
        scheduler_options={"max_num_seqs": 1, "max_num_batched_tokens": len(tokens) + 1},
    )  # fmt: skip
    with Engine("none", config, HOST) as engine:
        found = engine.call("scores", tokens=tokens, prompt=prompt)
    tables = method.choose(joined(found, reading.cache, reading.shape.query_group), reading.cache.num_kv_heads)
    return {f"layers.{layer}.{name}": row for name, table in tables.items() for layer, row in enumerate(table)}


def joined(found: list[dict[int, Any]], cache: Cache, group: int) -> HeadScores:
    """The scores of all query heads, [layers, heads], from those of every rank.

    Raises:
        CalibrationError: some are missing, or are no numbers.
    """
    scores = torch.full((2, cache.num_layers, cache.num_kv_heads * group), torch.nan)
    for of_rank in found:
        for layer, (first_head, *parts) in of_rank.items():
            own = torch.tensor(parts)
            scores[:, layer, first_head * group :][:, : own.shape[1]] = own
    if not scores.isfinite().all():
        raise CalibrationError(
            f"the model has not shown the attention of all heads of its {cache.num_layers} layers as numbers, so it "
            "cannot be calibrated"
        )
    return HeadScores(*scores)


def digest_of(tokens: list[int]) -> str:
    """A hash of a prompt."""
    return hashlib.sha256(" ".join(map(str, tokens)).encode()).hexdigest()
