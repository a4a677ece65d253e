"""Speculative decoding over compressed pages: drafts change when tokens come, never which."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, RequestOutput

from kvserve.accounting.plan import held_blocks, widest_request
from kvserve.default_model import prepare_default_model
from kvserve.engine.report import EngineReport
from kvserve.engine.settings import EngineSettings
from tests.cases.engine_cases import (
    MIB,
    STORY,
    counted_preemptions,
    encode,
    engine,
    free_blocks,
    generate,
    steps,
    tokens,
)
from tests.cases.greedy import Step, assert_same_texts

slow = pytest.mark.slow
NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
LENGTH = 150  # of an answer: more than two tiles
NAMES = ["Anna", "Boris", "Chen", "Dalia"]


@dataclass
class Speculating:
    """An engine that speculates, and what one that does not answers to the same prompts."""

    llm: LLM
    policy: str
    prompts: list[list[int]]
    expected: list[list[Step]]

    @property
    def report(self) -> EngineReport:
        config = self.llm.llm_engine.vllm_config
        settings = EngineSettings.from_vllm_config(config)
        assert settings is not None
        return EngineReport.from_vllm_config(config, settings)


@pytest.fixture(scope="module")
def model() -> Path:
    return prepare_default_model()


@pytest.fixture(
    scope="module",
    params=[
        "int8",
        "kv-compress-2bit",
        *(pytest.param(p, marks=slow) for p in ("none", "kivi-2bit", "dense", "snapkv")),
    ],
)
def served(request: pytest.FixtureRequest, model: Path) -> Iterator[Speculating]:
    with engine(model, request.param, kv_cache_memory_bytes=256 * MIB) as plain:
        # Answers repeat what they read, so that some drafts are right; lengths end at different places of a tile.
        prompts = [encode(plain, f"{name} " * (i + 1) + STORY * 3) for i, name in enumerate(NAMES)]
        expected = [steps(output) for output in answers(plain, prompts)]
    options: dict[str, Any] = {"speculative_config": NGRAM, "disable_log_stats": False}
    with engine(model, request.param, kv_cache_memory_bytes=256 * MIB, **options) as llm:
        yield Speculating(llm, request.param, prompts, expected)


def answers(llm: LLM, prompts: list[list[int]], **options: Any) -> list[RequestOutput]:
    return generate(llm, prompts, LENGTH, logprobs=2, **options)


def drafted(llm: LLM) -> tuple[float, float]:
    """Tokens drafted and accepted so far."""
    values = {metric.name: getattr(metric, "value", 0.0) for metric in llm.get_metrics()}
    return values["vllm:spec_decode_num_draft_tokens"], values["vllm:spec_decode_num_accepted_tokens"]


def test_texts_are_those_without_drafts(served: Speculating) -> None:
    outputs = answers(served.llm, served.prompts)
    assert_same_texts(served.expected, [steps(output) for output in outputs])
    asked, accepted = drafted(served.llm)
    assert 0 < accepted < asked, "some drafts have to be right, and some wrong"
    assert free_blocks(served.llm) == served.report.num_blocks - 1


def test_a_request_alone_gets_the_text_it_gets_among_others(served: Speculating) -> None:
    alone = [steps(answers(served.llm, [prompt])[0]) for prompt in served.prompts]
    assert_same_texts(served.expected, alone)


def test_a_prefix_hit_on_a_speculated_answer_gives_the_text_of_a_miss(served: Speculating) -> None:
    """Tiles of generated tokens enter the prefix cache with true rows only."""
    (first,) = answers(served.llm, served.prompts[:1])
    longer = [[*served.prompts[0], *tokens(first)]]
    served.llm.reset_prefix_cache()
    params: dict[str, Any] = {"logprobs": 2}
    miss = generate_without_prompt_logprobs(served.llm, longer, **params)
    served.llm.reset_prefix_cache()
    generate_without_prompt_logprobs(served.llm, served.prompts[:1], max_tokens=LENGTH, **params)
    hit = generate_without_prompt_logprobs(served.llm, longer, **params)
    assert miss.num_cached_tokens == 0
    if "compress" not in served.policy and served.policy != "snapkv":
        assert hit.num_cached_tokens >= len(longer[0]) // 64 * 64 - 64
    assert_same_texts([steps(miss)], [steps(hit)])


def generate_without_prompt_logprobs(
    llm: LLM, prompts: list[list[int]], max_tokens: int = 40, **params: Any
) -> RequestOutput:
    """Prompt log-probabilities make vLLM compute the whole prompt again."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **params)
    (output,) = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return output


def test_a_preempted_request_gets_its_text(served: Speculating, model: Path) -> None:
    layout, report = served.report.layout, served.report
    longest = max(map(len, served.prompts)) + LENGTH
    held = sum(held_blocks(layout, len(prompt)) for prompt in served.prompts)
    num_blocks = 2 + max(held, widest_request(layout, longest))
    served.llm.reset_prefix_cache()
    with engine(
        model, served.policy, kv_cache_memory_bytes=num_blocks * report.block_bytes, max_model_len=longest,
        speculative_config=NGRAM,
    ) as llm, counted_preemptions(llm) as preempt:  # fmt: skip
        outputs = answers(llm, served.prompts)
        assert_same_texts(served.expected, [steps(output) for output in outputs])
        assert free_blocks(llm) == num_blocks - 1
    if layout.policy.eviction is None:
        assert preempt.call_count > 0


def test_the_table_says_how_many_drafts(served: Speculating) -> None:
    assert "5 drafts a step" in served.report.table()
