"""Pools of exactly the size that a request needs: what the check admits is scheduled to its end, on vLLM's scheduler.

What a request that is alone asks for does not depend on the pool: the one that just fits it stands for all larger ones.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.engine import FinishReason

from kvserve.accounting.admission import Admission
from kvserve.accounting.plan import check_limit, widest_request
from kvserve.policies.limits import request_limit
from tests.cases.scheduler_cases import Engine, make_config

MAX_LEN = 1100
EACH_TOKEN = {"name": "over-budget", "interval": 1}
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "kv-compress": ("kv-compress", {}),
    "kv-compress-2bit": ("kv-compress-2bit", {}),
    "snapkv-256": ("snapkv", {"eviction.rate": None, "eviction.max_tokens": 256}),
    "chunks": ("kv-compress", {"eviction.schedule": {"name": "end-of-prefill", "chunk_tokens": 512}}),
    "over-budget-1": ("tova", {"eviction.rate": None, "eviction.max_tokens": 300, "eviction.schedule": EACH_TOKEN}),
    "kv-compress-live": ("kv-compress-live", {}),
    "spared": ("kv-compress", {"eviction.rate": 3, "eviction.spare_layers": [0, -1]}),
    "h2o": ("h2o", {}),
    "mikv": ("mikv", {}),
}  # fmt: skip
STEPS_AHEAD = [0, 1]


@dataclass(frozen=True)
class Ask:
    """One request: its prompt's length, how much it generates, and its vllm_xargs."""

    prompt_len: int
    max_tokens: int
    arguments: dict[str, Any]


class Pools:
    """Engines of one policy, one for each size of the pool."""

    def __init__(self, folder: Path, policy: str, steps_ahead: int, seed: int) -> None:
        name, changes = POLICIES[policy]
        self.config = make_config(folder, name, changes, MAX_LEN)
        self.steps_ahead, self.random = steps_ahead, random.Random(f"{policy} {steps_ahead} {seed}")
        self.engines: dict[int, Engine] = {}
        self.layout = self.engine(100).layout
        self.least = widest_request(self.layout, MAX_LEN)
        self.shared = self.prompt(MAX_LEN)
        self.num_requests = 0

    def engine(self, num_blocks: int) -> Engine:
        if num_blocks not in self.engines:
            self.engines[num_blocks] = Engine(self.config, num_blocks, self.steps_ahead)
        return self.engines[num_blocks]

    def prompt(self, length: int) -> list[int]:
        return [self.random.randrange(1, 512) for _ in range(length)]

    def arguments(self) -> dict[str, Any]:
        """A limit of a request's own that the policy can follow, or none."""
        own = [{}, {}, {"kvserve_off": 1}]
        own += [{"kvserve_rate": rate} for rate in (1.0, 1.05, 1.3, 2.0, 7.0)]
        own += [{"kvserve_max_tokens": count} for count in (100, 256, 700)]
        while True:
            arguments = self.random.choice(own)
            try:
                self.limit(arguments)
                return arguments
            except ValueError:
                continue

    def limit(self, arguments: dict[str, Any]) -> Any:
        policy = self.layout.policy
        assert policy.eviction is not None
        limit = request_limit(policy.eviction, policy, arguments)
        if limit:
            check_limit(self.layout, limit, MAX_LEN)
        return limit

    def need(self, ask: Ask) -> int:
        """Blocks that the request needs at its widest, by the check of requests."""
        admission = Admission(self.layout, self.limit(ask.arguments), ask.prompt_len, ask.max_tokens, MAX_LEN)
        return admission.peak_blocks(ask.max_tokens)

    def submit(self, engine: Engine, ask: Ask, shared: bool) -> str:
        """Prompts that share tokens are hits of the prefix cache, the longest of which leave out a cut."""
        self.num_requests += 1
        prompt = self.shared[: ask.prompt_len] if shared else self.prompt(ask.prompt_len)
        engine.add(str(self.num_requests), prompt, ask.max_tokens, ask.arguments)
        return str(self.num_requests)

    def assert_it_ends_in(self, num_blocks: int, ask: Ask, shared: bool) -> None:
        """Alone in a pool the request is scheduled to its end and never preempted; all blocks come back."""
        engine = self.engine(num_blocks)
        request_id = self.submit(engine, ask, shared)
        request = engine.scheduler.requests.get(request_id)
        assert request is not None, f"{ask} was refused: {engine.scheduler._last_outputs}"
        engine.run()
        assert engine.ended[request_id].finish_reason == FinishReason.LENGTH
        assert request.num_preemptions == 0, f"{ask} in {num_blocks} blocks"
        assert engine.free_blocks == num_blocks

    def assert_it_is_refused_in(self, num_blocks: int, ask: Ask) -> None:
        engine = self.engine(num_blocks)
        request_id = self.submit(engine, ask, shared=True)
        engine.run()
        assert engine.ended[request_id].finish_reason == FinishReason.ERROR
        assert f"pool of {num_blocks} blocks" in str(engine.ended[request_id].stop_reason)
        assert engine.free_blocks == num_blocks

    def check(self, ask: Ask) -> None:
        """In a pool that just fits, or is a block too small, and in the least pool that starts."""
        need = self.need(ask)
        self.engine(need).least_free = need
        self.assert_it_ends_in(need, ask, shared=False)
        assert self.engine(need).least_free == 0, "the check asks for no more than is needed"
        self.assert_it_ends_in(need, ask, shared=True)
        self.assert_it_is_refused_in(need - 1, ask)
        if not ask.arguments:
            self.assert_it_ends_in(self.least, ask, shared=True)

    def mix(self, num_requests: int) -> None:
        """Random requests that come at random times to a random pool, of which each fits alone, all end."""
        engine = self.engine(self.random.randint(self.least, 2 * self.least))
        names, num_blocks = [], engine.free_blocks
        for _ in range(num_requests):
            ask = Ask(self.random.randrange(1, MAX_LEN - 1), self.random.choice([1, 2, 30, 200]), self.arguments())
            name = self.submit(engine, ask, shared=self.random.random() < 0.5)
            names.append((name, self.need(ask) <= num_blocks))
            for _ in range(self.random.randrange(30)):
                engine.step()
        engine.run(most_steps=20_000)
        for name, fits in names:
            assert engine.ended[name].finish_reason == (FinishReason.LENGTH if fits else FinishReason.ERROR)
        assert engine.free_blocks == num_blocks


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("steps_ahead", STEPS_AHEAD)
def test_a_request_ends_in_the_pool_that_just_fits_it_and_is_refused_in_a_smaller_one(policy, steps_ahead, tmp_path):
    pools = Pools(tmp_path, policy, steps_ahead, seed=1)
    for _ in range(25):
        pools.check(Ask(pools.random.randrange(1, MAX_LEN - 1), pools.random.choice([1, 3, 100]), pools.arguments()))
    pools.check(Ask(MAX_LEN - 1, 1, {}))
    pools.check(Ask(pools.random.randrange(1, 400), MAX_LEN, pools.arguments()))


@pytest.mark.parametrize("steps_ahead", STEPS_AHEAD)
def test_requests_that_fit_alone_all_end_in_a_pool_that_holds_few_of_them(policy, steps_ahead, tmp_path) -> None:
    Pools(tmp_path, policy, steps_ahead, seed=2).mix(8)


@pytest.mark.slow
def test_prompts_of_every_length_end_in_every_pool_that_admits_them(policy, tmp_path) -> None:
    both = [Pools(tmp_path, policy, steps_ahead, seed=3) for steps_ahead in STEPS_AHEAD]
    for prompt_len in range(1, MAX_LEN):
        pools = both[prompt_len % 2]
        pools.check(Ask(prompt_len, pools.random.choice([1, 2, 65]), {}))
        pools.check(Ask(prompt_len, pools.random.choice([1, 2, 65]), pools.arguments()))
    for pools in both:
        for prompt_len in (1, *pools.random.sample(range(2, MAX_LEN), 8)):
            pools.check(Ask(prompt_len, MAX_LEN, {}))
            pools.check(Ask(prompt_len, MAX_LEN, pools.arguments()))
        for _ in range(15):
            pools.mix(10)
    print(sum(pools.num_requests for pools in both), "requests in", sum(len(pools.engines) for pools in both), "pools")
