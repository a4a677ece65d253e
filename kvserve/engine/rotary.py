"""The rotary embedding of the model that this worker runs.

Seams: `vllm.model_executor.layers.rotary_embedding._ROPE_DICT`, where vLLM keeps every embedding that a process made,
for this model or for one before it, and `RotaryEmbeddingBase._compute_inv_freq`. A model that vLLM runs through
transformers has transformers' own embedding (`ModelConfig.using_transformers_backend`): a class next to the model's,
which needs nothing but its config.
"""

from __future__ import annotations

import gc
import inspect
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.linear_scaling_rope import LinearScalingRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.llama3_rope import Llama3RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.yarn_scaling_rope import YaRNScalingRotaryEmbedding

from kvserve.checks import ROTARY_KINDS
from kvserve.errors import UnsupportedError
from kvserve.scorers.rotary import Rotary, RotaryTable

if TYPE_CHECKING:
    from vllm.config import ModelConfig


class NoRotaryError(UnsupportedError):
    """Queries and keys of this model cannot be turned back.

    Attributes:
        reason: what the model has instead.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            "expected-attention needs one rotary embedding for all layers, whose angles are a multiple of the "
            f"position; {reason}; choose another policy, for example snapkv"
        )


def model_rotary(model: ModelConfig, device: torch.device) -> Rotary:
    """The one embedding of all layers, for queries on `device`.

    A constant that an embedding multiplies queries with (YaRN) is left out: it stays in what is turned back, and in
    what is turned again.

    Raises:
        NoRotaryError: layers differ, or the embedding is of a kind whose angles are not known to be a multiple of
            the position.
    """
    if model.using_transformers_backend():
        rotary = transformers_rotary(model.hf_text_config)
        return Rotary(rotary.inverse_frequencies.to(device), rotary.interleaved)
    rope = _shared_embedding()
    return Rotary(_inverse_frequencies(rope).float().to(device), interleaved=not rope.is_neox_style)


def _shared_embedding() -> Any:
    """The embedding of all layers, in vLLM's own implementation of a model."""
    embeddings = list({id(rope): rope for rope in _ROPE_DICT.values()}.values())
    if len(embeddings) > 1:
        embeddings = _in_use(embeddings)
    if len(embeddings) != 1:
        kinds = ", ".join(sorted(type(rope).__name__ for rope in embeddings))
        raise NoRotaryError(f"the layers of this model have {kinds}" if kinds else "this model has none")
    return embeddings[0]


def _in_use(embeddings: list[Any]) -> list[Any]:
    """Those that a layer has; vLLM also keeps those of models that are gone."""
    is_frozen = gc.get_freeze_count() > 0
    gc.unfreeze()  # vLLM freezes the heap of an engine that has started, and what is frozen is not listed
    gc.collect()
    layers = [found for found in gc.get_objects() if issubclass(type(found), torch.nn.Module)]
    held = {id(child) for layer in layers for child in layer._modules.values()}
    del layers
    if is_frozen:
        gc.freeze()
    return [rope for rope in embeddings if id(rope) in held]


def _inverse_frequencies(rope: Any) -> torch.Tensor:
    """Radians per position of each pair of channels."""
    if type(rope) in (RotaryEmbedding, Llama3RotaryEmbedding):
        return rope._compute_inv_freq(rope.base)
    if type(rope) is YaRNScalingRotaryEmbedding:
        return rope._compute_inv_freq(rope.scaling_factor)
    if type(rope) is LinearScalingRotaryEmbedding and len(rope.scaling_factors) == 1:
        return rope._compute_inv_freq(rope.base) / rope.scaling_factors[0]
    raise NoRotaryError(f"this model has {type(rope).__name__}")


def transformers_rotary(config: Any) -> Rotary:
    """The embedding of transformers' implementation of a language model, on the CPU.

    Args:
        config: the model's transformers configuration.

    Raises:
        NoRotaryError: as `model_rotary`.
    """
    rope, interleaved = _transformers_embedding(config)
    return Rotary(rope.inv_freq.float(), interleaved)


def rotary_table(model: ModelConfig, num_positions: int) -> RotaryTable:
    """The embedding's own cosines and sines, as the layers of this worker apply them, on the CPU.

    Args:
        num_positions: that requests may have.

    Raises:
        NoRotaryError: as `model_rotary`, or the embedding has fewer positions.
    """
    if model.using_transformers_backend():
        return transformers_table(model.hf_text_config, num_positions, model.dtype)
    rope = _shared_embedding()
    _inverse_frequencies(rope)  # refuses a kind whose angles are not known to be a multiple of the position
    angles = rope.cos_sin_cache[:num_positions].detach().cpu().float()
    if len(angles) < num_positions:
        raise NoRotaryError(f"that of this model has {len(angles)} positions and requests may have {num_positions}")
    return RotaryTable(torch.stack(angles.chunk(2, 1)).mT.contiguous(), interleaved=not rope.is_neox_style)


def transformers_table(config: Any, num_positions: int, dtype: torch.dtype) -> RotaryTable:
    """As `rotary_table`, of transformers' implementation, which rounds cosines and sines to the dtype of its rows.

    Raises:
        NoRotaryError: as `model_rotary`.
    """
    rope, interleaved = _transformers_embedding(config)
    cosines, sines = rope(torch.zeros(1, dtype=dtype), torch.arange(num_positions)[None])
    half = len(rope.inv_freq)
    own = slice(0, 2 * half, 2) if interleaved else slice(0, half)  # each angle is there twice
    return RotaryTable(torch.stack([part[0][:, own].T.float() for part in (cosines, sines)]), interleaved)


def _transformers_embedding(config: Any) -> tuple[Any, bool]:
    """The module of an embedding, and whether channels (2i, 2i + 1) turn together."""
    from transformers import AutoModel

    module: Any = inspect.getmodule(AutoModel._model_mapping.get(type(config), None))
    classes = inspect.getmembers(module, inspect.isclass) if module else []
    own = [cls for name, cls in classes if name.endswith("RotaryEmbedding") and cls.__module__ == module.__name__]
    turn = getattr(module, "rotate_half", None)
    if len(own) != 1 or turn is None:
        raise NoRotaryError(f"kvserve does not find that of {type(config).__name__} in transformers")
    make: Any = own[0]
    rope = make(config=config)
    if getattr(rope, "rope_type", None) not in ROTARY_KINDS:
        raise NoRotaryError(f"{type(config).__name__} has rope_type {getattr(rope, 'rope_type', None)}")
    partners = turn(torch.arange(4.0)).abs().tolist()  # where each channel's other half comes from
    if partners not in ([2, 3, 0, 1], [1, 0, 3, 2]):
        raise NoRotaryError(f"{type(config).__name__} turns other pairs of channels")
    return rope, partners[0] == 1
