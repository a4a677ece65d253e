"""The cells of the compatibility matrix that need an engine of their own (see test_compatibility.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvserve.accounting.plan import held_blocks, widest_request
from kvserve.default_model import prepare_default_model
from kvserve.engine.report import EngineReport
from kvserve.errors import UnsupportedError
from kvserve.policies.base import Policy
from kvserve.policies.loading import load_policy
from kvserve.speculation import check_speculation
from tests.cases.engine_cases import (
    MIB,
    counted_preemptions,
    engine,
    free_blocks,
    generate,
    prompt_logprobs,
    random_prompts,
    report_of,
    steps,
)
from tests.cases.greedy import Step, assert_same_texts, differs_only_behind_a_near_tie, steps_of
from tests.cases.matrix import CHOOSES_BY_REQUEST, POLICIES, checked, complete, story_prompts, write_cells
from tests.cases.tiny_models import first_layers, make_tiny_model
from tests.engine.test_speculation import run as run_drafts
from tests.engine.test_tensor_parallel import SCRIPT
from tests.engine.test_tensor_parallel import run as run_stages

LONG_ANSWER = 80  # fills the unfinished tile, and more

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def result_file() -> Iterator[None]:
    yield
    write_cells()


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def quick_model(policy: str, folder: Path) -> Path:
    """The default model's first four layers; all of it where a policy has tables that are fitted to it."""
    model = prepare_default_model()
    return model if load_policy(policy).calibration else first_layers(model, 4, folder)


def check_texts(policy: str, expected: list[list[Step]], found: list[list[Step]]) -> None:
    """Below 8 bits rounding of another order becomes other codes here and there: half of the texts have to agree.

    Of a cache that was read wrongly none does.
    """
    if policy in CHOOSES_BY_REQUEST:
        return
    if load_policy(policy).is_dense or policy == "int8":
        return assert_same_texts(expected, found)
    agreeing = [differs_only_behind_a_near_tie(*pair) for pair in zip(expected, found, strict=True)]
    assert sum(agreeing) >= len(expected) / 2, f"only {sum(agreeing)} of {len(expected)} texts agree"


def test_small_chunks_and_preemption_change_no_text(policy: str) -> None:
    """An engine with chunks of 100 tokens and blocks for the prompts alone, against a roomy one."""
    model = prepare_default_model()
    with checked(policy, "chunked prefill", "preemption") as cells:
        with engine(model, policy, kv_cache_memory_bytes=256 * MIB, max_num_batched_tokens=1024) as llm:
            prompts = story_prompts(llm)
            expected = [steps(one) for one in complete(llm, prompts, max_tokens=LONG_ANSWER)]
            report = report_of(llm)
        longest, options = max(map(len, prompts)) + LONG_ANSWER, small_pool(report, prompts)
        with engine(model, policy, max_num_batched_tokens=100, max_model_len=longest, **options) as llm:
            with counted_preemptions(llm) as preempt:
                outputs = complete(llm, prompts, max_tokens=LONG_ANSWER)
            assert free_blocks(llm) == options["kv_cache_memory_bytes"] // report.block_bytes - 1
        check_texts(policy, expected, [steps(one) for one in outputs])
        cells |= {"chunked prefill": "yes", "preemption": "yes" if preempt.call_count else "did not occur"}


def small_pool(report: EngineReport, prompts: list[list[int]]) -> dict[str, int]:
    """The bytes of a pool that holds the prompts, not their answers."""
    longest = max(map(len, prompts)) + LONG_ANSWER
    blocks = 4 + max(len(prompts) * held_blocks(report.layout, len(prompts[0])), widest_request(report.layout, longest))
    return {"kv_cache_memory_bytes": blocks * report.block_bytes}


def test_a_compiled_model_gives_the_texts_of_an_eager_one(policy: str, tmp_path: Path) -> None:
    model = quick_model(policy, tmp_path)
    with checked(policy, "torch.compile on a CPU") as cells:
        with engine(model, policy, kv_cache_memory_bytes=256 * MIB) as llm:
            prompts = story_prompts(llm)
            expected = [steps(one) for one in complete(llm, prompts)]
        with engine(model, policy, kv_cache_memory_bytes=256 * MIB, enforce_eager=False) as llm:
            texts = [steps(one) for one in complete(llm, prompts)]
        check_texts(policy, expected, texts)
        cells["torch.compile on a CPU"] = "yes"


def test_drafts_change_no_text_or_are_refused(policy: str) -> None:
    with checked(policy, "speculative decoding") as cells:
        try:
            check_speculation(load_policy(policy), method="ngram")
        except UnsupportedError:
            assert load_policy(policy).eviction
            cells["speculative decoding"] = "refused"
            return
        found = run_drafts(policy)
        check_texts(policy, found["expected"], found["together"])
        assert found["drafted"][1] > 0 and found["free"] == found["blocks"] - 1
        cells["speculative decoding"] = "ngram"


def test_window_layers_among_full_ones_change_no_text_with_the_batch(policy: str, tmp_path: Path) -> None:
    """Two full layers of twelve; the others see 96 tokens. Chunks of 100 tokens, and requests together and alone."""
    with checked(policy, "window layers among full ones") as cells:
        model = make_tiny_model("gemma3-5-to-1", tmp_path)
        try:
            found = hybrid_answers(model, policy)
        except UnsupportedError as error:
            cells["window layers among full ones"] = why_refused(load_policy(policy), str(error))
            return
        check_texts(policy, *found)
        cells["window layers among full ones"] = "yes"


def hybrid_answers(model: Path, policy: str) -> tuple[list[list[Step]], list[list[Step]]]:
    """Texts of requests alone and together."""
    prompts = random_prompts([5, 65, 200, 333, 500, 700])
    with engine(model, policy, skip_tokenizer_init=True, max_num_batched_tokens=100) as llm:
        before = free_blocks(llm)
        alone = [generate(llm, [prompt], logprobs=2)[0] for prompt in prompts]
        llm.reset_prefix_cache()
        together = generate(llm, prompts, logprobs=2)
        assert free_blocks(llm) == before
        assert all(-30 < logprob <= 0 for one in together for logprob in prompt_logprobs(one))
    return [steps(one) for one in alone], [steps(one) for one in together]


def why_refused(policy: Policy, reason: str) -> str:
    """What the cell says where a model with window layers is refused."""
    if policy.calibration and "kvserve calibrate" in reason:
        return "needs the model's calibration"
    assert any(cause in reason for cause in ("names layers", "layers of several kinds")), reason
    return "refused"


def test_two_stages_of_a_pipeline_answer_as_one_does(policy: str, tmp_path: Path) -> None:
    script = tmp_path / "serve.py"
    script.write_text(SCRIPT, encoding="utf-8")
    with checked(policy, "pipeline parallel") as cells:
        model = str(quick_model(policy, tmp_path / "model"))
        try:
            staged: dict[str, Any] = run_stages(1, policy, str(script), stages=2, model=model)
        except AssertionError as error:
            assert "UnsupportedError" in str(error) and "pipeline" in str(error), str(error)[-800:]
            cells["pipeline parallel"] = "refused"
            return
        whole = run_stages(1, policy, str(script), model=model)
        if load_policy(policy).eviction is None:
            check_first_tokens(whole, staged)
        assert whole["reports"] == staged["reports"]
        cells["pipeline parallel"] = "yes"


def check_first_tokens(whole: dict[str, Any], staged: dict[str, Any]) -> None:
    """Prompts' log-probabilities agree: 0.1 nats in the mean is what rounding makes of two bits."""
    pairs = list(zip(whole["prompt_logprobs"], staged["prompt_logprobs"], strict=True))
    assert sum(abs(one - other) for one, other in pairs) / len(pairs) < 0.1
    assert all(steps_of(*text) for text in staged["texts"])
