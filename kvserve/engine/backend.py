"""Attention backend: hands vLLM's step to the paged kernels.

Seams: `vllm.v1.attention.backend.AttentionBackend`, `AttentionImpl` and its `process_weights_after_loading`. The worker
keeps no state of its own: everything a request has lies in the arena and is found through its row of blocks.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionType,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout, SlidingWindowSpec, replace_as

from kvserve.attention.base import Answers, LayerSpec, NewRows, PagedAttention
from kvserve.attention.registry import make_attention
from kvserve.checks import check_estimates
from kvserve.codecs.layer_tables import LayerTables
from kvserve.engine.block_size import put_in_effect
from kvserve.engine.builder import BatchBuilder, StepMetadata
from kvserve.engine.device import LEAST_CAPABILITY, backend_name
from kvserve.engine.drafts import share_backend
from kvserve.engine.layer_tables import tables_of_layer
from kvserve.engine.own_layers import check_own_layers
from kvserve.engine.plugin import BACKEND_PATH
from kvserve.engine.settings import EngineSettings
from kvserve.engine.sharing import SharedStep, check_alike, target_of
from kvserve.engine.spec import EvictingPageSpec, PageSpec
from kvserve.errors import UnsupportedError
from kvserve.pages.kept import in_strips, num_layers_of
from kvserve.transforms.layer import LayerTransforms

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.kv_cache_interface import AttentionSpec

    from kvserve.engine.head_worker import HeadRecorder
    from kvserve.engine.row_worker import RowRecorder
    from kvserve.probe.probe import LayerProbe


class KvserveBackend(AttentionBackend):
    """Base of the backends that `backend_for` binds to one engine's settings."""

    settings: ClassVar[EngineSettings]
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]  # the last two: as the model's
    # The tail is written after attention has read it, so storing cannot be a separate earlier call.
    forward_includes_kv_cache_update: bool = True

    @staticmethod
    def get_name() -> str:
        return backend_name()

    @classmethod
    def full_cls_name(cls) -> tuple[str, str]:
        """What CUDA platforms turn the class into, and resolve again."""
        module, name = BACKEND_PATH.rsplit(".", 1)
        return module, name

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return capability.major >= LEAST_CAPABILITY

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Any block the layout accepts; blocks are never split."""
        return [MultipleOf(1)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Where the user names none: the size that the layers' pages were laid out for."""
        return cls.settings.block_size

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """(block, head, layer, token): one page per KV head per layer in one arena.

        Where layers of several kinds have blocks of their own, vLLM needs (block, layer, head, token); see `in_strips`.
        """
        return (KVCacheLayout.BLHNC if cls.settings.hybrid or cls.settings.drafter else KVCacheLayout.BHLNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
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

        Window layers beside full ones keep vLLM's, too, in blocks that share the pool best. Where every layer has a
        window, their pages cover the whole sequence, and their kernels skip what lies outside of it; a policy that
        evicts takes windows that no request exceeds. Layers of a draft model stay dense (kvserve/pages/drafts.py).
        """
        if type(spec) not in (FullAttentionSpec, SlidingWindowSpec):
            raise UnsupportedError(f"kvserve cannot serve {type(spec).__name__} layers; use stock vLLM for this model")
        if cls.settings.is_draft:
            return draft_spec(spec, cls.settings.draft_layout().block_size)
        layout = cls.settings.layout(spec.head_size)
        if not layout.has_pages:
            return spec
        if isinstance(spec, SlidingWindowSpec) and cls.settings.keeps_window(spec.sliding_window):
            groups = cls.settings.window_groups(spec.head_size)
            assert groups is not None
            if spec.block_size == 1:  # vLLM asks for it to learn the bytes of a token
                return spec
            padded = spec.num_kv_heads * groups.page_bytes if groups.hybrid.is_shared else None
            return replace(spec, block_size=groups.block_size, page_size_padded=padded)
        draft_block_size = cls.settings.drafts.block_size if cls.settings.drafts else 0
        if not layout.state_blocks:
            return PageSpec.from_attention(spec, layout, draft_block_size)
        if isinstance(spec, SlidingWindowSpec):
            cls.settings.applied_window(spec.sliding_window)
        return EvictingPageSpec.from_attention(spec, layout, draft_block_size)


def draft_spec(spec: AttentionSpec, block_size: int) -> AttentionSpec:
    """The spec of a draft model's layer: every token, also where the layer sees a window (its kernels know).

    vLLM drafts only where all layers of the draft model are one group.
    """
    if isinstance(spec, SlidingWindowSpec):
        own = {field.name for field in fields(FullAttentionSpec)}
        drop = [field.name for field in fields(spec) if field.name not in own]
        spec = replace_as(spec, FullAttentionSpec, drop=drop)
    # vLLM asks for blocks of one token to learn the bytes of one.
    return spec if spec.block_size == 1 else replace(spec, block_size=block_size)


def first_kv_head(config: VllmConfig) -> int:
    """Index of this worker's first KV head in the whole model; ranks that outnumber the heads share them in turn."""
    parallel = config.parallel_config
    rank = parallel.rank % parallel.tensor_parallel_size
    return rank * config.model_config.get_total_num_kv_heads() // parallel.tensor_parallel_size


@cache
def backend_for(settings: EngineSettings) -> type[KvserveBackend]:
    """The backend class of one engine: its settings travel as a class attribute, since vLLM never instantiates it."""
    impl = type("BoundKvserveImpl", (KvserveImpl,), {"settings": settings})
    return type(
        "BoundKvserveBackend",
        (KvserveBackend,),
        {"settings": settings, "get_impl_cls": staticmethod(lambda: impl)},
    )


def _impl_of(layer: Any) -> Any:
    return getattr(layer, "impl", None)


class KvserveImpl(AttentionImpl[StepMetadata]):
    """One attention layer.

    Attributes:
        attention: made when the layer is built, or where it reads tables or learned sinks when the model is loaded.
        transforms: of keys, queries, values and answers; None: the policy has none.
        settings: of the engine; a layer of a draft model has its own.
        target: the layer whose cache this one reads; None: it has its own.
        num_sharers: layers that read this one's.
        is_dense: the layer keeps dense tokens in block tables of vLLM's, whatever the policy: a window layer beside
            full ones, or a layer of a draft model.
        draft_rows: the block table of the step's requests, where the layer is a draft model's (BatchBuilder).
        probe: watches every step while a self-test runs (kvserve/engine/probe_worker.py) or a calibration reads
            (kvserve/engine/row_worker.py, head_worker.py).
    """

    settings: EngineSettings
    draft_rows: torch.Tensor | None = None
    attention: PagedAttention
    transforms: LayerTransforms | None = None
    probe: LayerProbe | RowRecorder | HeadRecorder | None = None
    num_sharers: int = 0

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, alibi_slopes: list[float] | None,
        sliding_window: int | None, kv_cache_dtype: str, logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER, kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        refused = (
            (alibi_slopes is not None, "ALiBi"),
            (attn_type != AttentionType.DECODER, f"{attn_type} attention"),
        )
        for present, feature in refused:
            if present:
                raise UnsupportedError(f"kvserve does not support {feature}; serve this model with stock vLLM")
        self.vllm_config = config = get_current_vllm_config()
        self._settle(config)
        put_in_effect(config.cache_config, self.settings.block_size)
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.scale, self.sliding_window, self.kv_cache_dtype = float(scale), sliding_window, kv_cache_dtype
        is_draft = self.settings.is_draft
        window = sliding_window if is_draft else self.settings.applied_window(sliding_window)
        self.spec = LayerSpec(
            num_heads, num_kv_heads, self.scale, window, first_kv_head(config), logits_soft_cap or None
        )
        self.sinks = sinks  # vLLM's parameter, which is loaded later
        self.is_dense = is_draft or self.settings.keeps_window(sliding_window)
        self.target = target_of(kv_sharing_target_layer_name, config, KvserveImpl)
        self.index = self._find_index()
        if is_draft:
            self.layout = self.settings.draft_layout()
        else:
            self._check_estimates()
            layout_of = self.settings.window_layout if self.is_dense else self.settings.layout
            self.layout = layout_of(head_size)
        try:
            self.own_layout = self.layout.of_layer(self.index)
        except IndexError:
            raise UnsupportedError(
                f"the model has more attention layers than the {self.layout.num_layers} of its configuration, so "
                "the policy's layers would name others than it says; drop layers"
            ) from None
        if not self._waits_for_weights:
            self._make_attention({})

    def _settle(self, config: VllmConfig) -> None:
        """See that the layer has the settings of its own model.

        vLLM caches the backend class per process, under a key that knows neither the policy nor a draft model.
        """
        found = EngineSettings.from_vllm_config(config)
        if found is None or replace(found, is_draft=False) != replace(self.settings, is_draft=False):
            raise UnsupportedError("one process can hold engines of one kvserve policy; use a process for each policy")
        self.settings = found
        share_backend(config)

    @property
    def _waits_for_weights(self) -> bool:
        """Whether the kernels read what is there only when the model is loaded."""
        return self._reads_tables or self.sinks is not None

    @property
    def _reads_tables(self) -> bool:
        return self.settings.policy.reads_tables and not self.is_dense

    def _check_estimates(self) -> None:
        special = (("capped attention logits", self.spec.soft_cap), ("learned attention sinks", self.sinks))
        check_estimates(next((name for name, value in special if value is not None), None), self.settings.policy)

    def _find_index(self) -> int:
        """The index of this layer's cells: vLLM builds layers in order and registers each once its impl is there."""
        if self.target:
            check_alike(self, self.target)
            self.target.num_sharers += 1
            return self.target.index
        context = self.vllm_config.compilation_config.static_forward_context
        impls = map(_impl_of, context.values())
        return sum(isinstance(impl, KvserveImpl) and impl.target is None for impl in impls)

    def _make_attention(self, tables: LayerTables) -> None:
        kernels = self.settings.window_kernels if self.is_dense else self.settings.kernels
        try:
            self.attention = make_attention(kernels, self.own_layout, self.spec, tables)
            if self.settings.policy.transforms.of_layer and not self.is_dense:
                transforms = self.settings.policy.transforms.of_layer
                self.transforms = LayerTransforms(transforms, tables, self.num_kv_heads, self.head_size)
        except ValueError as error:
            raise UnsupportedError(str(error)) from None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """vLLM calls it on every layer when all of its model are built: what it knows of the cache comes of them."""
        put_in_effect(self.vllm_config.cache_config, self.settings.block_size)
        own = self._layers_of_model()
        if self.settings.is_draft:
            layer = next(layer for layer in own.values() if layer.impl is self)
            layer.attn_backend = backend_for(self.settings)  # whose spec is the draft model's
        if next(iter(own.values())).impl is self:
            check_own_layers(self.vllm_config, KvserveImpl)
        if self.sinks is not None:
            self.spec = replace(self.spec, sink_logits=self.sinks.detach().to(torch.float32, copy=True).contiguous())
        tables: LayerTables = {}
        if self._reads_tables:
            owner = self.target or self
            index = next(extract_layer_index(name) for name, layer in own.items() if layer.impl is owner)
            tables = tables_of_layer(self.settings, self.vllm_config, index, self.spec, self.head_size)
        if self._waits_for_weights:
            self._make_attention(tables)

    def _layers_of_model(self) -> dict[str, Any]:
        """vLLM's layers of the same model that are kvserve's, by name."""
        context, is_draft = self.vllm_config.compilation_config.static_forward_context, self.settings.is_draft
        own = {name: layer for name, layer in context.items() if isinstance(_impl_of(layer), KvserveImpl)}
        return {name: layer for name, layer in own.items() if layer.impl.settings.is_draft == is_draft}

    def forward(
        self, layer: Any, query: torch.Tensor, key: Any, value: Any, kv_cache: torch.Tensor,
        attn_metadata: StepMetadata | None, output: torch.Tensor, output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Store this step's K/V and attend.

        Args:
            query: [num_tokens, num_heads, head_dim].
            key, value: [num_tokens, num_kv_heads, head_dim]; None in a layer that reads another's cache.
            kv_cache: [num_blocks, num_kv_heads, block_size, bytes per state].
            output: [num_tokens, num_heads, head_dim], written.
        """
        if attn_metadata is None:  # vLLM's profiling run has no cache yet
            return output.fill_(0)
        n = attn_metadata.num_actual_tokens
        shape, kv_shape = (-1, self.num_heads, self.head_size), (-1, self.num_kv_heads, self.head_size)
        queries, answers = query[:n].view(shape), output[:n].view(shape)
        cells, maps = self._own_cells(kv_cache), self.transforms
        # Kernels, scorers and the probe see rows as the cache has them.
        inner = answers if maps is None else torch.empty_like(answers)
        if maps:
            queries = maps.queries(queries)
        if self.target:
            self._attend_along(self.target, queries, inner, cells, attn_metadata)
        else:
            keys, values = key[:n].view(kv_shape), value[:n].view(kv_shape)
            rows = NewRows(queries, maps.keys(keys), maps.values(values)) if maps else NewRows(queries, keys, values)
            self._attend(rows, inner, cells, attn_metadata)
        if maps:
            answers.copy_(maps.outputs(inner))
        return output

    def _attend(self, rows: NewRows, output: torch.Tensor, cells: torch.Tensor, step: StepMetadata) -> None:
        batch, evictor = step.batch, step.evictor
        received = evictor.before_layer(self.attention, cells) if evictor else None
        if self.num_sharers:
            opened = self.attention.open(rows, cells, batch, Answers(output), received).copied()
            step.shared[self] = SharedStep(opened, self.num_sharers)
        else:
            self.attention.forward(rows, cells, batch, Answers(output), received)
        if self.probe:
            self.probe.observe(*rows, output, cells, batch)
            if self.num_sharers:
                step.shared[self].rows = rows.key.clone(), rows.value.clone()
        if evictor and not self.num_sharers:
            evictor.after_layer(self.attention, cells, rows.query)

    def _attend_along(
        self, target: KvserveImpl, query: torch.Tensor, output: torch.Tensor, cells: torch.Tensor, step: StepMetadata
    ) -> None:
        """Attend to what the target has stored and staged; the last one to do so ends the target's step."""
        shared = step.shared.get(target)
        if shared is None:
            raise RuntimeError("a layer that shares a KV cache ran without the layer whose cache it is")
        self.attention.attend(query, cells, step.batch, shared.opened.staged, Answers(output))
        if self.probe and shared.rows:
            self.probe.observe(query, *shared.rows, output, cells, step.batch)
        shared.waiting -= 1
        if not shared.waiting:
            target.attention.close(step.shared.pop(target).opened)
            if step.evictor:
                step.evictor.after_layer(target.attention, cells, shared.opened.query)

    def _own_cells(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """This layer's cells, uint8 [num_blocks, num_kv_heads, ...]."""
        cells = kv_cache.view(torch.uint8)
        if (self.settings.hybrid or self.settings.drafts) and not self.is_dense:
            assert self.settings.num_layers is not None
            cells = in_strips(cells, self.settings.num_layers)
        if self.layout.is_uniform:
            return cells
        _, place = num_layers_of(cells, self.layout)
        if place != self.index:
            raise RuntimeError(f"vLLM built this layer as number {self.index} and gives it the cells of {place}")
        return self.layout.cells_of(cells, place)
