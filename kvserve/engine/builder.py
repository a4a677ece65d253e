"""What a step's batch looks like to the kernels.

Seam: `vllm.v1.attention.backend.AttentionMetadataBuilder`, of both model runners. All tables are the runner's own, on
its device; it keeps their addresses and pads them for CUDA graphs with rows that have no tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from kvserve.attention.base import Batch
from kvserve.engine.connector import current_plans, drop_ended, follow_plans
from kvserve.engine.kept_tables import KeptTables
from kvserve.engine.range_watch import RangeWatch
from kvserve.engine.settings import EngineSettings
from kvserve.engine.sharing import SharedStep, num_owners
from kvserve.engine.stats import worker_log
from kvserve.errors import UnsupportedError
from kvserve.eviction.collector import Collector
from kvserve.eviction.evictor import StepEvictor
from kvserve.policies.base import Eviction


@dataclass
class StepMetadata:
    """One step's batch, as the kernels want it.

    Attributes:
        shared: by layer, steps that layers sharing its cache have still to answer; empty when the step ends.
    """

    num_actual_tokens: int
    batch: Batch
    plan: Callable[[Batch], StepEvictor | None] | None = None
    shared: dict[Any, SharedStep] = field(default_factory=dict)

    @cached_property
    def evictor(self) -> StepEvictor | None:
        """What has to be done after each layer.

        Made by the first layer that runs: Model Runner V2 builds the metadata before the worker hears of the plans.
        """
        return self.plan(self.batch) if self.plan else None


class BatchBuilder(AttentionMetadataBuilder[StepMetadata]):
    """Passes lengths and rows through; positions follow from them.

    Each group of layers has one. Those of window layers and of a draft model evict nothing.

    Attributes:
        drafting: a layer of the draft model, where the group has some. Their group has a second builder, vLLM's
            proposer's; what they both need to know lies in that layer.
    """

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        settings = EngineSettings.from_vllm_config(vllm_config)
        assert settings is not None
        self.drafting = draft_layer(vllm_config, layer_names)
        is_window = settings.hybrid is not None and isinstance(kv_cache_spec, SlidingWindowSpec)
        is_dense = is_window or (self.drafting is not None and settings.policy.has_pages)
        self.eviction = None if is_dense else settings.policy.eviction
        self.num_layers = num_owners(layer_names, vllm_config)
        if not is_dense:
            check_layers(settings, self.num_layers)
        self.has_graphs = settings.kernels != "native"
        self.range_watch = None if is_dense else RangeWatch(device)  # one watches the rows of all layers
        if self.eviction:
            worker_log.first_layer = min(map(extract_layer_index, layer_names), default=0)
            self.collector = make_collector(self.eviction, vllm_config.model_config, device)
            drop_ended(self.collector)
            max_blocks = vllm_config.model_config.max_model_len // kv_cache_spec.block_size
            self.kept_tables = KeptTables(vllm_config.scheduler_config.max_num_seqs, max_blocks, device)
            follow_plans(self.kept_tables)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Which batches may run as one CUDA graph; the others run attention between piecewise graphs."""
        settings = EngineSettings.from_vllm_config(vllm_config)
        return graph_support(settings) if settings else AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StepMetadata:
        """The batch of this step, in int32 tensors of the runner's device."""
        common = common_attn_metadata
        assert common.causal is True, "kvserve serves causal decoders only"
        if self.range_watch:
            self.range_watch.look()
        if self.drafting:
            self.drafting.draft_rows = common.block_table_tensor
        batch = Batch(
            query_start_loc=common.query_start_loc[: common.num_reqs + 1],
            seq_lens=common.seq_lens[: common.num_reqs],
            block_table=common.block_table_tensor[: common.num_reqs],
            max_query_len=common.max_query_len,
        )
        if not self.eviction:
            return StepMetadata(common.num_actual_tokens, batch)
        kept = current_plans().kept
        table = self.kept_tables.table(batch.block_table, kept)
        if kept or self.has_graphs:  # a graph is captured without kept rows and replayed with them
            batch.kept = table
        return StepMetadata(common.num_actual_tokens, batch, self._plan)

    def build_for_drafting(self, common_attn_metadata: CommonAttentionMetadata, draft_index: int) -> StepMetadata:
        """The batch of a pass of the draft model.

        Model Runner V1 gives its proposer the block table of the first group, whichever group the draft model's layers
        are (`GPUModelRunner._build_attention_metadata`). Their own is the one that the step was built with.
        """
        if self.drafting is None or self.drafting.draft_rows is None:
            raise RuntimeError("vLLM drafts with layers that are none of a draft model's, or before a step was built")
        own = common_attn_metadata.replace(block_table_tensor=self.drafting.draft_rows)
        return self.build(0, own, fast_build=True)

    def _plan(self, batch: Batch) -> StepEvictor | None:
        """Waits for the device, but only where rows have something to remember or to give up."""
        assert self.eviction is not None
        plans = current_plans()
        if not plans.work:
            return None
        rows = enumerate(batch.block_table[:, 0].tolist())
        steps = {request: plans.work[block] for request, block in rows if block in plans.work}
        return StepEvictor(self.eviction, steps, batch, self.num_layers, worker_log, self.collector)


def draft_layer(vllm_config: Any, layer_names: list[str]) -> Any:
    """The implementation of the first layer of the draft model among these; None: there is none."""
    context = vllm_config.compilation_config.static_forward_context
    impls = (getattr(context[name], "impl", None) for name in sorted(layer_names) if name in context)
    return next((impl for impl in impls if impl is not None and impl.settings.is_draft), None)


def check_layers(settings: EngineSettings, num_cached: int) -> None:
    """Refuse a policy that names layers where not every layer of the model has a KV cache on this worker."""
    policy = settings.policy
    if (settings.hybrid or settings.drafts) and num_cached != settings.num_layers:
        raise UnsupportedError(
            f"{num_cached} layers of the model see every token, and its configuration says {settings.num_layers}, for "
            "which blocks were counted; serve it with stock vLLM, without kvserve"
        )
    named = "layers" if policy.layers else "eviction.spare_layers"
    if policy.eviction and policy.eviction.formats and num_cached != settings.num_layers:
        raise UnsupportedError(
            f"{num_cached} of the model's {settings.num_layers} layers have a KV cache, and blocks of "
            f"{policy.eviction.retention.name} are counted for all; use another retention, or codec: int8 alone"
        )
    if policy.names_layers and num_cached != settings.num_layers:
        raise UnsupportedError(
            f"{num_cached} of the model's {settings.num_layers} layers have a KV cache, so {named} would name others "
            "than it says; drop it"
        )


def graph_support(settings: EngineSettings) -> AttentionCGSupport:
    """Full CUDA graphs for steps of one token per request, where no such step can have to evict.

    vLLM replays a full graph for every step of single tokens, and no Python runs between its layers. A prompt that is
    cut once, scored by a window of two queries or more, is cut by a step of at least two tokens (EvictionPlan). A
    policy that cuts while it generates or within prompts, or notes every query, may have to act in any step.
    """
    eviction = settings.policy.eviction
    if settings.kernels == "native":
        return AttentionCGSupport.NEVER
    if eviction and (eviction.schedule.repeats or eviction.scorer.collects or eviction.window < 2):
        return AttentionCGSupport.NEVER
    return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


def make_collector(eviction: Eviction, model_config: Any, device: torch.device) -> Collector:
    """What collects for the scorer; refuses a model whose queries it cannot turn back."""
    if "query_statistics" not in eviction.scorer.needs:
        return Collector(eviction.scorer)
    from kvserve.engine.rotary import model_rotary

    return Collector(eviction.scorer, model_rotary(model_config, device))
