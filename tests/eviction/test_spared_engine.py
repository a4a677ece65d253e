"""Layers that keep all their tokens, through the engine, against a dense cache that is cut by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from kvserve.accounting.plan import EvictionPlan
from kvserve.schedules.base import Limit
from tests.cases.engine_cases import engine, generate, random_prompts, tokens
from tests.cases.tiny_models import COMMON

NUM_LAYERS, SPARED = 4, (0, 3)
MAX_LEN, NUM_TOKENS = 640, 130
SPARE = {"eviction.spare_layers": [0, -1], "codec": "dense"}


@dataclass(frozen=True)
class Cut:
    """At `point` tokens, layer l keeps `kept_tokens[l]` of those before `end`."""

    point: int
    end: int
    kept_tokens: list[int]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {**COMMON, "hidden_size": 192, "num_hidden_layers": NUM_LAYERS}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=2, head_dim=64)
    folder = tmp_path_factory.mktemp("four-layers")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def logprobs_with_cut_cache(folder: Path, prompt: list[int], output: list[int], cuts: list[Cut]) -> list[float]:
    """Log-probabilities of the output tokens under transformers' dense model; small keys stay (Knorm)."""
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cache, found, text = DynamicCache(), [], prompt + output
    stops = sorted({cut.point for cut in cuts} | set(range(len(prompt), len(text))))
    done, by_point = 0, {cut.point: cut for cut in cuts}
    with torch.inference_mode():
        for stop in stops:
            logits = reference(
                torch.tensor([text[done:stop]]), past_key_values=cache,
                position_ids=torch.arange(done, stop)[None], use_cache=True,
            ).logits[0, -1]  # fmt: skip
            done = stop
            if stop >= len(prompt):
                found.append(float(logits.log_softmax(-1)[text[stop]]))
            if stop in by_point:
                cut_cache(cache, by_point[stop])
    return found


def cut_cache(cache: DynamicCache, cut: Cut) -> None:
    for layer, kept in zip(cache.layers, cut.kept_tokens, strict=True):
        held = layer.keys.shape[2]
        candidates = held - (cut.point - cut.end)
        best = (-layer.keys[0, :, :candidates].norm(dim=-1)).topk(kept, -1).indices.sort(-1).values
        rest = torch.arange(candidates, held).expand(best.shape[0], -1)
        index = torch.cat([best, rest], 1)[None, :, :, None].expand(-1, -1, -1, layer.keys.shape[-1])
        layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)


def by_hand(point: int, mean_tokens: int, spared: tuple[int, ...]) -> Cut:
    """What the layers keep so that a KV head holds `mean_tokens` on average, whole pages of 64 throughout."""
    end = point // 64 * 64
    pages = (mean_tokens - (point - end)) // 64 * NUM_LAYERS
    left, others = pages - len(spared) * end // 64, NUM_LAYERS - len(spared)
    assert left % others == 0, "choose lengths at which the other layers keep the same"
    return Cut(point, end, [end if layer in spared else left // others * 64 for layer in range(NUM_LAYERS)])


CASES = {
    # A prompt of 450 at rate 1.5: 300 tokens, in whole pages 5 * 64 + 2.
    "a-rate": ({"eviction.rate": 1.5}, Limit(1.5), [(450, 5 * 64 + 2)]),
    # At most 512: cut as the 513th token comes and every 64 later, to 449 or fewer.
    "a-maximum": (
        {"eviction.rate": None, "eviction.max_tokens": 512}, Limit(max_tokens=512), [(513, 449), (577, 449)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_text_is_that_of_a_cache_whose_other_layers_are_cut(case: str, model: Path) -> None:
    changes, limit, points = CASES[case]
    (prompt,) = random_prompts([450])
    with engine(model, "knorm", changes | SPARE, max_model_len=MAX_LEN, skip_tokenizer_init=True) as llm:
        (answer,) = generate(llm, [prompt], max_tokens=NUM_TOKENS, logprobs=0)
        (manager,) = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.coordinator.single_type_managers
        plan = EvictionPlan(manager.layout, manager.layout.policy.eviction, limit, 450, MAX_LEN)
    output = tokens(answer)
    actual = [step[token].logprob for step, token in zip(answer.outputs[0].logprobs, output, strict=True)]
    cuts = [by_hand(*point, SPARED) for point in points]
    assert [plan.last_cut(cut.point).kept_blocks * 64 * NUM_LAYERS for cut in cuts] == [
        sum(cut.kept_tokens) for cut in cuts
    ]
    assert logprobs_with_cut_cache(model, prompt, output, cuts) == pytest.approx(actual, abs=2e-3)
    unspared = logprobs_with_cut_cache(model, prompt, output, [by_hand(*point, ()) for point in points])
    assert unspared != pytest.approx(actual, abs=2e-2), "which layers are cut matters"
    report = answer.kv_transfer_params["kvserve"]
    last = cuts[-1]
    mean = sum(last.kept_tokens) / NUM_LAYERS + report["tokens_cached"] - last.end
    assert report["tokens_kept"] == pytest.approx(mean)
