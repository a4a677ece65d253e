"""Layers of a draft model beside compressed ones: how they share one pool.

A draft model proposes tokens that the model then checks (speculative decoding). Its layers keep every token, dense, in
block tables of vLLM's own, however the policy compresses or evicts the model's cache:

    | a cell of every layer of the model                                      | unused |   the model's group
    | dense cells of all layers of the draft model, `block_size` tokens each   | unused |   the draft model's group

So nothing of a rejected token is ever in a page, no cut touches what the draft model reads, and a step in which vLLM
does not draft leaves nothing behind that could not be read. As beside window layers (kvserve/pages/windows.py), blocks
are in vLLM's layout BLHNC.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple


class DraftLayers(NamedTuple):
    """Attention layers of a draft model, on one rank."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class DraftGroup:
    """The draft model's part of a pool. Bytes are those of all KV heads of one rank.

    Attributes:
        full_bytes: cells of all layers of the model in one block.
        slot_bytes: a dense token of one KV head in one layer of the draft model.
        block_size: tokens of a block of the draft model's; it divides that of the model's layers.
        draft_tokens: that a step may write behind the tokens it was scheduled for.
    """

    layers: DraftLayers
    full_bytes: int
    slot_bytes: int
    block_size: int
    draft_tokens: int

    @classmethod
    def choose(
        cls, layers: DraftLayers, full_page_bytes: int, num_full: int, full_block_size: int, itemsize: int,
        draft_tokens: int,
    ) -> DraftGroup:  # fmt: skip
        """With the largest blocks that the model's layers need no larger ones for.

        Args:
            full_page_bytes: a block of one layer of the model.
            num_full: layers of the model.
            full_block_size: tokens of such a block. The draft model's hold fewer, and divide it: vLLM makes one group
                of layers whose blocks hold equally many, and prefix hits of both have to end at the same tokens.
            itemsize: bytes of a number of the draft model's cache.
        """
        slot_bytes = 2 * layers.head_dim * itemsize
        sizes = [size for size in range(full_block_size - 1, 0, -1) if full_block_size % size == 0]
        found = [cls(layers, num_full * full_page_bytes, slot_bytes, size, draft_tokens) for size in sizes]
        # Where pages are equally large vLLM would take layers of both for one kind.
        differing = [one for one in found if one.page_bytes != full_page_bytes]
        return next((one for one in differing if one.used_bytes <= one.full_bytes), differing[-1])

    @property
    def page_bytes(self) -> int:
        """A block of one layer."""
        return self.block_size * self.layers.num_kv_heads * self.slot_bytes

    @property
    def token_bytes(self) -> int:
        """A token in all layers."""
        return self.layers.num_layers * self.layers.num_kv_heads * self.slot_bytes

    @property
    def used_bytes(self) -> int:
        """What the layers fill of a block of the pool."""
        return self.block_size * self.token_bytes

    @property
    def block_bytes(self) -> int:
        """A block of the pool."""
        return max(self.full_bytes, self.used_bytes)

    @property
    def waste(self) -> float:
        """The share of the draft model's blocks that stays unused."""
        return 1 - self.used_bytes / self.block_bytes

    def blocks_for(self, num_tokens: int, max_len: int) -> int:
        """Blocks that a request of `num_tokens` computed tokens, and at most `max_len` ever, holds for these layers."""
        return ceil(min(num_tokens + self.draft_tokens, max_len) / self.block_size)
