"""After a storm of requests half of which are aborted, the pool is whole and greedy answers are what they were.

`benchmarks/storms.py` does the same to servers over HTTP, and watches their memory.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams

from tests.cases.engine_cases import engine, free_blocks, generate, random_prompts
from tests.cases.tiny_models import make_tiny_model

pytestmark = pytest.mark.slow

RATES = [{"kvserve_rate": 2}, {"kvserve_rate": 8}, {"kvserve_off": 1}]
MAXIMA = [{"kvserve_max_tokens": 128}, {"kvserve_max_tokens": 192}]
SMALL = {"eviction.rate": None, "eviction.max_tokens": 256}
STORMS = {
    "kivi-2bit": ({}, []),
    "boost-2bit": ({}, []),
    "kv-compress-2bit": ({}, RATES),
    "kv-compress-live-2bit": ({}, MAXIMA),
    "expected-attention": (SMALL, MAXIMA),
    "h2o": (SMALL, MAXIMA),
    "mikv": ({}, RATES),
}
IN_FLIGHT = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama-gqa-64", tmp_path_factory.mktemp("model"))


def probe(llm: LLM) -> list[Any]:
    """Tokens and log-probabilities of greedy answers, each alone and on an empty prefix cache."""
    answers = []
    for prompt in random_prompts([40, 150, 260, 500], seed=99):
        assert llm.reset_prefix_cache()
        (output,) = generate(llm, [prompt], max_tokens=24, logprobs=3)
        logprobs = [{token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs]
        answers.append((output.outputs[0].token_ids, logprobs))
    return answers


class Storm:
    """Mixed requests to one engine: of all lengths, with shared prefixes and own limits, half of them aborted."""

    def __init__(self, llm: LLM, limits: list[dict[str, float]], longest: int, seed: int) -> None:
        self.engine, self.limits, self.longest, self.random = llm.llm_engine, limits, longest, random.Random(seed)
        self.shared = [[], *random_prompts([64, 100, 200], seed=seed)]
        self.outcomes: Counter[str] = Counter()

    def add(self, number: int) -> None:
        prefix, abort = self.random.choice(self.shared), number % 2
        length = self.random.randrange(1, self.longest - len(prefix))
        own = self.random.choice(self.limits) if self.limits and self.random.random() < 0.5 else None
        sampling = SamplingParams(
            temperature=0.0, max_tokens=200 if abort else self.random.randrange(1, 9), ignore_eos=True,
            detokenize=False, extra_args=own,
        )  # fmt: skip
        (rest,) = random_prompts([length], seed=number)
        self.engine.add_request(str(number), {"prompt_token_ids": prefix + rest}, sampling)

    def rage(self, num_requests: int) -> None:
        """Every step adds what is missing, and aborts those whose time has come."""
        left, live, step = iter(range(num_requests)), {}, 0
        while True:
            for number in left:
                self.add(number)
                live[str(number)] = step + self.random.choice([0, 1, 5, 30, 100]) if number % 2 else None
                if len(live) >= IN_FLIGHT:
                    break
            if not live:
                return
            for output in self.engine.step():
                if output.finished:
                    del live[output.request_id]
                    self.outcomes[str(output.outputs[0].finish_reason)] += 1
            due = [name for name, end in live.items() if end is not None and end <= step]
            self.engine.abort_request(due)
            self.outcomes["aborted"] += len(due)
            live, step = {name: end for name, end in live.items() if name not in due}, step + 1


@pytest.mark.parametrize("policy", STORMS)
def test_a_storm_leaves_every_page_free_and_every_answer_the_same(policy: str, model: Path) -> None:
    changes, limits = STORMS[policy]
    options = {
        "max_num_seqs": 24, "max_num_batched_tokens": 512, "max_model_len": 832, "num_gpu_blocks_override": 48,
        "skip_tokenizer_init": True,
    }  # fmt: skip
    with engine(model, policy, changes, **options) as llm:
        before, storm = probe(llm), Storm(llm, limits, 600, seed=1)
        storm.rage(200)
        assert storm.outcomes["aborted"] > 90 and storm.outcomes.keys() == {"length", "aborted"}
        llm.llm_engine.step()  # tells the worker of the last one's end
        assert free_blocks(llm) == 47, "less vLLM's null block"
        assert probe(llm) == before
