"""The sizes of a model that a KV cache depends on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvserve.errors import UnsupportedError
from kvserve.layer_kinds import hybrid_of, needs_layer_types, num_sharing_of
from kvserve.pages.windows import Hybrid, WindowGroups

if TYPE_CHECKING:
    import torch

    from kvserve.policies.base import Policy


@dataclass(frozen=True)
class ModelShape:
    """What a KV cache needs to know about a model.

    Attributes:
        num_layers: those that have a KV cache of their own.
        hybrid: which layers have a window, where only some do.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hybrid: Hybrid | None = None

    @property
    def query_group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ModelShape:
        """From the content of a Hugging Face config.json.

        Raises:
            UnsupportedError: it lacks a size.
        """
        heads, num_layers = config.get("num_attention_heads"), config.get("num_hidden_layers")
        head_dim = config.get("head_dim") or (heads and (config.get("hidden_size") or 0) // heads)
        if not heads or not num_layers or not head_dim:
            raise UnsupportedError(
                "the model's config.json needs num_hidden_layers, num_attention_heads, and head_dim or hidden_size"
            )
        if needs_layer_types(config):
            from transformers import AutoConfig

            config = AutoConfig.for_model(**config).to_dict()
        kv_heads = config.get("num_key_value_heads") or heads
        cached = num_layers - num_sharing_of(config)
        return cls(cached, heads, kv_heads, head_dim, hybrid_of(config, sys.maxsize))

    def longest_request(self, policy: Policy, block_size: int, dtype: torch.dtype, max_len: int) -> tuple[int, int]:
        """Blocks of a request of `max_len` tokens at its widest, those of window layers included, and bytes of one."""
        from kvserve.accounting.plan import widest_request
        from kvserve.pages.layout import PageLayout

        hybrid = self.hybrid if policy.has_pages and self.hybrid and self.hybrid.window < max_len else None
        num_layers = hybrid.num_full if hybrid else self.num_layers
        layout = PageLayout.build(
            policy, self.head_dim, block_size, dtype, query_group=self.query_group, num_layers=num_layers
        )
        blocks = widest_request(layout, max_len)
        if hybrid is None:
            return blocks, layout.cell_bytes * num_layers * self.num_kv_heads
        slot_bytes = 2 * self.head_dim * dtype.itemsize
        groups = WindowGroups.choose(hybrid, layout.cell_bytes, slot_bytes, block_size, max_len)
        return blocks + groups.most_blocks(max_len, in_flight=max_len), groups.block_bytes * self.num_kv_heads
