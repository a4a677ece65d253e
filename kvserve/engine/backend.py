"""Attention backend: hands vLLM's step to the paged kernels.

Seams: `vllm.v1.attention.backend.AttentionBackend`, `AttentionImpl`, `AttentionMetadataBuilder`. The worker keeps no
state of its own: everything a request has lies in the arena and is found through its row of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout, SlidingWindowSpec

from kvserve.attention.base import Batch, LayerSpec
from kvserve.attention.collector import Collector
from kvserve.attention.eviction import StepEvictor
from kvserve.attention.registry import make_attention
from kvserve.checks import UnsupportedError
from kvserve.engine.connector import current_plans
from kvserve.engine.settings import EngineSettings
from kvserve.engine.spec import EvictingPageSpec, PageSpec
from kvserve.engine.stats import worker_log
from kvserve.pages.kept import NOT_KEPT, KeptTable
from kvserve.policies.base import Eviction

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec

logger = init_logger("vllm.kvserve")


class KvserveBackend(AttentionBackend):
    """Base of the backends that `backend_for` binds to one engine's settings."""

    settings: ClassVar[EngineSettings]
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]
    # The tail is written after attention has read it, so storing cannot be a separate earlier call.
    forward_includes_kv_cache_update: bool = True

    @staticmethod
    def get_name() -> str:
        """The registered name that vLLM looks up again (AttentionBackendEnum.CPU_ATTN)."""
        return "CPU_ATTN"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Any block the layout accepts; blocks are never split."""
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """(block, head, layer, token): one page per KV head per layer in one arena."""
        return (KVCacheLayout.BHLNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @staticmethod
    def get_builder_cls() -> type[BatchBuilder]:
        return BatchBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Swap vLLM's dense spec for the policy's pages; the dense policy keeps vLLM's spec and manager.

        Window layers join the same group: their pages cover the whole sequence, their kernels skip what lies outside
        the window.
        """
        if type(spec) not in (FullAttentionSpec, SlidingWindowSpec):
            raise UnsupportedError(f"kvserve cannot serve {type(spec).__name__} layers; use stock vLLM for this model")
        layout = cls.settings.layout(spec.head_size)
        if layout.sections is None:
            return spec
        if not layout.state_blocks:
            return PageSpec.from_attention(spec, layout)
        if isinstance(spec, SlidingWindowSpec):
            raise UnsupportedError("eviction does not serve models with sliding-window layers yet; use kivi-2bit")
        return EvictingPageSpec.from_attention(spec, layout)


@cache
def backend_for(settings: EngineSettings) -> type[KvserveBackend]:
    """The backend class of one engine: its settings travel as a class attribute, since vLLM never instantiates it."""
    impl = type("BoundKvserveImpl", (KvserveImpl,), {"settings": settings})
    return type(
        "BoundKvserveBackend",
        (KvserveBackend,),
        {"settings": settings, "get_impl_cls": staticmethod(lambda: impl)},
    )


@dataclass
class StepMetadata:
    """One step's batch, as the kernels want it."""

    num_actual_tokens: int
    batch: Batch
    evictor: StepEvictor | None = None


class BatchBuilder(AttentionMetadataBuilder[StepMetadata]):
    """Passes lengths and rows through; positions follow from them."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        settings = EngineSettings.from_vllm_config(vllm_config)
        self.eviction = settings.policy.eviction if settings else None
        self.collector = make_collector(self.eviction) if self.eviction else None

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StepMetadata:
        """The batch of this step; int32 CPU tensors."""
        common = common_attn_metadata
        assert common.causal is True, "kvserve serves causal decoders only"
        batch = Batch(
            query_start_loc=common.query_start_loc_cpu[: common.num_reqs + 1],
            seq_lens=common.seq_lens[: common.num_reqs],
            block_table=common.block_table_tensor[: common.num_reqs],
        )
        evictor = self._plan_evictions(batch) if self.eviction else None
        return StepMetadata(common.num_actual_tokens, batch, evictor)

    def _plan_evictions(self, batch: Batch) -> StepEvictor | None:
        """Tell the kernels which rows are cut already; returns what has to be done after each layer."""
        assert self.eviction is not None
        rows = current_plans().rows
        assert self.collector is not None
        self.collector.drop(current_plans().ended)
        found = ((request, rows.get(block)) for request, block in enumerate(batch.block_table[:, 0].tolist()))
        steps = {request: step for request, step in found if step}
        if any(step.kept.end for step in steps.values()):
            batch.kept = KeptTable.of([steps[r].kept if r in steps else NOT_KEPT for r in range(batch.num_reqs)])
        if not any(step.cut or step.collects or step.window_start is not None for step in steps.values()):
            return None
        return StepEvictor(self.eviction, steps, batch, len(self.layer_names), worker_log, self.collector)


def make_collector(eviction: Eviction) -> Collector:
    """What collects for the scorer; refuses a model whose queries it cannot turn back."""
    if "query_statistics" not in eviction.scorer.needs:
        return Collector(eviction.scorer)
    from kvserve.engine.rotary import model_rotary

    return Collector(eviction.scorer, model_rotary())


class KvserveImpl(AttentionImpl[StepMetadata]):
    """One attention layer."""

    settings: ClassVar[EngineSettings]

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, alibi_slopes: list[float] | None,
        sliding_window: int | None, kv_cache_dtype: str, logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER, kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        refused = (
            (alibi_slopes is not None, "ALiBi"),
            (bool(logits_soft_cap), "attention logit soft-capping"),
            (attn_type != AttentionType.DECODER, f"{attn_type} attention"),
            (kv_sharing_target_layer_name is not None, "layers that share another layer's KV cache"),
            (sinks is not None, "learned attention sinks"),
        )
        for present, feature in refused:
            if present:
                raise UnsupportedError(f"kvserve does not support {feature}; serve this model with stock vLLM")
        if EngineSettings.from_vllm_config(get_current_vllm_config()) != self.settings:
            # vLLM caches the backend class per process under a key that does not know the policy.
            raise UnsupportedError("one process can hold engines of one kvserve policy; use a process for each policy")
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.scale, self.sliding_window, self.kv_cache_dtype = float(scale), sliding_window, kv_cache_dtype
        layer = LayerSpec(num_heads, num_kv_heads, self.scale, sliding_window)
        self.attention = make_attention(self.settings.kernels, self.settings.layout(head_size), layer)

    def forward(
        self, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor,
        attn_metadata: StepMetadata | None, output: torch.Tensor, output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Store this step's K/V and attend.

        Args:
            query: [num_tokens, num_heads, head_dim]; key, value: [num_tokens, num_kv_heads, head_dim].
            kv_cache: [num_blocks, num_kv_heads, block_size, bytes per state].
            output: [num_tokens, num_heads, head_dim], written.
        """
        if attn_metadata is None:  # vLLM's profiling run has no cache yet
            return output
        n = attn_metadata.num_actual_tokens
        shape = (-1, self.num_heads, self.head_size)
        cells, batch = kv_cache.view(torch.uint8), attn_metadata.batch
        self.attention.forward(
            query[:n].view(shape), key[:n].view(-1, self.num_kv_heads, self.head_size),
            value[:n].view(-1, self.num_kv_heads, self.head_size), cells, batch, output[:n].view(shape),
        )  # fmt: skip
        if attn_metadata.evictor:
            attn_metadata.evictor.after_layer(self.attention, cells, query[:n].view(shape))
        return output
