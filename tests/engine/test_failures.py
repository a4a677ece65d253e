"""What goes wrong in kvserve for one request ends that request with an error; the others do not notice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
from vllm.config import VllmConfig
from vllm.v1.engine import FinishReason

import kvserve.engine.connector as connector
from kvserve.accounting.admission import Admission
from kvserve.accounting.plan import EvictionPlan
from kvserve.engine.eviction_manager import EvictingPageManager
from kvserve.engine.stats import Accounting, Evicted, StepEvictions
from tests.cases.scheduler_cases import Engine, make_config

NUM_BLOCKS = 60
BROKEN_LEN = 333  # the prompt of the request for which something fails


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    schedule = {"name": "every-n", "interval": 32}
    return make_config(tmp_path_factory.mktemp("model"), "snapkv", {"eviction.schedule": schedule})


@pytest.fixture(params=[0, 1], ids=["step by step", "a step ahead"])
def engine(request: pytest.FixtureRequest, config: VllmConfig) -> Iterator[Engine]:
    yield Engine(config, NUM_BLOCKS, steps_ahead=request.param)


def failing(owner: Any, name: str, is_broken: Any, after: int = 0) -> Any:
    """Makes a method raise where `is_broken(*arguments)`, after so many calls that went well."""
    method, calls = getattr(owner, name), []

    def called(*arguments: Any, **keywords: Any) -> Any:
        if is_broken(*arguments):
            calls.append(arguments)
            if len(calls) > after:
                raise ZeroDivisionError("injected")
        return method(*arguments, **keywords)

    return patch.object(owner, name, called)


def of_plan(plan: EvictionPlan, *_: Any) -> bool:
    return plan.prompt_len == BROKEN_LEN


def run_three(engine: Engine) -> None:
    for name, length in (("before", 300), ("broken", BROKEN_LEN), ("behind", 290)):
        engine.add(name, list(range(1, length + 1)), 60)
    engine.run(most_steps=1000)


@pytest.mark.parametrize(
    "failure",
    [
        failing(connector, "request_limit", lambda eviction, policy, arguments, *_: "broken" in arguments),
        failing(Admission, "fits", lambda self, _: self.prompt_len == BROKEN_LEN),
        failing(Accounting, "start", lambda self, request, _: request.request_id == "broken"),
        *(
            failing(EvictionPlan, method, of_plan, after)
            for method, after in [
                ("clip_step", 0), ("clip_step", 1), ("clip_step", 20), ("peak_blocks", 0), ("last_cut", 0),
                ("last_cut", 3), ("last_cut", 4), ("last_cut", 5), ("last_cut", 6), ("last_cut", 7), ("last_cut", 30),
                ("last_cut", 31), ("next_cut", 3), ("next_cut", 9), ("reusable_tokens", 0), ("reusable_tokens", 1),
            ]
        ),
        failing(EvictingPageManager, "kept_at", lambda self, name, *_: name == "broken", 5),
        failing(EvictingPageManager, "state_block", lambda self, name: name == "broken"),
    ],
)  # fmt: skip
def test_whatever_fails_for_one_request_ends_that_request_alone(engine: Engine, failure: Any, caplog) -> None:
    with failure:
        for name, length in (("before", 300), ("broken", BROKEN_LEN), ("behind", 290)):
            engine.add(name, list(range(1, length + 1)), 60, {name: 1})
        engine.run(most_steps=1000)
    assert engine.ended["broken"].finish_reason == FinishReason.ERROR
    assert engine.ended["broken"].stop_reason == "kvserve failed: ZeroDivisionError: injected"
    for name in ("before", "behind"):
        assert engine.ended[name].finish_reason == FinishReason.LENGTH
        assert engine.ended[name].kv_transfer_params["kvserve"]["rate_effective"] >= 1
    assert engine.free_blocks == NUM_BLOCKS
    assert engine.scheduler.connector.accounting.requests == {} == engine.scheduler.manager.plans


def test_a_report_that_fails_leaves_the_answer_as_it_is(engine: Engine) -> None:
    with failing(Accounting, "finish", lambda self, request_id: request_id == "broken"):
        run_three(engine)
    assert {output.finish_reason for output in engine.ended.values()} == {FinishReason.LENGTH}
    assert engine.ended["broken"].kv_transfer_params is None
    assert engine.ended["behind"].kv_transfer_params["kvserve"]["tokens_cached"] > 290
    assert engine.free_blocks == NUM_BLOCKS


def test_an_eviction_that_cannot_be_accounted_for_ends_its_request(engine: Engine) -> None:
    for name in ("fine", "broken"):
        engine.add(name, list(range(1, 200)), 60)
    engine.step()
    with failing(Accounting, "add", lambda self, step: "broken" in step.requests):
        step = StepEvictions({name: Evicted(199, 10, [[3]]) for name in ("fine", "broken")})
        engine.scheduler.connector.take_evictions(step)
    engine.run(most_steps=1000)
    assert engine.ended["broken"].finish_reason == FinishReason.ERROR
    assert engine.ended["fine"].finish_reason == FinishReason.LENGTH


def test_metrics_that_fail_end_nothing(engine: Engine) -> None:
    with failing(Accounting, "take", lambda self: True):
        run_three(engine)
    assert {output.finish_reason for output in engine.ended.values()} == {FinishReason.LENGTH}


def test_a_request_that_does_not_fit_is_told_what_would_and_does_not_hold_up_others(config: VllmConfig) -> None:
    engine, prompt = Engine(config, 24), list(range(1, 1001))
    engine.add("wide", prompt, 50, {"kvserve_rate": 1.3})
    engine.add("other", prompt, 5)
    engine.run(most_steps=100)
    assert engine.ended["other"].finish_reason == FinishReason.LENGTH
    reason = str(engine.ended["wide"].stop_reason)
    assert engine.ended["wide"].kv_transfer_params == {"kvserve": {"error": reason}}
    assert reason.startswith("the KV pool of 24 blocks can never hold this request: a prompt of 1000 tokens")
    assert "keeping one of 1.3 tokens; shorten the prompt, or leave out kvserve_rate" in reason


def test_a_request_that_generates_less_as_it_was_told_fits(config: VllmConfig) -> None:
    engine, prompt = Engine(config, 24), list(range(1, 501))
    engine.add("long", prompt, 590, {"kvserve_rate": 1.3})
    engine.run()
    told = int(str(engine.ended["long"].stop_reason).split("set max_tokens to at most ")[1].split(",")[0])
    engine.add("told", prompt, told, {"kvserve_rate": 1.3})
    engine.add("one more", prompt, told + 1, {"kvserve_rate": 1.3})
    engine.run()
    assert engine.ended["told"].finish_reason == FinishReason.LENGTH
    assert engine.ended["one more"].finish_reason == FinishReason.ERROR
