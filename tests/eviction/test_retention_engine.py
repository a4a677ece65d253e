"""Retentions through the engine: rows that stand for several tokens serve, and the self-test checks them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from kvserve.doctor.engine import DoctorHost
from kvserve.engine.self_test import EXTENSION_PATH
from kvserve.engine.settings import check_heads
from kvserve.errors import UnsupportedError
from kvserve.policies.loading import load_policy
from kvserve.probe.distances import ProbeReport, complaints
from kvserve.probe.request import num_queries
from tests.cases.engine_cases import engine, generate, random_prompts, tokens
from tests.cases.tiny_models import make_tiny_model

COMPENSATE = {"eviction.retention": "compensate"}
WHOLE_HEADS = {"name": "head-classes", "whole": [[1, 0]]}
MERGE = {"eviction.retention": {"name": "merge", "threshold": 0.3}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama-gqa-64", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    ("policy", "changes"),
    [
        ("snapkv", COMPENSATE),
        pytest.param("snapkv", MERGE, marks=pytest.mark.slow),
        pytest.param("kv-compress-live", {**COMPENSATE, "eviction.rate": 2}, marks=pytest.mark.slow),
        pytest.param("streaming-llm", {**COMPENSATE, "eviction.budget": WHOLE_HEADS}, marks=pytest.mark.slow),
    ],
    ids=["compensate", "merge", "again-and-again", "whole-heads"],
)
def test_a_cache_of_rows_for_several_tokens_serves_and_passes_the_self_test(
    policy: str, changes: dict, model: Path
) -> None:
    with engine(model, policy, changes, skip_tokenizer_init=True, worker_extension_cls=EXTENSION_PATH) as llm:
        (prompt,) = random_prompts([800])
        found = DoctorHost.self_test(SimpleNamespace(llm=llm), prompt)
        outputs = generate(llm, random_prompts([700, 650]), max_tokens=60)
    report = ProbeReport.of_ranks(found["ranks"])
    assert complaints(report, found["num_tokens"]) == []
    assert found["num_tokens"] > num_queries(300, 0, 12) and len(report.layers) == 2
    assert report.worst("cache").cache > 0.01, "tokens were evicted"
    assert [len(tokens(output)) for output in outputs] == [60, 60]
    assert all(output.kv_transfer_params["kvserve"]["rate_effective"] > 1.5 for output in outputs)


def test_a_head_that_the_model_lacks_is_refused_before_anything_is_loaded() -> None:
    model = SimpleNamespace(
        get_num_layers=lambda parallel: 30, get_total_num_kv_heads=lambda: 3, hf_config=SimpleNamespace(to_dict=dict)
    )
    for heads, refused in (([[29, 2]], False), ([[30, 0]], True), ([[0, 3]], True)):
        policy = load_policy("snapkv", [f"eviction.budget={{name: head-classes, whole: {heads}}}"])
        assert policy.names_layers
        if refused:
            with pytest.raises(UnsupportedError, match="the layers 0 to 29 with the KV heads 0 to 2; leave it out"):
                check_heads(policy.eviction, model, None)
        else:
            check_heads(policy.eviction, model, None)
