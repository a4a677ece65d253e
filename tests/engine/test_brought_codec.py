"""A codec of another package, served by the reference kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvserve.engine.probe_worker import kvserve_layers
from kvserve.engine.self_test import EXTENSION_PATH
from tests.cases.brought_parts import example_package
from tests.cases.engine_cases import engine, generate, random_prompts
from tests.cases.tiny_models import make_tiny_model

CODEC = {"key": {"name": "one-bit"}, "value": {"name": "one-bit"}}


def test_a_codec_without_compiled_kernels_serves_by_the_reference(monkeypatch, tmp_path: Path) -> None:
    model = make_tiny_model("llama-gqa-64", tmp_path / "model")
    options = {"worker_extension_cls": EXTENSION_PATH, "skip_tokenizer_init": True}
    with example_package(monkeypatch), engine(model, "int8", CODEC, kernels="reference", **options) as llm:
        (prompt,) = random_prompts([100])
        (output,) = generate(llm, [prompt], max_tokens=40)
        assert len(output.outputs[0].token_ids) == 40
        (_, impl), *_ = kvserve_layers(llm.llm_engine.vllm_config)
        assert type(impl.attention).__name__ == "ReferenceAttention"
        assert impl.layout.bits_per_element() == pytest.approx(1 + 16 / impl.head_size, abs=0.3)
        assert torch.isfinite(torch.tensor([next(iter(p.values())).logprob for p in output.prompt_logprobs[1:]])).all()
