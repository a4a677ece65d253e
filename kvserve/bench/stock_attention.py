"""vLLM's own CPU attention (CPU_ATTN), called as vllm/v1/attention/backends/cpu_attn.py calls it."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch

from kvserve.measuring.shape import ModelShape

BLOCK_SIZE = 128  # vLLM's default on CPUs


@dataclass
class StockStep:
    """The metadata of one step, made once for all layers as vLLM's builder does."""

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slots: torch.Tensor
    scheduler_metadata: torch.Tensor


def allow_amx() -> None:
    """Ask Linux for AMX's tile registers, without which the process gets SIGILL at its first tile instruction.

    In an engine the first matrix product in bfloat16 (oneDNN) has done so before attention runs. Here there is none,
    and vLLM's attention kernels do not ask.

    Raises:
        RuntimeError: the system does not allow it.
    """
    if not torch.cpu._init_amx():
        raise RuntimeError(
            "stock vLLM's attention in bfloat16 needs AMX here, which this system does not let the process use "
            "(arch_prctl ARCH_REQ_XCOMP_PERM); measure with --dtype float32"
        )


class StockAttention:
    """One paged dense cache per layer, [num_blocks, num_kv_heads, block_size, 2 * head_dim].

    Args:
        capacity: tokens that each of `num_seqs` sequences may hold.
    """

    def __init__(self, shape: ModelShape, dtype: torch.dtype, num_layers: int, num_seqs: int, capacity: int) -> None:
        from vllm import _custom_ops, envs
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        self.ops, self.shape, self.dtype = _custom_ops, shape, dtype
        self.split_kv = envs.VLLM_CPU_ATTN_SPLIT_KV
        self.isa = _get_attn_isa(dtype, BLOCK_SIZE, shape.head_dim, "auto")
        if self.isa == "amx":
            allow_amx()
        self.blocks_per_seq = ceil(capacity / BLOCK_SIZE)
        size = (1 + num_seqs * self.blocks_per_seq, shape.num_kv_heads, BLOCK_SIZE, 2 * shape.head_dim)
        self.layers = [torch.zeros(size, dtype=dtype) for _ in range(num_layers)]
        blocks = torch.arange(1, 1 + num_seqs * self.blocks_per_seq, dtype=torch.int32)
        self.block_table = blocks.reshape(num_seqs, self.blocks_per_seq)

    def step(self, seqs: list[int], query_lens: list[int], seq_lens: list[int]) -> StockStep:
        """Metadata of a step in which sequence `seqs[i]` gets `query_lens[i]` tokens and has `seq_lens[i]` then."""
        starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        lengths = torch.tensor(seq_lens, dtype=torch.int32)
        table = self.block_table[seqs].contiguous()
        slots = []
        for row, new, length in zip(table.long(), query_lens, seq_lens, strict=True):
            positions = torch.arange(length - new, length)
            slots.append(row[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE)
        metadata = self.ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(seqs), num_heads=self.shape.num_heads, num_kv_heads=self.shape.num_kv_heads,
            head_dim=self.shape.head_dim, seq_lens=lengths, dtype=self.dtype, query_start_loc=starts, causal=True,
            sliding_window_size=-1, isa=self.isa, enable_kv_split=self.split_kv,
        )  # fmt: skip
        return StockStep(starts, lengths, table, torch.cat(slots), metadata)

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor, step: StockStep) -> None:
        """Write this step's tokens."""
        key_cache, value_cache = self._caches(layer)
        self.ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, step.slots, self.isa)

    def attend(self, layer: int, query: torch.Tensor, output: torch.Tensor, step: StockStep) -> None:
        """Attention of this step's queries over the cache."""
        key_cache, value_cache = self._caches(layer)
        self.ops.cpu_attention_with_kv_cache(
            query=query, key_cache=key_cache, value_cache=value_cache, output=output,
            query_start_loc=step.query_start_loc, seq_lens=step.seq_lens, scale=self.shape.head_dim**-0.5,
            causal=True, alibi_slopes=None, sliding_window=-1, block_table=step.block_table, softcap=0,
            scheduler_metadata=step.scheduler_metadata, s_aux=None,
        )  # fmt: skip

    def _caches(self, layer: int) -> tuple[torch.Tensor, ...]:
        blocks, heads, _, width = self.layers[layer].shape
        return self.layers[layer].view(blocks, heads, 2 * BLOCK_SIZE, width // 2).chunk(2, dim=2)
