"""The sizes of a model that a KV cache depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvserve.errors import UnsupportedError


@dataclass(frozen=True)
class ModelShape:
    """What a KV cache needs to know about a model."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

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
        return cls(num_layers, heads, config.get("num_key_value_heads") or heads, head_dim)
