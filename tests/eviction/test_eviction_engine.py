"""Evicted prompts through the engine: what stays is what an independent simulation keeps, however steps are cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.evicted_model import EvictedModel
from kvserve.accounting.plan import EvictionPlan
from kvserve.default_model import prepare_default_model
from kvserve.policies.loading import load_policy
from kvserve.schedules.base import Limit
from tests.cases.engine_cases import (
    MIB,
    STORY,
    assert_preempted_with_same_texts,
    encode,
    engine,
    generate,
    steps,
    tokens,
)
from tests.cases.greedy import Step, assert_same_texts

NUM_TOKENS = 24
Keep = Callable[[torch.Tensor], torch.Tensor]  # keys [kv_heads, candidates, head_dim] -> scores [kv_heads, candidates]


@pytest.fixture(scope="module")
def model() -> Path:
    return prepare_default_model()


@dataclass(frozen=True)
class Cut:
    """At `point` tokens, keep so many of those before `end`."""

    point: int
    end: int
    kept_tokens: int


def cut_cache(cache: DynamicCache, cut: Cut, score: Keep) -> None:
    """Keep the best of the tokens before cut.end in each KV head, and all after it."""
    for layer in cache.layers:
        held = layer.keys.shape[2]
        candidates = held - (cut.point - cut.end)
        best = score(layer.keys[0, :, :candidates]).topk(cut.kept_tokens, -1).indices.sort(-1).values
        rest = torch.arange(candidates, held).expand(best.shape[0], -1)
        index = torch.cat([best, rest], 1)[None, :, :, None].expand(-1, -1, -1, layer.keys.shape[-1])
        layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)


def greedy_with_cut_cache(
    folder: Path, prompt: list[int], cuts: list[Cut], score: Keep, num_tokens: int = NUM_TOKENS
) -> list[Step]:
    """Transformers' dense model, its cache cut on the way."""
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cache, out, tokens, done = DynamicCache(), [], list(prompt), 0
    by_point = {cut.point: cut for cut in cuts}
    with torch.inference_mode():
        while len(out) < num_tokens:
            stop = min([cut.point for cut in cuts if cut.point > done] + [len(tokens)])
            stop = min(stop, len(tokens))
            logits = reference(
                torch.tensor([tokens[done:stop]]), past_key_values=cache,
                position_ids=torch.arange(done, stop)[None], use_cache=True,
            ).logits[0, -1]  # fmt: skip
            done = stop
            if done in by_point:
                cut_cache(cache, by_point[done], score)
            if done == len(tokens):
                top = logits.log_softmax(-1).topk(2)
                tokens.append(int(top.indices[0]))
                out.append(Step(str(tokens[-1]), float(top.values[0] - top.values[1])))
    return out


def newest(keys: torch.Tensor) -> torch.Tensor:
    """StreamingLLM's four sinks, then the newest."""
    scores = torch.arange(keys.shape[1], dtype=torch.float32)
    scores[:4] = torch.inf
    return scores.expand(keys.shape[0], -1)


def smallest_keys(keys: torch.Tensor) -> torch.Tensor:
    return -keys.norm(dim=-1)


@pytest.mark.parametrize(
    ("policy", "codec", "score"),
    [("knorm", "int8", lambda keys: -keys.norm(dim=-1)), ("streaming-llm", "dense", newest)],
)
def test_the_text_is_that_of_a_dense_cache_cut_to_the_same_tokens(
    policy: str, codec: str, score: Keep, model: Path
) -> None:
    changes = {"eviction.rate": 2, "codec": codec}
    with engine(model, policy, changes, max_model_len=2048, kv_cache_memory_bytes=256 * MIB) as llm:
        prompts = [encode(llm, f"{name} told this story. " + STORY * 6 + "In the morning") for name in ("Anna", "Bo")]
        actual = [steps(output) for output in generate(llm, prompts, max_tokens=NUM_TOKENS, logprobs=2)]
    kept = [-(-(-(-len(prompt) // 2) - len(prompt) % 64) // 64) * 64 for prompt in prompts]
    expected = [
        greedy_with_cut_cache(model, prompt, [Cut(len(prompt), len(prompt) // 64 * 64, k)], score)
        for prompt, k in zip(prompts, kept, strict=True)
    ]
    assert_same_texts(expected, actual)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "score", "options"),
    [
        ("streaming-llm", newest, {"eviction.schedule.name": "over-budget", "eviction.schedule.chunk_tokens": 192}),
        ("knorm", smallest_keys, {"eviction.schedule.name": "over-budget"}),
    ],
    ids=["chunked", "whole-prompt"],
)
def test_a_cache_that_never_grows_is_a_dense_cache_cut_again_and_again(
    policy: str, score: Keep, options: dict, model: Path
) -> None:
    """Prompts of about 450 tokens and 150 generated ones in at most 256 tokens a head: four cuts and more."""
    options = {**options, "codec": "dense", "eviction.rate": None, "eviction.max_tokens": 256}
    with engine(model, policy, options, max_model_len=2048, kv_cache_memory_bytes=256 * MIB) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        (manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
        prompts = [encode(llm, f"{name} told this story. " + STORY * 6 + "In the morning") for name in ("Anna", "Bo")]
        eviction, limit = manager.layout.policy.eviction, Limit(max_tokens=256)
        plans = [EvictionPlan(manager.layout, eviction, limit, len(prompt), 2048) for prompt in prompts]
        with patch.object(manager, "remove_skipped_blocks", wraps=manager.remove_skipped_blocks) as step:
            outputs = generate(llm, prompts, max_tokens=150, logprobs=2)
        assert step.call_count > 150
        assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() > 0
    for prompt, plan, output in zip(prompts, plans, outputs, strict=True):
        cuts = [plan.last_cut(length) for length in range(len(prompt) + 150)]
        cuts = [Cut(cut.point, cut.end, cut.kept_blocks * 64) for cut in sorted(set(cuts)) if cut.point]
        assert len(cuts) >= 3
        expected = greedy_with_cut_cache(model, prompt, cuts, score, 150)
        assert_same_texts([expected], [steps(output)])


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["snapkv", "ada-snapkv"])
def test_the_text_is_that_of_the_benchmarks_model(policy: str, model: Path) -> None:
    names = ("Anna", "Boris", "Chen", "Dalia")
    with engine(model, policy, {"eviction.rate": 2}, max_model_len=2048, kv_cache_memory_bytes=256 * MIB) as llm:
        prompts = [encode(llm, f"{name} told this story. " + STORY * 6 + "In the morning") for name in names]
        actual = [steps(output) for output in generate(llm, prompts, max_tokens=NUM_TOKENS, logprobs=2)]
    evicted, simulated = EvictedModel(str(model)), []
    for token_ids in prompts:
        prompt = evicted.prefill(token_ids)
        kept = evicted.kept_tokens(prompt, load_policy(f"{policy}@2"))
        (output,) = evicted.generate(prompt, kept[None], NUM_TOKENS, set())
        simulated.append([Step(str(token), 0.0) for token in output])
    assert_same_texts(actual, simulated)


@pytest.mark.slow
def test_the_last_chunk_has_the_window_however_the_prompt_is_cut(model: Path) -> None:
    texts = []
    for budget in (70, 512):
        with engine(model, "kv-compress", max_num_batched_tokens=budget) as llm:
            prompts = [encode(llm, STORY * 8 + f"And {name} said:") for name in ("Anna", "Boris", "Chen", "Dalia")]
            texts.append([steps(output) for output in generate(llm, prompts, max_tokens=NUM_TOKENS, logprobs=2)])
    assert_same_texts(*texts)


@pytest.mark.slow
def test_rate_one_gives_the_texts_of_none(model: Path) -> None:
    texts = []
    for policy, changes in (("none", {}), ("kv-compress", {"eviction.rate": 1, "codec": "dense"})):
        with engine(model, policy, changes, max_model_len=2048, kv_cache_memory_bytes=256 * MIB) as llm:
            prompts = [encode(llm, STORY * 5 + f"And {name} said:") for name in ("Anna", "Boris", "Chen", "Dalia")]
            texts.append([tokens(output) for output in generate(llm, prompts, max_tokens=NUM_TOKENS)])
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("policy", "changes", "prompts_held"),
    [
        pytest.param("kv-compress", {}, 3, marks=pytest.mark.slow),
        pytest.param("h2o", {"eviction.rate": 2, "eviction.schedule": "every-n"}, 2, marks=pytest.mark.slow),
    ],
    ids=["once", "again-and-again"],
)
def test_preemption_reaches_the_same_state(policy: str, changes: dict, prompts_held: int, model: Path) -> None:
    names = ["Anna", "Boris", "Chen", "Dalia", "Emeka", "Farah"]
    with engine(model, policy, changes, kv_cache_memory_bytes=256 * MIB) as llm:
        prompts = [encode(llm, f"{name} told this story. " + STORY * 5 + f"And {name} said:") for name in names]
        expected = [steps(output) for output in generate(llm, prompts, max_tokens=150, logprobs=2)]
        (manager,) = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.coordinator.single_type_managers
        layout = manager.layout
    block_bytes = 30 * 3 * layout.cell_bytes
    num_blocks = prompts_held * layout.blocks_for(len(prompts[0])) + 8
    with engine(model, policy, changes, kv_cache_memory_bytes=num_blocks * block_bytes, max_model_len=700) as llm:
        assert_preempted_with_same_texts(llm, prompts, expected, num_blocks)
