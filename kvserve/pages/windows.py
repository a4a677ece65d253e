"""Layers with a sliding window beside layers that see every token: how they share one pool.

Layers that see every token have the policy's pages. Window layers keep dense tokens, in vLLM's own block tables, and
give back what lies outside of their window. All blocks of the pool are equally large and anybody's:

    | a cell of every full layer                                              | unused |   the full layers' group
    | dense cells of some window layers, `block_size` tokens each        | unused      |   each group of window layers

vLLM divides the window layers into as few groups as fit into blocks that the full layers need anyway
(`vllm.v1.core.kv_cache_utils._get_packed_kv_cache_groups`). Each group has a block table of its own, so a request that
fills its window holds `num_groups` times the blocks of one group, however long it is.

Where other layers read the caches of these (Gemma 3n), vLLM has no spec for them in groups whose pages differ in size
(`UniformTypeKVCacheSpecs`). There a window layer's page is as large as a full layer's cell, what is over stays unused,
and a group has as many layers as the full one (`_get_kv_cache_groups_uniform_page_size`).

Such blocks need a layout of vLLM's in which those of a layer lie side by side, BLHNC: [block][layer][kv_head]. kvserve
reads the same bytes as its own order [block][kv_head][layer], in which a strip is in one piece
(`kvserve.pages.kept.in_strips`); nobody else looks into a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

# Of two block sizes under which requests take about equally many bytes, one is better that makes no block of the full
# layers larger, which longer requests would pay for, and then the larger, which has the shorter block tables.
_EQUAL_BYTES = 1.05
# So many times the full layers, window layers with equally large pages get one group instead of several.
_FEW_MORE = 1.5


class Hybrid(NamedTuple):
    """Layers of a model of which some see every token and some a window that requests exceed.

    Attributes:
        num_full, num_windows: layers of each kind that have a KV cache of their own.
        window: tokens that a window layer sees, its own included.
        is_shared: whether layers behind these read their caches.
    """

    num_full: int
    num_windows: int
    window: int
    is_shared: bool = False


@dataclass(frozen=True)
class WindowGroups:
    """The window layers' part of a pool. Bytes are those of one KV head; every layer has the same number of them.

    Attributes:
        full_bytes: cells of all full layers in one block.
        slot_bytes: a dense token in one window layer.
        block_size: tokens of a block in a group of window layers; it divides that of the full layers.
    """

    hybrid: Hybrid
    full_bytes: int
    slot_bytes: int
    block_size: int

    @classmethod
    def choose(
        cls, hybrid: Hybrid, cell_bytes: int, slot_bytes: int, full_block_size: int, max_len: int
    ) -> WindowGroups:  # fmt: skip
        """With the block size under which a request of `max_len` tokens takes the fewest bytes.

        Args:
            cell_bytes: of a full layer.
            full_block_size: tokens of a full layer's block. Block sizes divide it, so that prefix hits of both kinds of
                layers end at the same tokens.
        """
        sizes = [size for size in range(1, full_block_size + 1) if full_block_size % size == 0]
        if hybrid.is_shared:
            fitting = max(size for size in sizes if size * slot_bytes <= cell_bytes)
            return cls(hybrid, hybrid.num_full * cell_bytes, slot_bytes, fitting)
        # Where pages are equally large vLLM would spread the full layers over several groups, too.
        found = [
            cls(hybrid, hybrid.num_full * cell_bytes, slot_bytes, size)
            for size in sizes
            if size * slot_bytes != cell_bytes
        ]
        full_blocks = ceil(max_len / full_block_size)
        needed = {one: (full_blocks + one.most_blocks(max_len, in_flight=0)) * one.block_bytes for one in found}
        limit = min(needed.values()) * _EQUAL_BYTES
        return max((one for one in found if needed[one] <= limit), key=lambda one: (-one.full_waste, one.block_size))

    @property
    def page_bytes(self) -> int:
        """A block's part for one window layer."""
        if self.hybrid.is_shared:
            return self.full_bytes // self.hybrid.num_full
        return self.block_size * self.slot_bytes

    @property
    def num_groups(self) -> int:
        """Groups of window layers."""
        fitting = max(self.full_bytes // self.page_bytes, 1)
        if self.hybrid.is_shared and self.hybrid.num_windows < _FEW_MORE * fitting:
            return 1
        return ceil(self.hybrid.num_windows / fitting)

    @property
    def block_bytes(self) -> int:
        """A block of the pool."""
        if self.num_groups > 1 and self.hybrid.is_shared:
            return self.full_bytes
        widest = ceil(self.hybrid.num_windows / self.num_groups)
        return max(self.full_bytes, widest * self.page_bytes)

    @property
    def waste(self) -> float:
        """The share of the window layers' blocks that stays unused."""
        used = self.hybrid.num_windows * self.block_size * self.slot_bytes
        return 1 - used / (self.num_groups * self.block_bytes)

    @property
    def full_waste(self) -> float:
        """The share of a full layers' block that stays unused."""
        return 1 - self.full_bytes / self.block_bytes

    def most_blocks(self, max_len: int, in_flight: int) -> int:
        """Blocks that vLLM counts for the window layers of a request of `max_len` tokens, all groups together.

        As `SlidingWindowSpec.max_admission_blocks_per_request`: a window that begins inside of a block, and the tokens
        of steps that are under way.

        Args:
            in_flight: tokens that are scheduled and not processed yet, at most (`VllmConfig.max_in_flight_tokens`).
        """
        tokens = min(self.hybrid.window - 1 + in_flight, max_len)
        return self.num_groups * (ceil(tokens / self.block_size) + 1)

    def held_blocks(self, num_tokens: int) -> int:
        """Blocks that a request of `num_tokens` computed tokens holds for its window layers between two steps."""
        outside = max(num_tokens - self.hybrid.window + 1, 0)
        return self.num_groups * (ceil(num_tokens / self.block_size) - outside // self.block_size)

    def tokens_seen(self, num_tokens: int) -> int:
        """Tokens of a request that its window layers see."""
        return min(num_tokens, self.hybrid.window)
