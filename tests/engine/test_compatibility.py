"""Every shipped policy with every feature; docs/compatibility.md shows what came out.

Each test is a cell of the matrix. It asserts that the feature works, and returns what the cell says. `make matrix` runs
them all with KVSERVE_MATRIX naming the result file; the page is made from that by benchmarks/reports/compatibility.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, CompletionOutput, RequestOutput, SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from kvserve.accounting.plan import held_blocks, widest_request
from kvserve.default_model import prepare_default_model
from kvserve.engine.backend import backend_for
from kvserve.engine.builder import graph_support
from kvserve.engine.report import EngineReport
from kvserve.engine.settings import EngineSettings
from kvserve.errors import UnsupportedError
from kvserve.measuring.machine import versions
from kvserve.policies.loading import load_policy
from kvserve.policies.registry import policy_names
from tests.cases.engine_cases import MIB, STORY, counted_preemptions, encode, engine, free_blocks, steps
from tests.cases.greedy import Step, assert_same_texts, differs_only_behind_a_near_tie

NUM_TOKENS = 24
LONG_ANSWER = 80  # fills the unfinished tile, and more
NAMES = ["Anna", "Boris", "Chen", "Dalia", "Emeka", "Farah"]
SCHEMA = {"type": "object", "properties": {"boats": {"type": "integer"}}, "required": ["boats"]}
CHOOSES_BY_REQUEST = ("random",)  # its texts differ from request to request
FAILS = "**fails**"
MATRIX: dict[str, dict[str, str]] = {}


@dataclass
class Served:
    """A policy in a roomy engine that fills prompts at once, six prompts and their greedy texts."""

    policy: str
    llm: LLM
    prompts: list[list[int]]
    texts: list[list[Step]] = field(default_factory=list)

    @property
    def same_texts(self) -> bool:
        """Whether a request's text depends on the request's tokens alone."""
        return self.policy not in CHOOSES_BY_REQUEST


@pytest.fixture(scope="module", params=policy_names())
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    with engine(
        prepare_default_model(), request.param, kv_cache_memory_bytes=256 * MIB, max_num_batched_tokens=1024
    ) as llm:
        prompts = story_prompts(llm)
        found = Served(request.param, llm, prompts)
        found.texts = [steps(one) for one in complete(llm, prompts, skip_reading_prefix_cache=True)]
        yield found


@pytest.fixture(scope="module", autouse=True)
def result_file() -> Iterator[None]:
    """A run of some of the tests changes their cells alone."""
    yield
    if name := os.environ.get("KVSERVE_MATRIX"):
        path = Path(name)
        earlier = json.loads(path.read_text(encoding="utf-8"))["matrix"] if path.exists() else {}
        matrix = {policy: earlier.get(policy, {}) | MATRIX.get(policy, {}) for policy in policy_names()}
        content = {"command": ["make", "matrix"], "versions": versions(), "matrix": matrix}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def story_prompts(llm: LLM) -> list[list[int]]:
    return [encode(llm, f"{name} told this story. " + STORY * 4 + f"And {name} said:") for name in NAMES]


def complete(llm: LLM, prompts: list[list[int]], **options: Any) -> list[RequestOutput]:
    sampling = SamplingParams(
        **{"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True, "logprobs": 2, **options}
    )
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)


def cell(feature: str) -> Callable[[Callable[[Served], str]], Callable[[Served], None]]:
    """A test whose returned text is the matrix's cell; a test that fails is a cell too."""

    def wrap(check: Callable[[Served], str]) -> Callable[[Served], None]:
        def test(served: Served) -> None:
            MATRIX.setdefault(served.policy, {})[feature] = FAILS
            MATRIX[served.policy][feature] = check(served)

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return pytest.mark.slow(test)

    return wrap


@cell("prefix cache")
def test_a_prefix_hit_gives_the_text_of_a_miss(served: Served) -> str:
    served.llm.reset_prefix_cache()
    miss, hit = (complete(served.llm, served.prompts[:1])[0] for _ in range(2))
    if served.same_texts:
        assert differs_only_behind_a_near_tie(steps(miss), steps(hit))
    assert miss.num_cached_tokens == 0
    return "yes" if hit.num_cached_tokens else "computes the whole prompt"


@cell("batching")
def test_a_request_alone_gets_the_text_it_gets_among_others(served: Served) -> str:
    alone = [steps(complete(served.llm, [prompt], skip_reading_prefix_cache=True)[0]) for prompt in served.prompts[:2]]
    if served.same_texts:
        assert all(differs_only_behind_a_near_tie(*pair) for pair in zip(served.texts[:2], alone, strict=True))
    return "yes"


@cell("n > 1")
def test_several_answers_to_one_prompt_are_each_the_greedy_one(served: Served) -> str:
    (output,) = complete(served.llm, served.prompts[:1], n=2, temperature=1e-5)
    assert len(output.outputs) == 2
    for answer in output.outputs:
        alone = replace_answers(output, [answer])
        if served.same_texts:
            assert differs_only_behind_a_near_tie(served.texts[0], steps(alone))
    return "yes"


def replace_answers(output: RequestOutput, answers: list[CompletionOutput]) -> RequestOutput:
    found = copy(output)
    found.outputs = answers
    return found


@cell("prompt log-probabilities")
def test_log_probabilities_of_a_prompt_are_those_before_eviction(served: Served) -> str:
    (output,) = complete(served.llm, served.prompts[:1], prompt_logprobs=0, max_tokens=1)
    assert output.prompt_logprobs is not None
    found = [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:] if entry]
    assert len(found) == len(served.prompts[0]) - 1
    assert all(-30 < logprob <= 0 for logprob in found)
    return "before eviction" if load_policy(served.policy).eviction else "yes"


@cell("structured output")
def test_an_answer_follows_a_json_schema(served: Served) -> str:
    limits = StructuredOutputsParams(json=SCHEMA)
    (output,) = complete(served.llm, served.prompts[:1], structured_outputs=limits, ignore_eos=False, max_tokens=60)
    text = served.llm.get_tokenizer().decode(output.outputs[0].token_ids, skip_special_tokens=True)
    if output.outputs[0].finish_reason == "stop":
        assert isinstance(json.loads(text)["boats"], int)
    else:  # a number that grew until the tokens were spent
        assert text.lstrip().startswith("{")
    return "yes"


@cell("abort")
def test_an_aborted_request_gives_all_blocks_back(served: Served) -> str:
    core, before = served.llm.llm_engine, free_blocks(served.llm)
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    core.add_request("aborted", {"prompt_token_ids": served.prompts[0]}, params)
    while not any(len(output.outputs[0].token_ids) > 3 for output in core.step()):
        pass
    assert free_blocks(served.llm) < before
    core.abort_request(["aborted"])
    core.step()
    assert free_blocks(served.llm) == before
    return "yes"


@cell("sliding-window models")
def test_window_layers_join_the_others_or_are_refused(served: Served) -> str:
    backend = backend_for(settings_of(served.policy))
    window = SlidingWindowSpec(block_size=64, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, sliding_window=96)
    try:
        spec = backend.customize_spec(window)
    except UnsupportedError:
        assert load_policy(served.policy).eviction
        return "refused"
    return "whole sequence is kept" if spec is not window else "yes"


@cell("full CUDA graphs of decode steps")
def test_full_graphs_are_claimed_for_steps_that_cannot_evict(served: Served) -> str:
    claimed = graph_support(settings_of(served.policy))
    assert claimed in (AttentionCGSupport.NEVER, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE)
    return "no" if claimed == AttentionCGSupport.NEVER else "claimed; no GPU has run them"


def settings_of(policy: str) -> EngineSettings:
    return EngineSettings(load_policy(policy), 64, torch.bfloat16, kernels="triton", num_layers=30)


@pytest.mark.slow
@pytest.mark.parametrize("policy", policy_names())
def test_small_chunks_and_preemption_change_no_text(policy: str) -> None:
    """An engine with chunks of 100 tokens and blocks for the prompts alone, against a roomy one."""
    model, cells = prepare_default_model(), MATRIX.setdefault(policy, {})
    cells["chunked prefill"] = cells["preemption"] = FAILS
    with engine(model, policy, kv_cache_memory_bytes=256 * MIB, max_num_batched_tokens=1024) as llm:
        prompts = story_prompts(llm)
        expected = [steps(one) for one in complete(llm, prompts, max_tokens=LONG_ANSWER)]
        config = llm.llm_engine.vllm_config
        settings = EngineSettings.from_vllm_config(config)
        assert settings is not None
        report = EngineReport.from_vllm_config(config, settings)
    longest = max(map(len, prompts)) + LONG_ANSWER
    blocks = 4 + max(len(prompts) * held_blocks(report.layout, len(prompts[0])), widest_request(report.layout, longest))
    bytes_of_pool = blocks * report.block_bytes
    with engine(
        model, policy, kv_cache_memory_bytes=bytes_of_pool, max_num_batched_tokens=100, max_model_len=longest
    ) as llm:
        with counted_preemptions(llm) as preempt:
            outputs = complete(llm, prompts, max_tokens=LONG_ANSWER)
        assert free_blocks(llm) == blocks - 1
    if policy not in CHOOSES_BY_REQUEST:
        assert_same_texts(expected, [steps(one) for one in outputs])
    cells["chunked prefill"] = "yes"
    cells["preemption"] = "yes" if preempt.call_count else "did not occur"
