"""Every layer with a KV cache is kvserve's, and has the pages of the others, or the model is refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvserve.checks import check_stages
from kvserve.engine.backend import KvserveImpl, backend_for
from kvserve.engine.endpoint import ReadyEndpoint
from kvserve.engine.own_layers import check_own_layers
from kvserve.engine.probe_worker import ProbeWorker
from kvserve.engine.request_check import RequestCheck
from kvserve.engine.self_test import EXTENSION_PATH, SelfTestError
from kvserve.engine.settings import EngineSettings
from kvserve.errors import UnsupportedError
from kvserve.policies.loading import load_policy
from kvserve.policies.registry import policy_names
from tests.cases.layer_cases import attention_layer, engine_config
from tests.cases.planning import get_kv_cache_configs
from tests.cases.tiny_models import make_tiny_model

HEADS: dict[str, Any] = {"block_size": 64, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}


class Layer:
    """An attention layer with an implementation of `kind`, and a KV cache or none."""

    def __init__(self, kind: type, cached: bool = True) -> None:
        self.impl, self.cached = object.__new__(kind), cached

    def get_kv_cache_spec(self, config: Any) -> Any:
        return FullAttentionSpec(**HEADS) if self.cached else None

    def get_attn_backend(self) -> Any:
        return SimpleNamespace(get_name=lambda: "THEIRS")


class Other:
    pass


def config_of(*layers: Any) -> Any:
    context = {f"layers.{index}": layer for index, layer in enumerate(layers)}
    return SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=context))


def test_layers_of_kvserve_and_layers_without_a_cache_pass() -> None:
    check_own_layers(
        config_of(Layer(KvserveImpl), Layer(Other, cached=False), object(), Layer(KvserveImpl)), KvserveImpl
    )


@pytest.mark.parametrize(
    ("layers", "count"),
    [
        ([Layer(KvserveImpl), Layer(Other), Layer(Other)], r"2 of the 3 layers .*layers.1: THEIRS"),
        ([Layer(Other)], r"1 of the 1 layers .*layers.0: THEIRS"),
    ],
)
def test_layers_with_another_backend_are_counted_and_named(layers: list[Layer], count: str) -> None:
    with pytest.raises(UnsupportedError, match=count + ".*serve this model with stock vLLM"):
        check_own_layers(config_of(*layers), KvserveImpl)


@pytest.mark.parametrize("policy", ["kivi-2bit", "none"])
def test_a_model_that_names_a_backend_for_one_layer_is_refused_when_its_weights_are_there(
    tmp_path: Path, policy: str
) -> None:
    config = engine_config(make_tiny_model("llama-gqa-64", tmp_path), policy)
    with set_current_vllm_config(config):
        own = attention_layer(config, "model.layers.0.self_attn.attn")
        own.process_weights_after_loading(torch.float32)
        attention_layer(config, "model.layers.1.self_attn.attn", attn_backend=CPUAttentionBackend)
        with pytest.raises(UnsupportedError, match=r"1 of the 2 layers .*\(model.layers.1.self_attn.attn: CPU_ATTN\)"):
            own.process_weights_after_loading(torch.float32)


class Engine:
    """An engine whose workers have the extension and `reasons` to refuse."""

    def __init__(self, reasons: list[str | None]) -> None:
        self.reasons = reasons
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(worker_extension_cls=EXTENSION_PATH, data_parallel_size=1),
            additional_config={}, cache_config=SimpleNamespace(num_gpu_blocks=100),
            model_config=SimpleNamespace(get_head_size=lambda: 64, max_model_len=1024), kv_transfer_config=None,
        )  # fmt: skip

    async def check_health(self) -> None:
        pass

    async def collective_rpc(self, method: str) -> list[str | None]:
        assert method == "kvserve_check_layers"
        return self.reasons


def test_a_server_asks_its_workers_whether_any_layer_is_kvserves(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EngineSettings(load_policy("int8"), 64, torch.bfloat16)
    monkeypatch.setattr(RequestCheck, "server", RequestCheck.server)  # which the endpoint sets
    monkeypatch.setattr(EngineSettings, "from_vllm_config", lambda config: settings)
    worker = ProbeWorker()
    worker.vllm_config = config_of(Layer(KvserveImpl))
    assert worker.kvserve_check_layers() is None
    worker.vllm_config = config_of(Layer(Other))
    reason = worker.kvserve_check_layers()
    assert reason is not None and "1 of the 1 layers" in reason
    with pytest.raises(SelfTestError, match="1 of the 1 layers"):
        asyncio.run(ReadyEndpoint().init_state(Engine([None, reason]), None, None))
    asyncio.run(ReadyEndpoint().init_state(Engine([None, None]), None, None))


# Stages of a pipeline


def specs_of_stages(policy: str, *layers: int) -> list[dict[str, Any]]:
    """What the workers of a pipeline whose stages have `layers` layers report."""
    found, first = [], 0
    for count in layers:
        settings = EngineSettings(load_policy(policy), 64, torch.bfloat16, num_layers=count)
        spec = backend_for(settings).customize_spec(FullAttentionSpec(**HEADS))
        found.append({f"layers.{first + index}": spec for index in range(count)})
        first += count
    return found


@pytest.mark.parametrize("policy", [name for name in policy_names() if not load_policy(name).eviction])
def test_stages_of_different_size_share_one_group_of_pages(policy: str) -> None:
    config = VllmConfig()
    model = SimpleNamespace(max_model_len=1024, original_max_model_len=1024, supports_kv_cache_grouping=False)
    object.__setattr__(config, "model_config", model)
    config.cache_config.kv_cache_layout = "BHLNC"
    stages = specs_of_stages(policy, 2, 1)
    first, second = get_kv_cache_configs(config, stages, [1 << 26, 1 << 26])
    assert [len(stage.kv_cache_groups) for stage in (first, second)] == [1, 1]
    assert first.num_blocks == second.num_blocks == (1 << 26) // (2 * stages[0]["layers.0"].page_size_bytes)


@pytest.mark.parametrize(
    ("stages", "device", "is_compiled", "runs"),
    [(1, "cpu", False, True), (2, "cpu", True, True), (2, "cuda", False, True), (2, "cpu", False, False)],
)
def test_a_pipeline_that_vllm_cannot_run_is_refused_with_the_option_that_helps(
    stages: int, device: str, is_compiled: bool, runs: bool
) -> None:
    if runs:
        check_stages(stages, device, is_compiled)
    else:
        with pytest.raises(UnsupportedError, match="add --no-enforce-eager"):
            check_stages(stages, device, is_compiled)


def test_pages_that_differ_are_refused_with_what_differs() -> None:
    backend = backend_for(EngineSettings(load_policy("int8"), 64, torch.bfloat16))
    one, other = (backend.customize_spec(FullAttentionSpec(**{**HEADS, "num_kv_heads": heads})) for heads in (2, 4))
    with pytest.raises(ValueError, match=r"differ in num_kv_heads \(2 and 4\)"):
        one.merge([one, one, other])
