"""Speculative decoding with a draft model: its layers keep dense tokens of their own beside the policy's pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from kvserve.accounting.plan import widest_request
from kvserve.policies.loading import load_policy
from tests.cases.engine_cases import MIB, counted_preemptions, engine, free_blocks, random_prompts, report_of, steps
from tests.cases.greedy import assert_same_texts
from tests.cases.speculation import answers, drafted
from tests.cases.tiny_models import make_tiny_model

slow = pytest.mark.slow
DRAFTS, ANSWER = 3, 80
LENGTHS = [20, 63, 64, 200, 331]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama-gqa-64", tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def first_layer(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target without its second layer: a draft model of another size whose drafts are partly right."""
    model = AutoModelForCausalLM.from_pretrained(target)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    model.save_pretrained(folder := tmp_path_factory.mktemp("draft"))
    return folder


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of another family and another head_dim, and hardly ever right."""
    return make_tiny_model("qwen3-qk-norm", tmp_path_factory.mktemp("stranger"))


def speculation(draft: Path, **options: Any) -> dict[str, Any]:
    return {"method": "draft_model", "model": str(draft), "num_speculative_tokens": DRAFTS, **options}


def serve(target: Path, policy: str, draft: Path | None, **options: Any) -> dict[str, Any]:
    """Texts of requests together, then of one whose prompt ends with an answer, with a prefix hit and without."""
    speculated = {"speculative_config": speculation(draft), "disable_log_stats": False} if draft else {}
    options |= {"skip_tokenizer_init": True, "kv_cache_memory_bytes": 8 * MIB}
    with engine(target, policy, **speculated, **options) as llm:
        prompts = random_prompts(LENGTHS)
        outputs = answers(llm, prompts, ANSWER)
        found: dict[str, Any] = {"together": [steps(output) for output in outputs], "free": free_blocks(llm)}
        if draft is None:
            return found
        found["drafted"], report = drafted(llm), report_of(llm)
        longer = [[*prompts[-1], *outputs[-1].outputs[0].token_ids]]
        hit = answers(llm, longer, 20)[0]
        llm.reset_prefix_cache()
        miss = answers(llm, longer, 20)[0]
        found |= {"hit": [steps(hit)], "miss": [steps(miss)], "cached": hit.num_cached_tokens}
        return found | {"blocks": report.num_blocks, "report": report}


@pytest.mark.parametrize(
    "policy", ["int8", *(pytest.param(name, marks=slow) for name in ("snapkv", "none", "kv-compress-2bit"))]
)
def test_texts_are_those_without_a_draft_model(policy: str, target: Path, first_layer: Path) -> None:
    expected = serve(target, policy, None)
    found = serve(target, policy, first_layer)
    asked, accepted = found["drafted"]
    assert 0 < accepted < asked, "some drafts have to be right, and some wrong"
    assert_same_texts(expected["together"], found["together"])
    assert found["free"] == found["blocks"] - 1
    # Tiles of generated tokens enter the prefix cache with true rows only.
    assert_same_texts(found["miss"], found["hit"])
    if load_policy(policy).eviction is None:
        assert found["cached"] >= (LENGTHS[-1] + ANSWER - 1) // 64 * 64 - 64


@slow
@pytest.mark.parametrize("policy", ["int8", "none", "snapkv"])
def test_a_draft_model_of_another_shape_changes_no_text(policy: str, target: Path, stranger: Path) -> None:
    expected, found = serve(target, policy, None), serve(target, policy, stranger)
    assert_same_texts(expected["together"], found["together"])
    assert found["free"] == found["blocks"] - 1


@slow
def test_a_model_that_drafts_for_itself_is_nearly_always_right(target: Path) -> None:
    asked, accepted = serve(target, "int8", target)["drafted"]
    assert accepted > 0.8 * asked, "its layers have to read their own rows"


@slow
@pytest.mark.parametrize("policy", ["int8", "snapkv"])
def test_preempted_requests_get_their_texts_and_give_all_blocks_back(
    policy: str, target: Path, first_layer: Path
) -> None:
    options: dict[str, Any] = {"max_model_len": 512}
    roomy = serve(target, policy, first_layer, **options)
    report = roomy["report"]
    num_blocks = widest_request(report.layout, 512) + report.drafts.blocks_for(512, 512) + 8
    speculated = {"speculative_config": speculation(first_layer), "skip_tokenizer_init": True}
    num_bytes = num_blocks * report.block_bytes
    with engine(target, policy, kv_cache_memory_bytes=num_bytes, **speculated, **options) as llm:
        with counted_preemptions(llm) as preempt:
            outputs = answers(llm, random_prompts(LENGTHS), ANSWER)
        assert preempt.call_count > 0
        assert_same_texts(roomy["together"], [steps(output) for output in outputs])
        assert free_blocks(llm) == num_blocks - 1
