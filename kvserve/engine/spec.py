"""KV cache spec of a compressed group: how many bytes a block has and how many blocks a request needs.

Seams: `vllm.v1.kv_cache_interface.FullAttentionSpec`, `register_kv_cache_spec`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

import torch
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from kvserve.accounting.plan import widest_request
from kvserve.engine.eviction_manager import EvictingPageManager
from kvserve.engine.manager import PageManager
from kvserve.pages.layout import PageLayout

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Registering ours first would make vLLM believe that its own specs are registered too.
KVCacheSpecRegistry._ensure_registered()


@register_kv_cache_spec(manager_class=PageManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class PageSpec(FullAttentionSpec):
    """A group whose blocks are cells of sealed pages and dense slots (see kvserve.pages.layout).

    Attributes:
        draft_block_size: of a draft model's layers, 0 where there is none. vLLM computes their slots in the table of
            the first group, which is this one, so it has to be as wide as theirs.
    """

    layout: PageLayout
    draft_block_size: int = 0

    def __post_init__(self) -> None:
        """Refuse another block size than the layout's, which cells do not follow; vLLM asks for 1 to learn bytes."""
        super().__post_init__()
        if self.block_size not in (1, self.layout.block_size):
            raise ValueError(
                f"kvserve pages were laid out for blocks of {self.layout.block_size} tokens, and vLLM makes them "
                f"{self.block_size}; set --block-size {self.layout.block_size}"
            )

    @classmethod
    def from_attention(cls, spec: AttentionSpec, layout: PageLayout, draft_block_size: int = 0) -> Self:
        """The spec of the same layer with pages of `layout`: block_size states of equal bytes.

        A window is left out of the spec (it stays in the attention layer), so that all layers share one group.
        """
        own = {field.name for field in fields(cls)}
        return replace_as(
            spec,
            cls,
            drop=[field.name for field in fields(spec) if field.name not in own],
            sliding_window=None,
            dtype=torch.uint8,
            state_content_bytes=layout.cell_bytes // layout.block_size,
            layout=layout,
            draft_block_size=draft_block_size,
        )

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of one layer's pages for a request of max_model_len tokens, tail and sinks included."""
        return self.layout.blocks_for(vllm_config.model_config.max_model_len) * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Longest row of the worker's block table."""
        of_drafts = -(-max_len // self.draft_block_size) if self.draft_block_size else 0
        return max(self.layout.blocks_for(max_len), of_drafts)

    def copy_with_new_block_size(self, block_size: int) -> Self:
        """Only the same size: a cell is not a sequence of smaller cells."""
        if block_size == self.block_size:
            return self
        raise NotImplementedError("kvserve pages cannot be split into smaller kernel blocks")

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for the group.

        Raises:
            AssertionError: some are other layers' specs: window layers have groups of their own.
            ValueError: the pages of two layers, or of two stages of a pipeline, differ; the message says in what.
        """
        if not all(isinstance(spec, PageSpec) for spec in specs):
            raise AssertionError("layers of several kinds are no one group")
        for spec in specs:
            if spec != specs[0]:
                raise ValueError(
                    "kvserve needs the same pages in every layer, two of this model differ in "
                    f"{_difference(specs[0], spec)}; serve it with stock vLLM, without kvserve"
                )
        return specs[0]


def _difference(one: PageSpec, other: PageSpec) -> str:
    """Fields that differ, with both values; of the layouts, the fields within."""
    pairs: list[tuple[Any, Any]] = [(one, other), (one.layout, other.layout)]
    names = [(a, b, field.name) for a, b in pairs for field in fields(a) if field.name != "layout"]
    found = [(name, getattr(a, name), getattr(b, name)) for a, b, name in names]
    return ", ".join(f"{name} ({mine} and {its})" for name, mine, its in found if mine != its)


@register_kv_cache_spec(manager_class=EvictingPageManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class EvictingPageSpec(PageSpec):
    """A group whose requests are evicted: beside its row a request has kept blocks."""

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """As PageSpec, with the kept blocks that a request needs while it is cut."""
        return widest_request(self.layout, vllm_config.model_config.max_model_len) * self.page_size_bytes
