"""The engine on the Triton kernels, interpreted: the texts are those of the native kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cases.engine_cases import engine, generate, random_prompts, steps
from tests.cases.greedy import assert_same_texts
from tests.cases.tiny_models import make_tiny_model

pytest.importorskip("triton")

OPTIONS = {"skip_tokenizer_init": True, "max_model_len": 512, "max_num_seqs": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama-gqa-64", tmp_path_factory.mktemp("model"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "changes", "lengths", "max_tokens"),
    [
        # Around the tile of 64 tokens; the longest prompt comes in chunks of 128.
        ("none", {}, [5, 64, 280], 8),
        ("kivi-2bit", {}, [5, 64, 280], 8),
        ("kivi-2bit", {"layers": {0: "int8"}}, [5, 64, 280], 8),
        ("kv-compress", {}, [5, 64, 280], 8),
        ("kv-compress-live", {}, [150], 67),  # cut with the prompt and again 64 tokens later
        ("h2o", {"eviction.rate": None, "eviction.max_tokens": 128}, [150], 67),  # adds up what tokens receive
    ],
)
def test_triton_kernels_write_the_text_of_the_native_ones(
    policy: str, changes: dict[str, Any], lengths: list[int], max_tokens: int, model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    prompts, texts = random_prompts(lengths), {}
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # tests/conftest.py has imported the kernels so
    for kernels in ("native", "triton"):
        with engine(model, policy, changes, kernels, **OPTIONS) as llm:
            texts[kernels] = [steps(output) for output in generate(llm, prompts, max_tokens, logprobs=2)]
    assert_same_texts(texts["native"], texts["triton"])
