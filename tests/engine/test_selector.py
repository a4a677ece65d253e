"""Which backend vLLM gets: its own without a policy, kvserve's bound to the policy with one."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import KVTransferConfig, SchedulerConfig, VllmConfig, set_current_vllm_config
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec

import kvserve.engine.settings
from kvserve.attention import gpu as measured
from kvserve.engine import plugin, selector
from kvserve.engine.backend import KvserveBackend, backend_for
from kvserve.engine.settings import (
    CONNECTOR_CONFIG,
    SCHEDULER_PATH,
    EngineSettings,
    _check_steps,
    check_whole_prompts,
)
from kvserve.engine.spec import PageSpec
from kvserve.errors import UnsupportedError
from kvserve.policies.loading import load_policy

HEADS: dict[str, Any] = {"block_size": 64, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}


def bound(policy: str) -> type[KvserveBackend]:
    return backend_for(EngineSettings(load_policy(policy), 64, torch.bfloat16))


@pytest.mark.parametrize("additional_config", [{}, {"another-plugin": {"policy": "kivi-2bit"}}])
def test_without_a_policy_vllm_gets_its_own_backend_back(additional_config: dict[str, Any]) -> None:
    with set_current_vllm_config(VllmConfig(additional_config=additional_config)):
        assert selector.backend is CPUAttentionBackend


def test_a_policy_outside_the_tested_vllm_range_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_new() -> None:
        raise UnsupportedError("vLLM 0.99 is outside the tested range")

    monkeypatch.setattr(kvserve.engine.settings, "check_vllm_version", too_new)
    config = VllmConfig(additional_config={"kvserve": {"policy": "kivi-2bit"}})
    with set_current_vllm_config(config), pytest.raises(UnsupportedError, match=re.escape("0.99")):
        _ = selector.backend


@pytest.mark.parametrize(
    ("section", "field", "value", "option"),
    [
        ("cache_config", "cache_dtype", "fp8", "--kv-cache-dtype"),
        ("cache_config", "kv_cache_dtype_skip_layers", ["0"], "--kv-cache-dtype-skip-layers"),
        ("cache_config", "kv_offloading_size", 4.0, "--kv-offloading-size"),
        ("cache_config", "block_size", 16, "--block-size"),
        ("parallel_config", "decode_context_parallel_size", 2, "--decode-context-parallel-size"),
        ("parallel_config", "prefill_context_parallel_size", 2, "--prefill-context-parallel-size"),
        ("attention_config", "backend", AttentionBackendEnum.FLASH_ATTN, "--attention-backend"),
        (None, "speculative_config", object(), "--speculative-config"),
        (None, "kv_transfer_config", SimpleNamespace(kv_connector="LMCacheConnectorV1"), "--kv-transfer-config"),
    ],
)
def test_the_plugin_refuses_what_the_command_line_refuses(section: str | None, field: str, value: Any, option: str):
    config = VllmConfig(additional_config={"kvserve": {"policy": "kivi-2bit"}})
    config.cache_config.block_size, config.cache_config.user_specified_block_size = 64, True
    object.__setattr__(getattr(config, section) if section else config, field, value)
    with set_current_vllm_config(config), pytest.raises(UnsupportedError, match=re.escape(option)):
        _ = selector.backend


@pytest.mark.parametrize(
    ("transfer", "scheduler", "option"),
    [
        (None, {}, "--kv-transfer-config"),
        (KVTransferConfig(**CONNECTOR_CONFIG), {"scheduler_cls": None}, "--scheduler-cls"),
        (KVTransferConfig(**CONNECTOR_CONFIG), {"max_num_seqs": 32, "max_num_batched_tokens": 62}, "at least 63"),
        (KVTransferConfig(**CONNECTOR_CONFIG), {"max_num_seqs": 4, "max_num_scheduled_tokens": 24}, "scheduled-tokens"),
        (KVTransferConfig(**CONNECTOR_CONFIG), {"long_prefill_token_threshold": 31}, "--long-prefill-token-threshold"),
    ],
)
def test_eviction_is_refused_without_what_it_needs_in_the_scheduler(transfer, scheduler, option: str) -> None:
    config = VllmConfig(additional_config={"kvserve": {"policy": "snapkv"}})  # its window has 32 tokens
    config.cache_config.block_size = 64
    object.__setattr__(config, "kv_transfer_config", transfer)
    for field, value in {"scheduler_cls": SCHEDULER_PATH, **scheduler}.items():
        object.__setattr__(config.scheduler_config, field, value)
    with pytest.raises(UnsupportedError, match=re.escape(option)):
        EngineSettings.from_vllm_config(config)


@pytest.mark.parametrize(
    "scheduler",
    [
        {"max_num_seqs": 4, "max_num_scheduled_tokens": 35},
        {"max_num_seqs": 4, "max_num_batched_tokens": 35, "max_num_scheduled_tokens": 64},
        {"max_num_seqs": 64, "max_num_active_seqs": 4, "max_num_scheduled_tokens": 35},
        {"max_num_seqs": 4, "long_prefill_token_threshold": 32},
    ],
)
def test_the_smallest_steps_that_hold_the_window_beside_all_other_requests_are_accepted(scheduler) -> None:
    config = SchedulerConfig(max_model_len=512, is_encoder_decoder=False, max_num_batched_tokens=512)
    for field, value in scheduler.items():
        setattr(config, field, value)
    _check_steps(config, window=32)
    if "long_prefill_token_threshold" not in scheduler:
        with pytest.raises(UnsupportedError, match="at least 36"):
            _check_steps(config, window=33)


def test_steps_too_small_for_a_prompt_that_must_not_be_divided_are_refused() -> None:
    config = SchedulerConfig(max_model_len=512, is_encoder_decoder=False, max_num_batched_tokens=512)
    config.enable_chunked_prefill, config.max_num_scheduled_tokens = False, 511
    with pytest.raises(UnsupportedError, match="--max-num-scheduled-tokens must be at least --max-model-len 512"):
        check_whole_prompts(config, 512)
    check_whole_prompts(config, 511)


def test_the_dense_policy_keeps_vllms_spec() -> None:
    spec = FullAttentionSpec(**HEADS)
    assert bound("none").customize_spec(spec) is spec


@pytest.mark.parametrize("spec", [FullAttentionSpec(**HEADS), SlidingWindowSpec(**HEADS, sliding_window=128)])
def test_a_compressing_policy_gives_full_and_window_layers_the_same_pages(spec: Any) -> None:
    paged = bound("kivi-2bit").customize_spec(spec)
    assert isinstance(paged, PageSpec)
    assert paged == bound("kivi-2bit").customize_spec(FullAttentionSpec(**HEADS))
    assert paged.page_size_bytes == 2 * paged.layout.cell_bytes
    assert paged.page_size_bytes < spec.page_size_bytes / 5


def test_layers_with_another_kind_of_cache_are_refused() -> None:
    spec = MLAAttentionSpec(**{**HEADS, "num_kv_heads": 1})
    with pytest.raises(UnsupportedError, match="stock vLLM"):
        bound("kivi-2bit").customize_spec(spec)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> VllmConfig:
    """A configuration as on a GPU; nothing runs there."""
    for module in ("kvserve.engine.device", "kvserve.engine.settings"):
        monkeypatch.setattr(f"{module}.device_type", lambda: "cuda")
    monkeypatch.setattr("kvserve.engine.settings.gpu_capability", lambda: (9, 0))
    plugin.register()
    config = VllmConfig(additional_config={"kvserve": {"policy": "kivi-2bit"}})
    config.cache_config.block_size = 64
    config.attention_config.backend = AttentionBackendEnum.CUSTOM
    config.model_config = ModelStub()
    return config


class ModelStub:
    """What EngineSettings reads of a model."""

    dtype, runner_type, convert_type = torch.bfloat16, "generate", "none"
    is_mm_prefix_lm = False
    hf_config = SimpleNamespace(to_dict=lambda: {"head_dim": 64})

    def get_num_attention_heads(self, parallel: Any) -> int:
        return 6

    def get_num_kv_heads(self, parallel: Any) -> int:
        return 2

    max_model_len = 1024

    def get_head_size(self) -> int:
        return 64

    def get_num_layers(self, parallel: Any) -> int:
        return 2


def test_a_gpu_gets_the_triton_kernels_under_the_name_custom(gpu: VllmConfig) -> None:
    found = EngineSettings.from_vllm_config(gpu)
    assert found is not None and (found.kernels_asked, found.kernels) == ("auto", "triton")
    with set_current_vllm_config(gpu):
        backend = AttentionBackendEnum.CUSTOM.get_class()
        assert backend is backend_for(found) and AttentionBackendEnum[backend.get_name()] is AttentionBackendEnum.CUSTOM
        assert resolve_obj_by_qualname(".".join(backend.full_cls_name())) is backend


def test_a_gpu_decodes_with_the_kernels_measured_fastest_unless_others_are_named(
    gpu: VllmConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def kernels_for(**section: str) -> str:
        gpu.additional_config = {"kvserve": {"policy": "kivi-2bit", **section}}
        found = EngineSettings.from_vllm_config(gpu)
        assert found is not None
        return found.kernels

    monkeypatch.setattr(measured, "CUDA_IS_FASTER", {measured.Format((9, 0), 64, 2, 2)})
    assert kernels_for() == "triton", "not built"
    monkeypatch.setattr(measured, "CUDA_LIBRARY", tmp_path)
    assert (kernels_for(), kernels_for(kernels="triton"), kernels_for(kernels="cuda")) == ("cuda", "triton", "cuda")
    monkeypatch.setattr(ModelStub, "dtype", torch.float32)
    assert kernels_for() == "triton"
    with pytest.raises(UnsupportedError, match="--kernels cuda needs a model in float16 or bfloat16"):
        kernels_for(kernels="cuda")


@pytest.mark.parametrize(
    ("section", "field", "value", "part"),
    [
        ("attention_config", "backend", None, "needs --attention-backend CUSTOM"),
        (
            "attention_config",
            "backend_per_kind",
            {"full_attention": AttentionBackendEnum.FLASH_ATTN},
            "drop backend",
        ),
        ("parallel_config", "enable_dbo", True, "drop --enable-dbo"),
        (None, "additional_config", {"kvserve": {"policy": "int8", "kernels": "native"}}, "use --kernels triton"),
    ],
)
def test_what_a_gpu_cannot_do_is_refused(
    gpu: VllmConfig, section: str | None, field: str, value: Any, part: str
) -> None:
    object.__setattr__(getattr(gpu, section) if section else gpu, field, value)
    with pytest.raises(UnsupportedError, match=part):
        EngineSettings.from_vllm_config(gpu)


def test_layers_of_different_codecs_run_on_the_triton_kernels(
    gpu: VllmConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu.additional_config = {"kvserve": {"policy": "kivi-2bit", "set": {"layers": {"0": "dense"}}}}
    monkeypatch.setattr(measured, "CUDA_IS_FASTER", {measured.Format((9, 0), 64, 2, 2)})
    monkeypatch.setattr(measured, "CUDA_LIBRARY", tmp_path)
    settings = EngineSettings.from_vllm_config(gpu)
    assert settings is not None and settings.kernels == "triton"


@pytest.mark.parametrize(
    ("policy", "layers", "head_dim", "part"),
    [
        ("int8", {}, 64, "policy int8 (K 8-bit, V 8-bit)"),
        ("kivi-2bit", {"-1": "dense"}, 64, "layer 1 (dense)"),
        ("kivi-2bit", {}, 96, "head_dim 96"),
    ],
)
def test_what_the_cuda_kernels_do_not_cover_is_named(
    gpu: VllmConfig, monkeypatch: pytest.MonkeyPatch, policy: str, layers: dict[str, str], head_dim: int, part: str
) -> None:
    monkeypatch.setattr(ModelStub, "get_head_size", lambda self: head_dim)
    gpu.additional_config = {"kvserve": {"policy": policy, "kernels": "cuda", "set": {"layers": layers}}}
    with pytest.raises(
        UnsupportedError, match=re.escape(f"--kernels cuda does not cover {part}; use --kernels triton")
    ):
        EngineSettings.from_vllm_config(gpu)


def test_the_backend_of_another_plugin_stays_in_place_and_is_refused(gpu: VllmConfig) -> None:
    try:
        register_backend(AttentionBackendEnum.CUSTOM, "another.plugin.Backend")
        plugin.register()
        with pytest.raises(UnsupportedError, match="of another plugin"):
            EngineSettings.from_vllm_config(gpu)
    finally:
        AttentionBackendEnum.CUSTOM.clear_override()
        plugin.register()


def test_the_name_custom_without_a_policy_is_refused_on_a_gpu(gpu: VllmConfig) -> None:
    gpu.additional_config = {}
    with set_current_vllm_config(gpu), pytest.raises(UnsupportedError, match="needs a policy"):
        AttentionBackendEnum.CUSTOM.get_class()
