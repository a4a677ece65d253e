"""The rotary embedding of the model that this worker runs.

Seam: `vllm.model_executor.layers.rotary_embedding._ROPE_DICT`, where vLLM keeps every embedding it made for a model,
and `RotaryEmbeddingBase._compute_inv_freq`.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.llama3_rope import Llama3RotaryEmbedding

from kvserve.checks import UnsupportedError
from kvserve.scorers.rotary import Rotary


def model_rotary(device: torch.device) -> Rotary:
    """The one embedding of all layers, for queries on `device`.

    Raises:
        UnsupportedError: layers differ, or the embedding is of a kind whose angles are not known to be a multiple of
            the position.
    """
    embeddings = list({id(rope): rope for rope in _ROPE_DICT.values()}.values())
    kinds = sorted({type(rope).__name__ for rope in embeddings})
    if len(embeddings) != 1 or type(embeddings[0]) not in (RotaryEmbedding, Llama3RotaryEmbedding):
        raise UnsupportedError(
            f"expected-attention needs one plain rotary embedding for all layers, the model has {kinds or 'none'}; "
            "choose another policy"
        )
    (rope,) = embeddings
    return Rotary(rope._compute_inv_freq(rope.base).float().to(device), interleaved=not rope.is_neox_style)
