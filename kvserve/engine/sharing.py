"""Layers that read the KV cache of an earlier one (Gemma 3n): their target.

vLLM gives such a layer the target's cells and block table, and no keys and values. It stores nothing and sees what the
target sees: sealed pages, the tail as it was before the step, and the step's new rows, which the target leaves in the
step's metadata. Whatever ends the target's step waits for the last of them: the tail, which takes the place of rows
that are still read, and the cut of a policy that evicts, which scores by the target's own queries.

Seam: `vllm.model_executor.layers.attention.Attention`, its `kv_sharing_target_layer_name`, and
`vllm.v1.worker.utils.add_kv_sharing_layers_to_kv_cache_groups`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from kvserve.attention.base import OpenStep
from kvserve.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from kvserve.engine.backend import KvserveImpl


@dataclass
class SharedStep:
    """A step of a target between its own answer and those of the layers that share its cache.

    Attributes:
        opened: what they attend to.
        waiting: how many of them have not attended.
        rows: keys and values as the target got them, [num_tokens, num_kv_heads, head_dim], for probes.
    """

    opened: OpenStep
    waiting: int
    rows: tuple[torch.Tensor, torch.Tensor] | None = None


def target_of(name: str | None, config: VllmConfig, own: type) -> KvserveImpl | None:
    """The layer whose cache a layer reads; None: it has its own.

    Args:
        name: of the target; vLLM has built it before.
        own: the class of kvserve's implementations of a layer.

    Raises:
        UnsupportedError: the target's cache is not kvserve's.
    """
    if name is None:
        return None
    target: Any = getattr(config.compilation_config.static_forward_context.get(name), "impl", None)
    if not isinstance(target, own):
        raise UnsupportedError(
            f"a layer reads the KV cache of {name}, which is no layer of kvserve's before it; serve this model with "
            "stock vLLM, without kvserve"
        )
    return cast("KvserveImpl", target)


def check_alike(sharer: KvserveImpl, target: KvserveImpl) -> None:
    """Refuse a layer that reads the cache of one with other heads, or another window.

    Raises:
        UnsupportedError: naming what differs.
    """
    for field in ("num_heads", "num_kv_heads", "head_size", "sliding_window"):
        mine, its = getattr(sharer, field), getattr(target, field)
        if mine != its:
            raise UnsupportedError(
                f"a layer with {field} {mine} reads the KV cache of one with {field} {its}, which kvserve does not "
                "support; serve this model with stock vLLM, without kvserve"
            )


def num_owners(layer_names: Iterable[str], config: VllmConfig) -> int:
    """How many of a group's layers have a cache of their own; vLLM lists those that share one beside their target."""
    context = config.compilation_config.static_forward_context
    return sum(getattr(context[name], "kv_sharing_target_layer_name", None) is None for name in layer_names)
