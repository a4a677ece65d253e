"""Every shipped policy that evicts serves, and a maximum of tokens holds while it generates."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvserve.default_model import prepare_default_model
from kvserve.policies.loading import load_policy, policy_names
from tests.cases.engine_cases import STORY, encode, engine, generate, tokens

EVICTING = [name for name in policy_names() if load_policy(name).eviction]


@pytest.fixture(scope="module")
def model() -> Path:
    return prepare_default_model()


@pytest.mark.parametrize("policy", EVICTING)
@pytest.mark.slow
def test_a_shipped_policy_serves_prompts_cut_into_steps(policy: str, model: Path) -> None:
    with engine(model, policy) as llm:
        prompts = [encode(llm, f"{name} said. " + STORY * 6 + "In the morning") for name in ("Anna", "Bo")]
        outputs = generate(llm, prompts, max_tokens=80)
        assert [len(tokens(output)) for output in outputs] == [80, 80]
        reports = [output.kv_transfer_params["kvserve"] for output in outputs]
    assert all(report["rate_effective"] > 1.9 for report in reports), reports


@pytest.mark.parametrize("policy", ["kv-compress-2bit", "tova", "h2o", "expected-attention"])
@pytest.mark.slow
def test_a_maximum_of_tokens_holds_while_generating(policy: str, model: Path) -> None:
    limit = {"eviction.rate": None, "eviction.max_tokens": 256}
    with engine(model, policy, limit) as llm:
        (prompt,) = [encode(llm, STORY * 5)]
        outputs = generate(llm, [prompt], max_tokens=500)
        report = outputs[0].kv_transfer_params["kvserve"]
    assert report["tokens_cached"] > 800
    assert report["tokens_kept"] <= 256
