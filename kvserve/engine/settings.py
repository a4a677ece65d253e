"""What `additional_config={"kvserve": {...}}` asks for, checked against the rest of vLLM's configuration."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CompilationMode

from kvserve.accounting.plan import check_limit
from kvserve.checks import (
    ServeOptions,
    check_compiled,
    check_hybrid,
    check_model,
    check_options,
    check_sharing,
    check_stages,
    check_window,
    check_windows,
    choose_kernels,
    special_logits,
    text_config,
)
from kvserve.compat import check_vllm_version
from kvserve.connectors import Identity, asked_connector, is_wrapped, wrapped
from kvserve.engine.block_size import asked_block_size
from kvserve.engine.device import check_gpu, device_type, gpu_capability
from kvserve.engine.drafts import draft_layers, is_draft_config, target_config
from kvserve.engine.identity import identity_of
from kvserve.engine.images import check_images
from kvserve.engine.layer_tables import chosen_calibration
from kvserve.errors import UnsupportedError
from kvserve.layer_kinds import hybrid_of, num_sharing_of
from kvserve.pages.drafts import DraftGroup, DraftLayers
from kvserve.pages.layout import PageLayout
from kvserve.pages.windows import Hybrid, WindowGroups
from kvserve.policies.base import Eviction, Policy
from kvserve.policies.limits import request_limit
from kvserve.policies.loading import load_policy, policy_from_config

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig

    from kvserve.calibration.artefact import Calibration

CONFIG_KEY = "kvserve"
# What a policy that evicts needs in the scheduler (engine/connector.py, engine/scheduler.py).
CONNECTOR_NAME = "KvserveConnector"
CONNECTOR_CONFIG = {
    "kv_connector": CONNECTOR_NAME, "kv_role": "kv_producer", "kv_connector_module_path": "kvserve.engine.connector",
}  # fmt: skip
SCHEDULER_PATH = "kvserve.engine.scheduler.make_scheduler"
CPU_WORKER_PATH = "kvserve.engine.cpu_worker.SeededCpuWorker"


def section_of(config: VllmConfig) -> dict[str, Any] | None:
    """kvserve's part of `additional_config`; None: there is none."""
    additional: Any = config.additional_config
    return additional.get(CONFIG_KEY) if isinstance(additional, dict) else None


@dataclass(frozen=True)
class EngineSettings:
    """The policy in effect and the numbers of the engine that its pages depend on.

    Attributes:
        num_layers: layers of this pipeline stage that have the policy's pages; not those that read another's.
        hybrid: which layers do, where window layers keep a cache of their own; None: all.
        drafter: the layers of a draft model; None: there is none.
        drafts: how they share the pool with the policy's pages; None: their blocks are as the model's, or there is no
            draft model.
        is_draft: whether the layers these settings are for are the draft model's.
    """

    policy: Policy
    block_size: int  # in effect
    model_dtype: torch.dtype
    query_group: int = 1  # query heads that share one KV head
    kernels_asked: str = "auto"
    kernels: str = "native"  # in effect
    num_layers: int | None = None
    max_model_len: int | None = None
    calibration: Calibration | None = None
    hybrid: Hybrid | None = None
    draft_tokens: int = 0  # speculated in a step of each request
    block_size_asked: int | None = None
    drafter: DraftLayers | None = None
    drafts: DraftGroup | None = None
    is_draft: bool = False

    @classmethod
    def from_vllm_config(cls, vllm_config: VllmConfig) -> EngineSettings | None:
        """Settings of this engine, or None where no policy is set.

        Raises:
            PolicyError: the policy does not exist or does not validate.
            UnsupportedError: another setting or the model rules the policy out; the message names the fix.
        """
        if is_draft_config(vllm_config):
            own = cls.from_vllm_config(target_config(vllm_config))
            return own and replace(own, is_draft=True)
        section = section_of(vllm_config)
        if section is None:
            return None
        check_vllm_version()
        policy, asked = policy_from_config(section), section.get("kernels", "auto")
        kernels = choose_kernels(asked, device_type())
        check_compiled(policy, kernels)
        if device_type() == "cuda":
            check_gpu(vllm_config)
        # The model first: vLLM sets options itself where a model needs them, which nobody could drop.
        if vllm_config.model_config is not None:
            check_model_config(vllm_config.model_config, policy)
        hybrid = hybrid_layers(vllm_config, policy)
        drafter = draft_layers(vllm_config, policy, hybrid)
        shares_pool = policy.has_pages and (hybrid or drafter)
        size_asked = asked_block_size(vllm_config.cache_config, policy.tile_tokens if shares_pool else None)
        block_size = size_asked or policy.tile_tokens
        check_config(vllm_config, policy, block_size)
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        group = model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel)
        calibration = chosen_calibration(section, policy, model)
        policy = policy.with_head_tables(calibration.head_tables()) if calibration else policy
        settings = cls(
            policy, block_size, model.dtype, group, asked, kernels,
            hybrid.num_full if hybrid else num_cached_layers(model, parallel), model.max_model_len, calibration, hybrid,
            vllm_config.num_speculative_tokens, size_asked, drafter,
        ).with_draft_group(model.get_head_size(), model.get_num_kv_heads(parallel))  # fmt: skip
        settings.check_against(vllm_config)
        logits = special_logits(text_config(model.hf_config.to_dict()))
        return settings.with_gpu_kernels(model.get_head_size(), logits) if device_type() == "cuda" else settings

    def check_against(self, config: VllmConfig) -> None:
        """Refuse what only shows once the pages are laid out.

        Raises:
            UnsupportedError: the budget names heads that the model has not, or its limit cannot hold.
        """
        model = config.model_config
        if self.policy.eviction:
            check_heads(self.policy.eviction, model, config.parallel_config)
        self.check_own_limit(model.get_head_size(), model.max_model_len)

    def check_own_limit(self, head_dim: int, max_model_len: int) -> None:
        """Refuse a policy whose own limit cannot hold.

        Raises:
            UnsupportedError: naming one that can.
        """
        eviction = self.policy.eviction
        limit = eviction and request_limit(eviction, self.policy, {})
        if limit:
            try:
                check_limit(self.layout(head_dim), limit, max_model_len)
            except ValueError as error:
                raise UnsupportedError(str(error)) from None

    def with_gpu_kernels(self, head_dim: int, logits: str | None = None) -> EngineSettings:
        """With what was measured fastest, where nobody named the kernels.

        Args:
            logits: what is special about the model's (`kvserve.checks.special_logits`).

        Raises:
            UnsupportedError: the CUDA kernels were named, and cannot serve the model's dtype, the policy or a layer.
        """
        from kvserve.attention.gpu import CUDA_DTYPES, measured_kernels, uncovered_by_cuda

        if self.kernels == "cuda" and self.model_dtype not in CUDA_DTYPES:
            raise UnsupportedError(
                f"--kernels cuda needs a model in float16 or bfloat16, this one is {self.model_dtype}; set --dtype, or "
                "use --kernels triton"
            )
        if self.kernels == "cuda" and (uncovered := logits or uncovered_by_cuda(self.layout(head_dim))):
            raise UnsupportedError(
                f"--kernels cuda does not cover {uncovered}; use --kernels triton, or drop the option"
            )
        if self.kernels_asked != "auto":
            return self
        if logits:
            return replace(self, kernels="triton")
        return replace(self, kernels=measured_kernels(self.layout(head_dim), self.model_dtype, gpu_capability()))

    def layout(self, head_dim: int) -> PageLayout:
        """The pages of attention layers with this head_dim.

        Stages of a pipeline may differ in their number of layers. vLLM wants the specs of all stages to be equal, so
        the layout has the number only where a policy names layers, which pipelines do not allow.
        """
        layout = PageLayout.build(
            self.policy, head_dim, self.block_size, self.model_dtype, query_group=self.query_group,
            num_layers=self.num_layers if self.policy.names_layers else None,
        )  # fmt: skip
        return layout.with_drafts(self.draft_tokens)

    def identity(self, model: ModelConfig) -> Identity:
        """What another engine must have in common with this one to read its pages.

        Raises:
            UnsupportedError: the model's weights cannot be read.
        """
        return identity_of(self.layout(model.get_head_size()), self.calibration, model.model)

    def applied_window(self, window: int | None) -> int | None:
        """The window of a layer, or None where no request is longer.

        Raises:
            UnsupportedError: it applies, and the policy evicts or knows of another one.
        """
        if window is None or (self.max_model_len is not None and window >= self.max_model_len):
            return None
        if self.hybrid is None:
            check_window(window, self.policy, self.max_model_len or window + 1)
        elif window != self.hybrid.window:
            raise UnsupportedError(
                f"the model has layers that attend to the last {window:,} tokens, and its configuration says "
                f"{self.hybrid.window:,}; serve it with stock vLLM, without kvserve"
            )
        return window

    def keeps_window(self, window: int | None) -> bool:
        """Whether a layer with this window has vLLM's window cache, and not the policy's pages."""
        return self.hybrid is not None and self.applied_window(window) is not None

    def window_groups(self, head_dim: int) -> WindowGroups | None:
        """How the model's window layers share the pool; None: they have no cache of their own."""
        if self.hybrid is None:
            return None
        slot_bytes = 2 * head_dim * self.model_dtype.itemsize
        cell_bytes, longest = self.layout(head_dim).cell_bytes, self.max_model_len or self.hybrid.window
        return WindowGroups.choose(self.hybrid, cell_bytes, slot_bytes, self.block_size, longest)

    def with_draft_group(self, head_dim: int, num_kv_heads: int) -> EngineSettings:
        """With the draft model's part of the pool.

        Args:
            head_dim, num_kv_heads: of the model, on one rank.
        """
        if self.drafter is None or not self.policy.has_pages:
            return self
        assert self.num_layers is not None
        page_bytes, itemsize = num_kv_heads * self.layout(head_dim).cell_bytes, self.model_dtype.itemsize
        drafts = DraftGroup.choose(
            self.drafter, page_bytes, self.num_layers, self.block_size, itemsize, self.draft_tokens
        )
        return replace(self, drafts=drafts)

    def draft_layout(self) -> PageLayout:
        """The dense blocks of the draft model's layers."""
        assert self.drafter is not None
        size = self.drafts.block_size if self.drafts else self.block_size
        return PageLayout.build(load_policy("none"), self.drafter.head_dim, size, self.model_dtype)

    @property
    def window_kernels(self) -> str:
        """The attention kernels of dense layers: the CUDA kernels have none for dense tokens."""
        return "triton" if self.kernels == "cuda" else self.kernels

    def window_layout(self, head_dim: int) -> PageLayout:
        """The dense blocks of the window layers."""
        groups = self.window_groups(head_dim)
        assert groups is not None
        return PageLayout.build(load_policy("none"), head_dim, groups.block_size, self.model_dtype)


def hybrid_layers(config: VllmConfig, policy: Policy) -> Hybrid | None:
    """The full layers and the window layers of a model; None: all layers have one cache.

    Raises:
        UnsupportedError: an option does not allow both.
    """
    model = config.model_config
    if model is None or not policy.has_pages:
        return None
    hybrid = hybrid_of(text_config(model.hf_config.to_dict()), model.max_model_len)
    check_hybrid(
        hybrid, policy, asked_block_size(config.cache_config), config.parallel_config.pipeline_parallel_size,
        config.scheduler_config.disable_hybrid_kv_cache_manager,
    )  # fmt: skip
    if hybrid is not None and is_wrapped(config.kv_transfer_config):
        raise UnsupportedError(
            f"KV connectors move the blocks of all layers alike, and {hybrid.num_windows} layers have a sliding "
            "window; drop --kv-transfer-config"
        )
    return hybrid


def num_cached_layers(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Layers of this pipeline stage that have a KV cache of their own; see kvserve.layer_kinds."""
    return int(model.get_num_layers(parallel)) - num_sharing_of(text_config(model.hf_config.to_dict()))


def check_config(config: VllmConfig, policy: Policy, block_size: int) -> None:
    """Refuse options that do not go with the policy.

    Args:
        block_size: of the policy's pages.

    Raises:
        UnsupportedError: naming the option.
    """
    check_options(replace(serve_options(config), block_size=block_size), policy)
    check_transfer(config)
    num_stages = config.parallel_config.pipeline_parallel_size
    if config.model_config is not None:
        has_connector = is_wrapped(config.kv_transfer_config)
        check_sharing(config.model_config.hf_config.to_dict(), num_stages, has_connector=has_connector)
    check_stages(num_stages, device_type(), config.compilation_config.mode not in (None, CompilationMode.NONE))
    if policy.names_layers and num_stages > 1:
        raise UnsupportedError(
            f"policy {policy.name} names layers or heads of the whole model, and a stage of a pipeline has some of "
            "them; drop --pipeline-parallel-size"
        )
    if policy.eviction:
        check_eviction(config, 1 if policy.eviction.remembers_queries else policy.eviction.window)
    check_whole_prompts(config.scheduler_config, config.model_config.max_model_len)


def check_heads(eviction: Eviction, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse a budget that names heads which the model does not have.

    Raises:
        UnsupportedError: naming those that it has.
    """
    try:
        eviction.budget.check(num_cached_layers(model, parallel), model.get_total_num_kv_heads())
    except ValueError as error:
        raise UnsupportedError(str(error)) from None


def check_model_config(model: ModelConfig, policy: Policy, name: str = "this model") -> None:
    """All checks of a model that vLLM resolved and did not load yet.

    Raises:
        UnsupportedError: see kvserve.checks.
    """
    hf_config = model.hf_config.to_dict()
    check_model(hf_config, policy, name)
    check_images(model, name)
    check_windows(hf_config, policy, model.max_model_len, name)
    if policy.turns_queries and model.using_transformers_backend():
        from kvserve.engine.rotary import transformers_rotary

        transformers_rotary(model.hf_text_config)


def scheduler_options() -> dict[str, Any]:
    """vLLM's engine arguments for a policy that evicts."""
    from vllm.config import KVTransferConfig

    return {"kv_transfer_config": KVTransferConfig(**CONNECTOR_CONFIG), "scheduler_cls": SCHEDULER_PATH}


def check_eviction(config: VllmConfig, window: int) -> None:
    """Refuse eviction without its two helpers in the scheduler (`kvserve serve` sets both), or with too small steps.

    Args:
        window: last prompt tokens that one step must compute together.

    Raises:
        UnsupportedError: naming the options.
    """
    transfer = config.kv_transfer_config
    if not _is_own(transfer) or config.scheduler_config.scheduler_cls != SCHEDULER_PATH:
        raise UnsupportedError(
            "a policy that evicts needs two more options: "
            f"--scheduler-cls {SCHEDULER_PATH} --kv-transfer-config '{json.dumps(CONNECTOR_CONFIG)}'"
        )
    _check_steps(config.scheduler_config, window)


def _step_budget(scheduler: SchedulerConfig) -> tuple[str, int]:
    """The option that bounds a step, and how many tokens that is."""
    scheduled, batched = scheduler.max_num_scheduled_tokens, scheduler.max_num_batched_tokens
    if scheduled is not None and scheduled < batched:
        return "--max-num-scheduled-tokens", scheduled
    return "--max-num-batched-tokens", batched


def check_whole_prompts(scheduler: SchedulerConfig, max_model_len: int) -> None:
    """Refuse steps that are too small for a prompt which must not be divided: it would wait for ever.

    Raises:
        UnsupportedError: naming the option.
    """
    option, budget = _step_budget(scheduler)
    if not scheduler.enable_chunked_prefill and budget < max_model_len:
        raise UnsupportedError(
            f"without chunked prefill one step computes a whole prompt: {option} must be at least --max-model-len "
            f"{max_model_len}, got {budget}"
        )


def _check_steps(scheduler: SchedulerConfig, window: int) -> None:
    """The window's rows must fit in a step beside one token of every other request, or they could wait for ever."""
    option, budget = _step_budget(scheduler)
    num_seqs = min(scheduler.max_num_seqs, scheduler.max_num_active_seqs or scheduler.max_num_seqs)
    needed = window + num_seqs - 1
    if budget < needed:
        raise UnsupportedError(
            f"the scorer reads the last {window} prompt tokens in one step: {option} must be at least {needed} with "
            f"--max-num-seqs {num_seqs}, got {budget}"
        )
    if 0 < scheduler.long_prefill_token_threshold < window:
        raise UnsupportedError(
            f"the scorer reads the last {window} prompt tokens in one step: --long-prefill-token-threshold must be 0 "
            f"or at least {window}, got {scheduler.long_prefill_token_threshold}"
        )


def check_transfer(config: VllmConfig) -> None:
    """Refuse a KV connector that `kvserve serve` would have wrapped, or that the device or the model rules out.

    Raises:
        UnsupportedError: naming the option.
    """
    transfer = config.kv_transfer_config
    if transfer is None or _is_own(transfer):
        return
    if not is_wrapped(transfer):
        both = wrapped({"kv_connector": transfer.kv_connector})
        raise UnsupportedError(
            f"{transfer.kv_connector} would move blocks that are not the tokens it takes them for; add "
            f"{json.dumps(both)[1:-1]} to --kv-transfer-config"
        )
    if asked_connector(transfer) == "OffloadingConnector" and device_type() != "cuda":
        raise UnsupportedError("vLLM's OffloadingConnector runs on GPUs alone; drop --kv-transfer-config")


def serve_options(config: VllmConfig) -> ServeOptions:
    """What vLLM resolved, under the names of its command line."""
    cache, parallel, model = config.cache_config, config.parallel_config, config.model_config
    return ServeOptions(
        dtype=model and model.dtype,
        kv_cache_dtype=cache.cache_dtype,
        kv_cache_dtype_skip_layers=cache.kv_cache_dtype_skip_layers,
        block_size=asked_block_size(cache),
        speculative_config=config.speculative_config,
        kv_transfer_config=None if _is_own(config.kv_transfer_config) else config.kv_transfer_config,
        tensor_parallel_size=parallel.tensor_parallel_size,
        kv_offloading_size=cache.kv_offloading_size,
        kv_sharing_fast_prefill=cache.kv_sharing_fast_prefill,
        decode_context_parallel_size=parallel.decode_context_parallel_size,
        prefill_context_parallel_size=parallel.prefill_context_parallel_size,
        attention_backend=config.attention_config.backend,
        runner=model and model.runner_type,
        convert=model and model.convert_type,
    )


def _is_own(transfer: Any) -> bool:
    return getattr(transfer, "kv_connector", None) == CONNECTOR_NAME
