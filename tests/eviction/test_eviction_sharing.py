"""Evicted prompts beside everything else: freed blocks, prefix hits, other questions, requests with their own limit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from vllm import LLM, SamplingParams

from kvserve.default_model import prepare_default_model
from kvserve.engine.eviction_manager import EvictingPageManager
from tests.cases.engine_cases import MIB, STORY, encode, engine, generate, steps, tokens

NUM_TOKENS = 24


@pytest.fixture(scope="module")
def roomy() -> Iterator[LLM]:
    """A data-dependent policy in which the KV heads of all layers compete."""
    with engine(prepare_default_model(), "kv-compress", max_model_len=2048, kv_cache_memory_bytes=256 * MIB) as llm:
        yield llm


def manager_of(llm: LLM) -> EvictingPageManager:
    (manager,) = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.coordinator.single_type_managers
    return manager


def test_replaced_blocks_are_free_while_the_request_still_runs(roomy: LLM) -> None:
    core, manager = roomy.llm_engine, manager_of(roomy)
    pool = core.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    free_before = pool.get_num_free_blocks()
    prompt = encode(roomy, STORY * 16)
    core.add_request("long", {"prompt_token_ids": prompt}, SamplingParams(max_tokens=200, ignore_eos=True))
    while not any(len(output.outputs[0].token_ids) > 3 for output in core.step()):
        pass
    (plan,) = manager.plans.values()
    layout = manager.layout
    held = free_before - pool.get_num_free_blocks()
    assert held == plan.held_blocks(len(prompt))
    assert held < layout.private_blocks + len(prompt) // 64 // 4 + 4
    core.abort_request(["long"])
    core.step()
    assert pool.get_num_free_blocks() == free_before
    assert not manager.plans


def test_a_prefix_hit_is_evicted_like_a_miss(roomy: LLM) -> None:
    roomy.reset_prefix_cache()
    prompt = encode(roomy, STORY * 7 + "In the morning")
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, logprobs=0, max_tokens=NUM_TOKENS)
    miss, hit = (roomy.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0] for _ in range(2))
    assert miss.num_cached_tokens == 0
    assert hit.num_cached_tokens == (len(prompt) - 8) // 64 * 64
    assert tokens(hit) == tokens(miss)
    assert hit.outputs[0].cumulative_logprob == pytest.approx(miss.outputs[0].cumulative_logprob, abs=2e-2)


def test_another_question_gets_the_whole_prompt_back(roomy: LLM) -> None:
    story = encode(roomy, STORY * 7)
    off = SamplingParams(
        temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=NUM_TOKENS, extra_args={"kvserve_off": 1}
    )
    question = {"prompt_token_ids": story + encode(roomy, "Question: who wrote the names? Answer:")}
    roomy.reset_prefix_cache()
    expected = roomy.generate([question], off, use_tqdm=False)[0]
    roomy.reset_prefix_cache()
    generate(roomy, [story + encode(roomy, "In the morning")])  # evicted, its prompt's pages stay in the prefix cache
    after = roomy.generate([question], off, use_tqdm=False)[0]
    assert after.num_cached_tokens > 0
    assert tokens(after) == tokens(expected)


def test_a_request_may_keep_everything(roomy: LLM) -> None:
    prompt = encode(roomy, STORY * 7 + "In the morning")
    sampling = SamplingParams(
        temperature=0.0, ignore_eos=True, detokenize=False, logprobs=2, max_tokens=NUM_TOKENS,
        extra_args={"kvserve_off": 1},
    )  # fmt: skip
    off = steps(roomy.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0])
    free = roomy.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    assert free > 0
    with_rate_one = sampling.clone()
    with_rate_one.extra_args = {"kvserve_rate": 1}
    again = steps(roomy.generate([{"prompt_token_ids": prompt}], with_rate_one, use_tqdm=False)[0])
    assert [s.token for s in off] == [s.token for s in again]
