"""Which models a policy is served with: refused for what they really have, before anything is loaded."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GPTNeoXConfig, HeliumConfig, Qwen2Config, SmolLM3Config
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.helium import modeling_helium
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from kvserve.checks import ServeOptions, check_cache_dtype, check_model
from kvserve.cli import launch, main
from kvserve.engine import rotary
from kvserve.engine.rotary import model_rotary, transformers_rotary
from kvserve.engine.settings import EngineSettings
from kvserve.errors import UnsupportedError
from kvserve.layer_kinds import window_of
from kvserve.policies.loading import load_policy
from tests.cases.cli_cases import LLAMA, model_folder
from tests.cases.layer_cases import attention_layer, engine_config

MISTRAL = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 256, "intermediate_size": 256,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 512,
    "max_position_embeddings": 32768, "sliding_window": 4096, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN2 = {**MISTRAL, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_window_layers": 1}
EXPECTED = load_policy("expected-attention")


# Windows


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (MISTRAL, 4096),
        ({**MISTRAL, "sliding_window": None}, None),
        ({**MISTRAL, "sliding_window": 0}, None),
        ({**MISTRAL, "layer_types": ["full_attention", "sliding_attention"]}, 4096),
        ({**MISTRAL, "layer_types": ["full_attention", "full_attention"]}, None),
        (QWEN2, None),
        ({**QWEN2, "use_sliding_window": False}, None),
        ({**QWEN2, "use_sliding_window": True}, 4096),
        ({**QWEN2, "use_sliding_window": True, "max_window_layers": 2}, None),
    ],
)
def test_a_config_has_the_window_that_transformers_and_vllm_give_it(config: dict[str, Any], window: int | None) -> None:
    assert window_of(config) == window
    resolved = AutoConfig.for_model(**config).to_dict()
    assert window_of(resolved) == window, "what the plugin reads"


@pytest.mark.parametrize("policy", ["kv-compress", "snapkv", "streaming-llm"])
def test_eviction_on_a_window_that_applies_is_refused_at_once_with_the_length_that_works(
    tmp_path: Path, refusal: Any, started: list, policy: str
) -> None:
    folder = model_folder(tmp_path, **MISTRAL)
    serve = ("--policy", policy, "--model", folder, "--max-model-len")
    message = refusal(*serve, "4097")
    assert "last 4,096 tokens" in message and "--max-model-len 4096" in message and "kivi-2bit" in message
    assert main([*serve, "4096"]) == 0 and len(started) == 1
    assert main([*serve, "8192", "--disable-sliding-window"]) == 0, "vLLM says which length that allows"


def test_a_policy_that_evicts_nothing_serves_windows(tmp_path: Path, started: list) -> None:
    folder = model_folder(tmp_path, **MISTRAL)
    assert main(["--policy", "kivi-2bit", "--model", folder, "--max-model-len", "8192"]) == 0


@pytest.mark.parametrize(
    ("config", "options", "refused"),
    [
        ({}, [], True),
        ({}, ["--max-model-len", "8k"], True),
        ({}, ["--max-model-len", "4K"], False),
        ({}, ["--disable-sliding-window"], False),
        ({"max_position_embeddings": 4096}, [], False),
        ({"sliding_window": None}, [], False),
        ({}, ["--hf-overrides", '{"sliding_window": null}'], False),
        ({"sliding_window": None}, ["--hf-overrides", '{"sliding_window": 1024}'], True),
        ({"sliding_window": "absent"}, [], True),  # transformers gives Mistral 4096
    ],
)
def test_the_model_is_checked_as_vllm_configures_it_before_it_is_loaded(
    tmp_path: Path, config: dict[str, Any], options: list[str], refused: bool
) -> None:
    content = {key: value for key, value in {**MISTRAL, **config}.items() if value != "absent"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    args = launch._parser().parse_args(["--model", str(tmp_path), "--skip-tokenizer-init", *options])
    launch.check_resolved_model(args, load_policy("int8"))
    if refused:
        with pytest.raises(UnsupportedError, match="sliding windows do not allow"):
            launch.check_resolved_model(args, load_policy("snapkv"))
    else:
        launch.check_resolved_model(args, load_policy("snapkv"))


def test_a_window_layer_is_refused_as_it_is_built_or_has_no_window(tmp_path: Path) -> None:
    """Whatever the model's configuration says: these are the windows that its code asks for."""
    (tmp_path / "config.json").write_text(json.dumps({**MISTRAL, "sliding_window": None}))
    config = engine_config(tmp_path, "snapkv")
    with set_current_vllm_config(config):
        layer = attention_layer(config, "model.layers.0.attn", per_layer_sliding_window=1024)
        assert layer.impl.attention.spec.sliding_window is None
        backend = layer.get_attn_backend()
        windowed, plain = (
            backend.customize_spec(kind(block_size=64, num_kv_heads=2, head_size=64, dtype=torch.float32, **window))
            for kind, window in ((SlidingWindowSpec, {"sliding_window": 1024}), (FullAttentionSpec, {}))
        )
        assert windowed == plain
        with pytest.raises(UnsupportedError, match=r"last 1,023 tokens only.*--max-model-len 1023"):
            attention_layer(config, "model.layers.1.attn", per_layer_sliding_window=1023)
    config = engine_config(tmp_path, "kivi-2bit")
    with set_current_vllm_config(config):
        layer = attention_layer(config, "model.layers.0.attn", per_layer_sliding_window=96)
        assert layer.impl.attention.spec.sliding_window == 96


@pytest.mark.parametrize(
    "heads",
    [
        {"global_head_dim": 128},
        {"per_layer_config": {"1": {"head_dim": 128}}},
        {"num_global_key_value_heads": 1},
        {"per_layer_config": {"1": {"num_key_value_heads": 1}}},
    ],
)
def test_what_a_model_lacks_is_named_before_what_vllm_set_because_of_it(heads: dict[str, Any]) -> None:
    """vLLM itself sets another attention backend for Gemma 4's layers of different head_dim."""
    config = VllmConfig(additional_config={"kvserve": {"policy": "int8"}})
    config.cache_config.block_size = 64
    config.attention_config.backend = AttentionBackendEnum.TRITON_ATTN
    content = {**MISTRAL, "model_type": "gemma4_text", "head_dim": 64, **heads}
    model = SimpleNamespace(hf_config=SimpleNamespace(to_dict=lambda: content), max_model_len=1024)
    object.__setattr__(config, "model_config", model)
    with pytest.raises(UnsupportedError, match="layers of different shape"):
        EngineSettings.from_vllm_config(config)


# The cache's dtype


@pytest.mark.parametrize(
    ("policy", "asked", "model_dtype", "accepted"),
    [
        ("none", "bfloat16", "bfloat16", True),
        ("none", "bfloat16", torch.bfloat16, True),
        ("none", "bfloat16", "auto", True),
        ("none", "float16", "half", True),
        ("none", "bfloat16", "float32", False),
        ("none", "bfloat16", torch.float32, False),
        ("none", "fp8", "bfloat16", False),
        ("none", "fp8", "auto", False),
        ("kivi-2bit", "bfloat16", "bfloat16", False),
        ("kivi-2bit", "auto", "bfloat16", True),
    ],
)
def test_a_kv_cache_dtype_is_taken_where_it_changes_nothing(
    policy: str, asked: str, model_dtype: Any, accepted: bool
) -> None:
    options = ServeOptions(dtype=model_dtype, kv_cache_dtype=asked)
    if accepted:
        check_cache_dtype(options, load_policy(policy))
    else:
        with pytest.raises(UnsupportedError, match=f"--kv-cache-dtype {asked} cannot be combined.*drop the option"):
            check_cache_dtype(options, load_policy(policy))


def test_dtype_auto_is_judged_by_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**MISTRAL, "torch_dtype": "float16"}))
    line = ["--model", str(tmp_path), "--skip-tokenizer-init", "--dtype", "auto", "--kv-cache-dtype"]
    launch.check_resolved_model(launch._parser().parse_args([*line, "float16"]), load_policy("none"))
    with pytest.raises(UnsupportedError, match="the model's dtype, float16 here"):
        launch.check_resolved_model(launch._parser().parse_args([*line, "bfloat16"]), load_policy("none"))


# Rotary embeddings


def check_only_estimates_are_refused(refusal: Any, folder: Any, config: dict[str, Any], part: str) -> None:
    """A policy that estimates queries is refused for this reason; one that reads them is not."""
    message = refusal("--policy", "expected-attention", "--model", folder)
    assert part in message and "choose another policy" in message
    check_model({**LLAMA, **config}, load_policy("snapkv"))


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"model_type": "gpt2"}, "has no rotary embedding"),
        ({"no_rope_layers": [1, 1, 1, 0]}, "has layers without one (no_rope_layers)"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layers of several kinds"),
        ({"rope_scaling": {"type": "longrope"}}, "one of another kind"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]}}, "one of another kind"),
    ],
)
def test_queries_that_cannot_be_turned_back_are_refused_at_once_for_the_true_reason(
    tmp_path: Path, refusal: Any, config: dict[str, Any], part: str
) -> None:
    check_only_estimates_are_refused(refusal, model_folder(tmp_path, **config), config, part)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"model_type": "gpt_oss"}, "learned attention sinks"),
        ({"add_swa_attention_sink_bias": True}, "learned attention sinks"),
        ({"attn_logit_softcapping": 50.0}, "capped attention logits (attn_logit_softcapping)"),
    ],
)
def test_a_scorer_that_expects_plain_softmax_is_refused_where_there_is_another(
    tmp_path: Path, refusal: Any, config: dict[str, Any], part: str
) -> None:
    check_only_estimates_are_refused(refusal, model_folder(tmp_path, **config), config, part)


def test_caps_and_sinks_are_those_that_the_models_code_asks_for(tmp_path: Path) -> None:
    """Sinks are a parameter, which is loaded after the layer is built."""
    (tmp_path / "config.json").write_text(json.dumps({**MISTRAL, "sliding_window": None}))
    for policy in ("snapkv", "none"):
        config = engine_config(tmp_path, policy)
        with set_current_vllm_config(config):
            sinks = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16), requires_grad=False)
            layer = attention_layer(config, "model.layers.0.attn", logits_soft_cap=30.0, sinks=sinks)
            sinks.copy_(torch.arange(4))
            layer.process_weights_after_loading(torch.float32)
            spec = layer.impl.attention.spec
            assert spec.soft_cap == 30.0 and spec.sink_logits.dtype == torch.float32
            assert spec.sink_logits.tolist() == [0.0, 1.0, 2.0, 3.0]
            assert attention_layer(config, "model.layers.1.attn", logits_soft_cap=0.0).impl.spec.soft_cap is None
    plain = pytest.raises(UnsupportedError, match="expected-attention expects plain softmax attention")
    with set_current_vllm_config(config := engine_config(tmp_path, "expected-attention")), plain:
        attention_layer(config, "model.layers.0.attn", sinks=sinks)


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_the_usual_kinds_of_rotary_embedding_pass(kind: str) -> None:
    check_model({**LLAMA, "rope_scaling": {"rope_type": kind, "factor": 2.0}}, EXPECTED)


@pytest.fixture
def vllm_config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "partial": {"partial_rotary_factor": 0.5},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 128},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    "linear": {"rope_type": "linear", "factor": 4.0},
}  # fmt: skip
OWN_CODE = SimpleNamespace(using_transformers_backend=lambda: False)


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("name", ROPES)
def test_what_vllm_turns_is_turned_back(
    name: str, neox: bool, vllm_config: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A constant that the embedding multiplies with may stay."""
    rope = get_rope(64, 512, neox, {"rope_theta": 10000.0, **ROPES[name]}, torch.float32)
    monkeypatch.setattr(rotary, "_ROPE_DICT", {"one": rope})
    found = model_rotary(OWN_CODE, torch.device("cpu"))
    queries, positions = torch.randn(20, 3 * 64), torch.arange(20) * 25
    at_zero, turned = (rope.forward_native(at, queries)[0].view(20, 3, 64) for at in (positions * 0, positions))
    back = found.rotate(turned.transpose(0, 1), -positions).transpose(0, 1)
    torch.testing.assert_close(back, at_zero, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(turned, at_zero, atol=0.1)


def test_embeddings_that_differ_or_change_with_the_length_are_refused_by_name(
    vllm_config: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, dynamic = (
        get_rope(64, 512, True, {"rope_theta": 10000.0, **more}, torch.float32)
        for more in ({}, {"rope_type": "dynamic", "factor": 2.0})
    )
    for ropes, part in (
        ({}, "this model has none"),
        ({"a": dynamic}, "this model has DynamicNTKScalingRotaryEmbedding"),
        ({"a": plain, "b": dynamic}, "have DynamicNTKScalingRotaryEmbedding, RotaryEmbedding"),
    ):
        monkeypatch.setattr(rotary, "_ROPE_DICT", ropes)
        layers = torch.nn.ModuleList(ropes.values())
        with pytest.raises(UnsupportedError, match=part):
            model_rotary(OWN_CODE, torch.device("cpu"))
        del layers


def test_an_embedding_of_a_model_that_is_gone_is_none_of_this_models(
    vllm_config: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM keeps what a process ever made; a model that shares one with the model before has it all the same."""
    plain, scaled = (
        get_rope(64, 512, True, {"rope_theta": 10000.0, **more}, torch.float32) for more in ({}, ROPES["linear"])
    )
    monkeypatch.setattr(rotary, "_ROPE_DICT", {"a": plain, "b": scaled, "again": scaled})
    for own, is_frozen in ((plain, False), (scaled, False), (plain, True), (scaled, True)):
        layer = torch.nn.ModuleList([own])
        if is_frozen:
            gc.freeze()  # as vLLM does once an engine has started
        found = model_rotary(OWN_CODE, torch.device("cpu"))
        assert (gc.get_freeze_count() > 0) == is_frozen
        gc.unfreeze()
        fast = own.forward_native(torch.tensor([100]), torch.ones(1, 64))[0].view(1, 1, 64)
        torch.testing.assert_close(found.rotate(torch.ones(1, 1, 64), torch.tensor([100])), fast, atol=2e-4, rtol=1e-4)
        del layer


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("config", "module", "rope_class"),
    [
        (GPTNeoXConfig(hidden_size=256, num_attention_heads=4), modeling_gpt_neox, "GPTNeoXRotaryEmbedding"),
        (
            GPTNeoXConfig(
                hidden_size=256, num_attention_heads=4, rope_parameters={**YARN, "partial_rotary_factor": 0.5}
            ),
            modeling_gpt_neox,
            "GPTNeoXRotaryEmbedding",
        ),
        (HeliumConfig(hidden_size=256, num_attention_heads=4, head_dim=64), modeling_helium, "HeliumRotaryEmbedding"),
    ],
    ids=["partial", "yarn", "interleaved"],
)
def test_what_transformers_turns_is_turned_back(config: Any, module: Any, rope_class: str) -> None:
    found, rope = transformers_rotary(config), getattr(module, rope_class)(config)
    assert found.interleaved == (module is modeling_helium)
    queries, positions = torch.randn(1, 4, 20, 64), torch.arange(20) * 25

    def turned(at: torch.Tensor) -> torch.Tensor:
        cos, sin = rope(queries, at[None])
        return module.apply_rotary_pos_emb(queries, queries, cos, sin)[0][0]

    torch.testing.assert_close(found.rotate(turned(positions), -positions), turned(positions * 0), atol=2e-4, rtol=1e-4)


def test_transformers_models_whose_embedding_is_not_understood_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="Qwen2Config has rope_type dynamic"):
        transformers_rotary(Qwen2Config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}))
    with pytest.raises(UnsupportedError, match="does not find that of NoneType"):
        transformers_rotary(None)
    with pytest.raises(UnsupportedError, match="no_rope_layers"):
        check_model(SmolLM3Config().to_dict(), EXPECTED)


def test_window_layers_beside_full_ones_need_groups_of_their_own(tmp_path: Path, refusal: Any, started: list) -> None:
    kinds = ["sliding_attention", "full_attention"]
    folder = model_folder(tmp_path, **{**MISTRAL, "layer_types": kinds})
    serve = ("--policy", "snapkv", "--model", folder, "--max-model-len")
    assert "drop the option" in refusal(*serve, "8192", "--disable-hybrid-kv-cache-manager")
    assert "drop --block-size" in refusal(*serve, "8192", "--block-size", "128")
    assert "drop --pipeline-parallel-size" in refusal(*serve, "8192", "-pp", "2")
    assert main([*serve, "8192"]) == 0 and len(started) == 1
    assert main([*serve, "4096", "--disable-hybrid-kv-cache-manager"]) == 0, "no request exceeds the window"
