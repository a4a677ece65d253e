"""A model whose code names another attention backend for its layers is refused, whichever way it is served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from kvserve.checks import check_model
from kvserve.engine.probe_worker import ProbeWorker
from kvserve.engine.self_test import EXTENSION_PATH
from kvserve.errors import UnsupportedError
from kvserve.policies.loading import load_policy
from tests.cases.engine_cases import engine, generate, random_prompts
from tests.cases.tiny_models import make_tiny_model


class OtherBackend(LlamaForCausalLM):
    """Llama, with vLLM's own attention in the layers `others`."""

    others: tuple[int, ...] = ()

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        context = vllm_config.compilation_config.static_forward_context
        for index in self.others:
            block = self.model.layers[index].self_attn
            name = block.attn.layer_name
            del context[name]
            block.attn = Attention(
                block.num_heads, block.head_dim, block.scaling, num_kv_heads=block.num_kv_heads,
                cache_config=vllm_config.cache_config, prefix=name, attn_backend=CPUAttentionBackend,
            )  # fmt: skip


class OneOtherBackend(OtherBackend):
    others = (1,)


class OnlyOtherBackends(OtherBackend):
    others = (0, 1)


@pytest.fixture(autouse=True)
def known_models() -> Iterator[None]:
    """vLLM takes model classes that others register."""
    classes = {kind.__name__: kind for kind in (OneOtherBackend, OnlyOtherBackends)}
    for name, kind in classes.items():
        ModelRegistry.register_model(name, kind)
    yield
    for name in classes:
        del ModelRegistry.models[name]


def model_of(kind: type, folder: Path) -> Path:
    path = make_tiny_model("llama-gqa-64", folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": [kind.__name__]}))
    return folder


def test_layers_of_another_backend_among_kvserves_end_the_start_with_their_number(tmp_path: Path) -> None:
    model = model_of(OneOtherBackend, tmp_path)
    with (
        pytest.raises(UnsupportedError, match=r"1 of the 2 layers .*layers\.1\.self_attn\.attn: CPU_ATTN.*stock vLLM"),
        engine(model, "kivi-2bit", skip_tokenizer_init=True),
    ):
        pass


def test_where_no_layer_is_kvserves_a_server_asks_and_an_llm_refuses_the_first_request(tmp_path: Path) -> None:
    model = model_of(OnlyOtherBackends, tmp_path)
    with engine(model, "kivi-2bit", worker_extension_cls=EXTENSION_PATH, skip_tokenizer_init=True) as llm:
        (reason,) = llm.collective_rpc(ProbeWorker.kvserve_check_layers.__name__)
        assert "2 of the 2 layers" in reason
        with pytest.raises(UnsupportedError, match=r"2 of the 2 layers .*so the policy would not apply to them"):
            generate(llm, random_prompts([5]))


def test_a_model_of_stock_layers_is_none_of_kvserves_business_without_a_policy(tmp_path: Path) -> None:
    with engine(model_of(OnlyOtherBackends, tmp_path), None, skip_tokenizer_init=True) as llm:
        assert len(generate(llm, random_prompts([5]))) == 1


@pytest.mark.parametrize(
    "config", [{"model_type": "minimax_m3_text"}, {"model_type": "deepseek_v4"}, {"v_channels": 128}]
)
def test_models_that_are_known_to_bring_a_backend_are_refused_before_they_are_loaded(config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=r"an attention backend of its own.*stock vLLM"):
        check_model({"head_dim": 128, **config}, load_policy("kivi-2bit"))
    with pytest.raises(UnsupportedError, match="an attention backend of its own"):
        check_model({"text_config": {"head_dim": 128, **config}}, load_policy("none"))
