"""Model families through the real engine: tiny random models, chunked prefill on, compared with stock vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_cases import engine, generate, prompt_logprobs, random_prompts, tokens
from tiny_models import FAMILIES, make_tiny_model

# Lengths around the tile of 64 tokens and past the windows of 96; longer ones are prefilled in chunks of 128.
LENGTHS = [5, 63, 64, 65, 200, 333]
SKIP_TOKENIZER = {"skip_tokenizer_init": True}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_family_is_served_dense_and_compressed(family: str, tmp_path: Path) -> None:
    model = make_tiny_model(family, tmp_path)
    prompts = random_prompts(LENGTHS)
    outputs = {}
    for policy in (None, "none", "int8", "boost-2bit"):
        with engine(model, policy, **SKIP_TOKENIZER) as llm:
            outputs[policy] = generate(llm, prompts)
    for stock, none, int8, boost in zip(*outputs.values(), strict=True):
        assert tokens(none) == tokens(stock)
        assert prompt_logprobs(none) == pytest.approx(prompt_logprobs(stock), abs=2e-4)
        # Before the first tile is full nothing is compressed but the tail's 16-bit rounding.
        assert prompt_logprobs(boost)[:63] == pytest.approx(prompt_logprobs(stock)[:63], abs=0.05)
        difference = [abs(a - b) for a, b in zip(prompt_logprobs(int8), prompt_logprobs(stock), strict=True)]
        assert sum(difference) / len(difference) < 0.03


def test_compression_changes_the_distribution_only_behind_the_first_tile(tmp_path: Path) -> None:
    model = make_tiny_model("llama-gqa-64", tmp_path)
    (prompt,) = random_prompts([400])
    logprobs = {}
    for policy in (None, "int8", "kivi-4bit", "kivi-2bit"):
        with engine(model, policy, **SKIP_TOKENIZER) as llm:
            logprobs[policy] = prompt_logprobs(generate(llm, [prompt])[0])
    distance = {
        policy: sum(abs(a - b) for a, b in zip(logprobs[policy][64:], logprobs[None][64:], strict=True))
        for policy in ("int8", "kivi-4bit", "kivi-2bit")
    }
    assert 0 < distance["int8"] < distance["kivi-4bit"] < distance["kivi-2bit"]
