"""Engines inside the test process: seconds to start, one at a time."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

# Read by vLLM when it is imported: no engine process, and leave the test process' CPU affinity alone.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"

from vllm import LLM, RequestOutput, SamplingParams

from kvserve.calibrate.prepare import prepare
from kvserve.engine.report import EngineReport
from kvserve.engine.settings import EngineSettings, scheduler_options
from kvserve.policies.loading import load_policy
from tests.cases.greedy import Step, assert_same_texts, steps_of

MIB = 1 << 20
STORY = (
    "The harbour master counted the boats twice that evening, for the storm had come in early and three of them "
    "were still out beyond the point. He wrote their names in the ledger: the Margaret, the Blue Heron and the old "
    "Constance, whose skipper never listened to warnings. Then he lit the second lamp and waited. "
)


@contextmanager
def engine(
    model: Path, policy: str | None, changes: dict[str, Any] | None = None, kernels: str = "auto", **options: Any
) -> Iterator[LLM]:
    """An engine serving `model` with `policy` (None: stock vLLM) and changes to it, shut down at the end."""
    from vllm.v1.attention.selector import _cached_get_attn_backend

    _cached_get_attn_backend.cache_clear()  # its key does not know the policy
    settings: dict[str, Any] = {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "kv_cache_memory_bytes": 64 * MIB,
        "max_num_batched_tokens": 128, "max_num_seqs": 8,
    }  # fmt: skip
    if policy is not None:
        if load_policy(policy).calibration:
            prepare([load_policy(policy)], str(model))  # the default model's calibrations are made on first use
        section = {"policy": policy, "set": changes or {}, "kernels": kernels}
        settings |= {"additional_config": {"kvserve": section}, "block_size": 64}
        if load_policy(policy).eviction:
            settings |= scheduler_options()
    llm = LLM(model=str(model), **(settings | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def random_prompts(lengths: list[int], vocab_size: int = 500, seed: int = 0) -> list[list[int]]:
    """Prompts of random token ids."""
    generator = random.Random(seed)
    return [[generator.randrange(1, vocab_size) for _ in range(length)] for length in lengths]


def generate(llm: LLM, prompts: list[list[int]], max_tokens: int = 8, **params: Any) -> list[RequestOutput]:
    """Greedy outputs with prompt logprobs."""
    sampling = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, prompt_logprobs=0, detokenize=False, **params
    )
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)


@contextmanager
def counted_preemptions(llm: LLM) -> Iterator[Mock]:
    """Counts preemptions in `call_count`."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    with patch.object(scheduler, "_preempt_request", wraps=scheduler._preempt_request) as preempt:
        yield preempt


def report_of(llm: LLM) -> EngineReport:
    """What an engine says of its cache at startup."""
    config = llm.llm_engine.vllm_config
    settings = EngineSettings.from_vllm_config(config)
    assert settings is not None
    return EngineReport.from_vllm_config(config, settings)


def free_blocks(llm: LLM) -> int:
    """Blocks of the pool that no request holds."""
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def assert_preempted_with_same_texts(
    llm: LLM, prompts: list[list[int]], expected: list[list[Step]], num_blocks: int
) -> None:
    """In a pool of `num_blocks`, requests lose their blocks, get the `expected` texts, and give all blocks back."""
    with counted_preemptions(llm) as preempt:
        outputs = generate(llm, prompts, max_tokens=len(expected[0]), logprobs=2)
    assert preempt.call_count > 0
    assert_same_texts(expected, [steps(output) for output in outputs])
    assert free_blocks(llm) == num_blocks - 1  # less vLLM's null block


def prompt_logprobs(output: RequestOutput) -> list[float]:
    """Log-probabilities of the prompt's tokens from the second on."""
    assert output.prompt_logprobs is not None
    return [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:] if entry]


def tokens(output: RequestOutput) -> list[int]:
    """Generated token ids."""
    return list(output.outputs[0].token_ids)


def steps(output: RequestOutput) -> list[Step]:
    """Generated tokens with their margins; needs `logprobs=2`."""
    top = output.outputs[0].logprobs
    assert top is not None
    alternatives = [{str(token): entry.logprob for token, entry in step.items()} for step in top]
    return steps_of([str(token) for token in tokens(output)], alternatives)


def encode(llm: LLM, text: str) -> list[int]:
    """Token ids of `text`."""
    return llm.get_tokenizer().encode(text)
