"""Requests with a seed on a CPU: their answers depend on the seed, not on the steps that computed the prompt.

vLLM's own worker dies of a seed and a prompt in several steps, with any policy and without one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm import LLM, SamplingParams

from kvserve.engine.settings import CPU_WORKER_PATH
from tests.cases.engine_cases import engine, free_blocks, random_prompts, tokens
from tests.cases.tiny_models import make_tiny_model

LENGTHS = [300, 40, 500]  # of 128 tokens a step
PROMPTS = [{"prompt_token_ids": prompt} for prompt in random_prompts(LENGTHS)]


def sampled(llm: LLM, prompts: list[dict], seeds: list[int | None]) -> list[list[int]]:
    params = [
        SamplingParams(temperature=1.0, top_p=0.9, seed=seed, max_tokens=12, ignore_eos=True, detokenize=False)
        for seed in seeds
    ]
    return [tokens(output) for output in llm.generate(prompts, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama-gqa-64", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def in_one_step(model: Path) -> list[list[int]]:
    """Each prompt alone and in one step, with vLLM's own worker and dense cache."""
    with engine(model, None, max_num_batched_tokens=1024, skip_tokenizer_init=True) as llm:
        return [sampled(llm, [prompt], [7 + index])[0] for index, prompt in enumerate(PROMPTS)]


def test_steps_and_company_leave_a_seeds_answer_alone(model: Path, in_one_step: list[list[int]]) -> None:
    with engine(model, None, worker_cls=CPU_WORKER_PATH, skip_tokenizer_init=True) as llm:
        assert sampled(llm, PROMPTS, [7, 8, 9]) == in_one_step
        assert sampled(llm, [PROMPTS[2], *PROMPTS], [9, None, 8, None])[::2] == [in_one_step[2], in_one_step[1]]


@pytest.mark.parametrize("policy", ["int8", "kv-compress"])
def test_with_a_policy_too(model: Path, policy: str) -> None:
    with engine(model, policy, worker_cls=CPU_WORKER_PATH, skip_tokenizer_init=True) as llm:
        before = free_blocks(llm)
        alone = [sampled(llm, [prompt], [7 + index])[0] for index, prompt in enumerate(PROMPTS)]
        assert alone == [sampled(llm, [prompt], [7 + index])[0] for index, prompt in enumerate(PROMPTS)]
        assert sampled(llm, [PROMPTS[0]], [8])[0] != alone[0]
        assert free_blocks(llm) == before
