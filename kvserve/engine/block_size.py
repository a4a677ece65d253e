"""How many tokens a block has: what --block-size asks for, or else one tile of the policy.

Seams: `CacheConfig.block_size` and `user_specified_block_size`, `AttentionBackend.get_preferred_block_size`. Where the
user names none, vLLM has a placeholder until the model is loaded (16, or 128 on a CPU before vLLM 0.33, which writes it
again with every copy of its configuration), and then asks the backends. Pages are laid out while layers are built, so
kvserve puts its size in effect at each layer, and once more when all are there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import CacheConfig


def asked_block_size(cache: CacheConfig, beside_windows: int | None = None) -> int | None:
    """Tokens of a block as the user wants it; None: nobody said.

    Args:
        beside_windows: the only size that can be asked for beside window layers of other blocks; vLLM overwrites its
            own with the smallest of all once it has planned. None: all layers have the same blocks.
    """
    return (beside_windows or cache.block_size) if cache.user_specified_block_size else None


def put_in_effect(cache: CacheConfig, block_size: int) -> None:
    """Replace vLLM's placeholder, from which it would size the blocks; what a user asked for stays."""
    if not cache.user_specified_block_size:
        cache.block_size = block_size
