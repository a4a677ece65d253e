"""Which blocks hold the sinks that go with a cached tile block 0.

vLLM's own map of the prefix cache would announce their removal (`BlockRemoved`) to listeners of KV events that never
heard of them: sinks are no tokens of their own. So a sink block has a hash that only the map here knows. vLLM keeps
such a block in the order of its last use, like every block with a hash, and takes the hash off without a word when it
gives the block away or empties the prefix cache.

Seams: `BlockPool._remove_cached_block_hashes`, `KVCacheBlock.set_block_hash`, `BlockPool.blocks`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from vllm.v1.core.kv_cache_utils import BlockHash, BlockHashWithGroupId, KVCacheBlock, make_block_hash_with_group_id

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool


def sink_hash(first_hash: BlockHash, index: int, group_id: int) -> BlockHashWithGroupId:
    """Hash of the `index`-th sink block that belongs to the tile block hashed `first_hash`."""
    return make_block_hash_with_group_id(BlockHash(first_hash + b"kvserve-sink" + bytes([index])), group_id)


class SinkCache:
    """The sink blocks of one pool by their hash; it never has more entries than the pool has blocks.

    It holds ids, not blocks: a block refers to its pool, which would then live as long as its entry here. An entry is
    valid as long as its block has the hash, and goes when its block becomes another sink.
    """

    def __init__(self) -> None:
        self._blocks: dict[BlockHashWithGroupId, set[int]] = {}  # equal prompts computed side by side have one each
        self._hashes: dict[int, BlockHashWithGroupId] = {}

    @classmethod
    def of(cls, pool: BlockPool) -> SinkCache:
        """The one of a pool, made at the first call."""
        return _caches.setdefault(pool, cls())

    def insert(self, key: BlockHashWithGroupId, block: KVCacheBlock, num_tokens: int) -> None:
        """Let `block`, which has no hash yet, hold the sinks of `key`."""
        before = self._hashes.get(block.block_id)
        if before is not None:
            self._blocks[before].discard(block.block_id)
            if not self._blocks[before]:
                del self._blocks[before]
        block.set_block_hash(key, num_tokens=num_tokens)
        self._hashes[block.block_id] = key
        self._blocks.setdefault(key, set()).add(block.block_id)

    def find(self, pool: BlockPool, key: BlockHashWithGroupId) -> KVCacheBlock | None:
        """A block that holds these sinks."""
        blocks = (pool.blocks[block_id] for block_id in self._blocks.get(key, ()))
        return next((block for block in blocks if block.block_hash == key), None)


_caches: WeakKeyDictionary[BlockPool, SinkCache] = WeakKeyDictionary()
