"""Block manager of a compressed group: who holds which block.

Seam: `vllm.v1.core.single_type_kv_cache_manager.FullAttentionManager`.

A request's row is [private blocks][tile block 0][sink blocks][tile block 1]... as kvserve.pages.layout describes. The
private ones are its state (where prompts are evicted) and its tail. The worker sees the row as ordinary new block ids,
in this order, and it only ever grows. Tile blocks enter vLLM's prefix cache under their own hash; the sink blocks go
with tile block 0 under a hash derived from its hash (kvserve/engine/sinks.py), so that a hit on tile block 0 always
finds the sinks that belong to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from kvserve.engine.sinks import SinkCache, sink_hash
from kvserve.pages.layout import PageLayout

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.request import Request


def _own_hash(block: KVCacheBlock) -> BlockHash:
    """The hash of a cached block's tokens, without its group's number."""
    key = block.block_hash
    assert key is not None
    return BlockHash(key[:-4])


def cached_sinks(pool: BlockPool, layout: PageLayout, first_hash: BlockHash, group_id: int) -> list[KVCacheBlock]:
    """The sink blocks that go with a cached tile block 0; empty where the policy has none or one was evicted."""
    cache = SinkCache.of(pool)
    found = [cache.find(pool, sink_hash(first_hash, index, group_id)) for index in range(layout.sink_blocks)]
    return [] if None in found else [block for block in found if block is not None]


class PageManager(FullAttentionManager):
    """Counts tail, tile and sink blocks exactly; the worker needs no message beyond the row itself."""

    supports_fine_grained_hash_lookup = False

    def __init__(self, kv_cache_spec: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self.layout: PageLayout = kv_cache_spec.layout
        self._hits: dict[str, list[KVCacheBlock]] = {}  # of requests that are about to get their row

    # -- prefix hits ---------------------------------------------------------------------------------------------

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], block_pool: BlockPool,
        kv_cache_spec: Any, **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:  # fmt: skip
        """Longest run of cached tile blocks; none at all where the sinks of tile block 0 are gone."""
        blocks, hit_length = super().find_longest_cache_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, **kwargs
        )
        layout: PageLayout = kv_cache_spec.layout
        if hit_length and layout.sink_blocks:
            for found, group_id in zip(blocks, kv_cache_group_ids, strict=True):
                if not cached_sinks(block_pool, layout, _own_hash(found[0]), group_id):
                    return tuple([] for _ in kv_cache_group_ids), 0
        return blocks, hit_length

    def _with_sinks(self, hits: Sequence[KVCacheBlock]) -> list[KVCacheBlock]:
        """Prefix hits in row order: tile block 0, its sinks, the other tile blocks."""
        if not hits or not self.layout.sink_blocks:
            return list(hits)
        sinks = cached_sinks(self.block_pool, self.layout, _own_hash(hits[0]), self.kv_cache_group_id)
        assert sinks, "a hit on tile block 0 is only reported together with its sinks"
        return [hits[0], *sinks, *hits[1:]]

    def _tiles(self, row: list[KVCacheBlock]) -> list[KVCacheBlock]:
        """The tile blocks of a row."""
        first = self.layout.private_blocks
        return row[first : first + 1] + row[first + 1 + self.layout.sink_blocks :]

    # -- allocation ----------------------------------------------------------------------------------------------

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int, num_local_computed_tokens: int, num_tokens_main_model: int, **kwargs: Any,
    ) -> int:  # fmt: skip
        """Free blocks the request needs to hold `num_tokens_main_model`, counting hits that leave the free queue.

        What a draft model writes behind them (`num_tokens` counts it) lies in blocks of another group.
        """
        held = len(self.req_to_blocks.get(request_id, ()))
        hits = self._with_sinks(new_computed_blocks)
        missing = self.layout.blocks_for(num_tokens_main_model) - held - len(hits)
        return max(missing, 0) + self._get_num_evictable_blocks(hits)

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:  # fmt: skip
        """Keep the hits for the row of a new request.

        Its private blocks are taken in `allocate_new_blocks`: until then other groups have hits that nobody holds, and
        that a new block could evict.
        """
        assert not self.req_to_blocks.get(request_id)
        hits = self._with_sinks(new_computed_blocks)
        self.block_pool.touch(hits)
        self._hits[request_id] = hits
        self.num_cached_block[request_id] = len(new_computed_blocks)

    def allocate_external_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        """None: `allocate_new_blocks` takes the blocks that a connector loads into together with the row's others."""

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Extend the row to what `num_tokens_main_model` tokens need; returns the new blocks in row order.

        The row of a new request starts with its private blocks, then come the hits.
        """
        row, private = self.req_to_blocks[request_id], []
        if hits := self._hits.pop(request_id, []):
            private = self._take(self.layout.private_blocks)
            row.extend(private + hits)
        new_blocks = self._take(max(self.layout.blocks_for(num_tokens_main_model) - len(row), 0))
        row.extend(new_blocks)
        return private + new_blocks

    def _take(self, num_blocks: int) -> list[KVCacheBlock]:
        blocks = self.block_pool.get_new_blocks(num_blocks) if num_blocks else []
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in blocks)
        return blocks

    # -- caching and freeing -------------------------------------------------------------------------------------

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Enter finished tile blocks, and the sinks with the first one, into the prefix cache.

        A block without a hash waits: with lookahead `num_tokens` may pass the tokens that the request has hashed.
        """
        request_id = request.request_id
        num_cached = self.num_cached_block.get(request_id, 0)
        num_hashed = len(request.block_hashes) * self.block_pool.hash_block_size
        num_full = min(num_tokens, num_hashed) // self.block_size
        if num_cached >= num_full:
            return
        row = self.req_to_blocks[request_id]
        self.block_pool.cache_full_blocks(
            request=request,
            blocks=self._tiles(row),
            num_cached_blocks=num_cached,
            num_full_blocks=num_full,
            block_size=self.block_size,
            kv_cache_group_id=self.kv_cache_group_id,
        )
        if num_cached == 0:
            self._cache_sinks(row)
        self.num_cached_block[request_id] = num_full

    def _cache_sinks(self, row: list[KVCacheBlock]) -> None:
        first = self.layout.private_blocks
        if row[first].block_hash is None:
            return
        for index, block in enumerate(row[first + 1 : first + 1 + self.layout.sink_blocks]):
            block_key = sink_hash(_own_hash(row[first]), index, self.kv_cache_group_id)
            SinkCache.of(self.block_pool).insert(block_key, block, self.layout.policy.sink_tokens)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """The request's blocks, private ones last: callers free in reverse, so what holds no tile goes first."""
        row = super().pop_blocks_for_free(request_id)
        private = self.layout.private_blocks
        return row[private:] + row[:private]

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """Always 0: rows start with private blocks, so cascade attention over shared rows does not apply."""
        return 0
