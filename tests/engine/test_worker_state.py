"""What a worker, and the scheduler, keep of a request is gone when the request is, whether or not another one comes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm import LLM, SamplingParams

from kvserve.engine import connector
from kvserve.engine.eviction_manager import EvictingPageManager
from kvserve.engine.stats import worker_log
from kvserve.policies.loading import load_policy, policy_names
from kvserve.scorers.registry import SCORERS, make_scorer
from tests.cases.engine_cases import engine, random_prompts
from tests.cases.tiny_models import make_tiny_model

COLLECTING = [name for name in SCORERS if make_scorer({"name": name}).collects]


def policy_with(scorer: str) -> str:
    """The first shipped policy that scores by `scorer`."""
    policies = ((name, load_policy(name).eviction) for name in policy_names())
    return next(name for name, eviction in policies if eviction and eviction.scorer.name == scorer)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama-gqa-64", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=COLLECTING)
def llm(request: pytest.FixtureRequest, model: Path) -> Iterator[LLM]:
    """A maximum of tokens is kept up while a request generates, so that it is collected to its end."""
    limit = {"eviction.rate": None, "eviction.max_tokens": 128}
    with engine(model, policy_with(request.param), limit, skip_tokenizer_init=True, enable_prefix_caching=True) as llm:
        yield llm


def collected() -> set[str]:
    """Requests of which any collector of this process still holds something."""
    return {name for collector in connector._collectors for name in collector.requests}


def scheduled(llm: LLM) -> set[str]:
    """Requests of which the scheduler's side still holds something."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pages, accounting = EvictingPageManager.of(scheduler.kv_cache_manager), scheduler.connector.accounting
    tables = (pages.plans, pages.kept, pages.given_back, pages.req_to_blocks, pages.num_cached_block)
    return accounting.requests.keys() | {name for table in tables for name in table}


def start(llm: LLM, name: str, prompt_len: int, max_tokens: int) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    (prompt,) = random_prompts([prompt_len], seed=prompt_len)
    llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, sampling)


def run_to_the_end(llm: LLM) -> None:
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


def test_one_that_ends_alone_is_dropped_by_a_step_without_tokens(llm: LLM) -> None:
    start(llm, "alone", 300, 5)
    llm.llm_engine.step()
    assert len(collected()) == 1
    run_to_the_end(llm)
    llm.llm_engine.step()
    assert not collected() and not worker_log.requests and not connector.current_plans().rows
    assert not scheduled(llm)


def test_one_after_the_other_leaves_at_most_the_last(llm: LLM) -> None:
    for number in range(4):
        start(llm, f"request {number}", 200 + number, 5)
        llm.llm_engine.step()
        assert len(collected()) == 1
        run_to_the_end(llm)
    assert len(collected()) == 1


def test_an_aborted_one_is_dropped_wherever_it_stood(llm: LLM) -> None:
    for prompt_len, steps in ((600, 1), (600, 3), (300, 8)):  # within its prompt, and while it generates
        start(llm, "aborted", prompt_len, 50)
        for _ in range(steps):
            llm.llm_engine.step()
        assert len(collected()) == 1
        llm.llm_engine.abort_request(["aborted"])
        llm.llm_engine.step()
        assert not collected() and not scheduled(llm)
