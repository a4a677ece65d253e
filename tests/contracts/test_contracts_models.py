"""One test per vLLM symbol that the checks of models rely on, as tests/contracts/test_contracts.py."""

from __future__ import annotations

import inspect


def test_a_layer_hands_the_end_of_loading_to_its_implementation() -> None:
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.model_executor.model_loader import utils

    assert "self.impl.process_weights_after_loading(act_dtype)" in inspect.getsource(
        Attention.process_weights_after_loading
    )
    assert "is_deferred_attention_layer(module)" in inspect.getsource(utils.process_weights_after_loading)


def test_layers_say_which_cache_they_need() -> None:
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert list(inspect.signature(AttentionLayerBase.get_kv_cache_spec).parameters) == ["self", "vllm_config"]
    assert "attn_module.get_kv_cache_spec(self.vllm_config)" in inspect.getsource(GPUModelRunner.get_kv_cache_spec)


def test_a_models_configuration_is_made_without_loading_it() -> None:
    from vllm.config import ModelConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    assert inspect.signature(AsyncEngineArgs.create_model_config).return_annotation in (ModelConfig, "ModelConfig")
    assert {"max_model_len", "hf_config", "dtype"} <= set(ModelConfig.__dataclass_fields__)
    assert "hf_text_config" in inspect.getsource(ModelConfig) and callable(ModelConfig.using_transformers_backend)


def test_a_window_is_that_of_all_layers_unless_they_have_kinds() -> None:
    from vllm.engine.arg_utils import EngineArgs

    source = inspect.getsource(EngineArgs.create_engine_config)
    assert 'layer_types is None or all(lt == "sliding_attention" for lt in layer_types)' in source


def test_rotary_embeddings_compute_their_frequencies_apart() -> None:
    from vllm.model_executor.layers import rotary_embedding

    for name, argument in (
        ("RotaryEmbedding", "base"),
        ("Llama3RotaryEmbedding", "base"),
        ("LinearScalingRotaryEmbedding", "base"),
        ("YaRNScalingRotaryEmbedding", "scaling_factor"),
    ):
        function = getattr(rotary_embedding, name)._compute_inv_freq
        assert list(inspect.signature(function).parameters) == ["self", argument], name
    assert rotary_embedding._ROPE_DICT is not None


def test_pipelines_on_a_cpu_need_the_warming_up_of_compiled_models() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert "mode == CompilationMode.NONE" in inspect.getsource(CPUModelRunner.warming_up_model)
    assert "self.intermediate_tensors = None" not in inspect.getsource(CPUModelRunner)
    assert "assert self.intermediate_tensors is not None" in inspect.getsource(
        GPUModelRunner.sync_and_gather_intermediate_tensors
    )


def test_stock_attention_asks_for_amx_in_bfloat16_and_leaves_the_permission_to_others() -> None:
    import torch
    from vllm.v1.attention.backends import cpu_attn

    assert "_is_amx_tile_supported()" in inspect.getsource(cpu_attn._get_attn_isa)
    assert "_init_amx" not in inspect.getsource(cpu_attn), "else the benchmark need not ask"
    assert callable(torch.cpu._init_amx)
