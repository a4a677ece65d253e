"""Engines without drafts and with: `python -m tests.cases.speculation POLICY [--small]` prints what both answer.

A process of its own, because drafts from the text bring in numba, over whose modules vLLM 0.32 stumbles when it starts
another engine in the same process.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from vllm import LLM, RequestOutput, SamplingParams

from kvserve.accounting.plan import held_blocks, widest_request
from kvserve.default_model import prepare_default_model
from kvserve.engine.report import EngineReport
from tests.cases.engine_cases import (
    MIB,
    STORY,
    counted_preemptions,
    encode,
    engine,
    free_blocks,
    report_of,
    steps,
    tokens,
)

DRAFTS = 5
NGRAM = {"method": "ngram", "num_speculative_tokens": DRAFTS, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
LENGTH = 150  # of an answer: more than two tiles
NAMES = ["Anna", "Boris", "Chen", "Dalia"]


def prompts_of(llm: LLM) -> list[list[int]]:
    """Answers repeat what they read, so that some drafts are right; lengths end at different places of a tile."""
    return [encode(llm, f"{name} " * (i + 1) + STORY * 3) for i, name in enumerate(NAMES)]


def answers(llm: LLM, prompts: list[list[int]], max_tokens: int = LENGTH) -> list[RequestOutput]:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, logprobs=2)
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)


def drafted(llm: LLM) -> tuple[float, float]:
    """Tokens drafted and accepted so far."""
    values = {metric.name: getattr(metric, "value", 0.0) for metric in llm.get_metrics()}
    return values["vllm:spec_decode_num_draft_tokens"], values["vllm:spec_decode_num_accepted_tokens"]


def found_in(llm: LLM, prompts: list[list[int]]) -> dict[str, Any]:
    """Texts of requests together and alone, and of a prompt that ends with an answer, with and without a prefix hit."""
    together = answers(llm, prompts)
    found = {
        "together": [steps(output) for output in together],
        "alone": [steps(answers(llm, [prompt])[0]) for prompt in prompts],
        "drafted": drafted(llm),
        "free": free_blocks(llm),
    }
    longer = [[*prompts[0], *tokens(together[0])]]
    llm.reset_prefix_cache()
    miss = answers(llm, longer, 40)[0]
    llm.reset_prefix_cache()
    answers(llm, prompts[:1])
    hit = answers(llm, longer, 40)[0]
    found |= {"miss": [steps(miss)], "hit": [steps(hit)], "length": len(longer[0])}
    return found | {"cached": [miss.num_cached_tokens, hit.num_cached_tokens]}


def small_pool(report: EngineReport, prompts: list[list[int]]) -> dict[str, Any]:
    """Options of an engine that holds all prompts, and not their answers."""
    longest = max(map(len, prompts)) + LENGTH
    held = sum(held_blocks(report.layout, len(prompt)) for prompt in prompts)
    num_blocks = 3 + max(held, widest_request(report.layout, longest) + 1)
    return {"kv_cache_memory_bytes": num_blocks * report.block_bytes, "max_model_len": longest}


def main(policy: str, is_small: bool) -> dict[str, Any]:
    model = prepare_default_model()
    with engine(model, policy, kv_cache_memory_bytes=256 * MIB) as plain:
        prompts = prompts_of(plain)
        expected = [steps(output) for output in answers(plain, prompts)]
        options = small_pool(report_of(plain), prompts) if is_small else {"kv_cache_memory_bytes": 256 * MIB}
    with engine(model, policy, speculative_config=NGRAM, disable_log_stats=False, **options) as llm:
        report = report_of(llm)
        found = {"expected": expected, "blocks": report.num_blocks, "table": report.table()}
        if not is_small:
            return found | found_in(llm, prompts)
        with counted_preemptions(llm) as preempt:
            found |= {"together": [steps(output) for output in answers(llm, prompts)]}
        return found | {"preemptions": preempt.call_count, "free": free_blocks(llm), "drafted": drafted(llm)}


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(sys.argv[1], "--small" in sys.argv)))
