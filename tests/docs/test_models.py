"""docs/models.md is made of benchmarks/models.yaml, whose tiny models the tests serve."""

from __future__ import annotations

import pytest

from benchmarks.reports.models import CODEC, DOCUMENT, config_of, document, families, request_bytes, stock_bytes
from kvserve.policies.loading import load_policy
from tests.cases.tiny_models import FAMILIES, HYBRIDS
from tests.engine.test_logits import CONFIGS

SERVED = families()["served"]


def test_the_page_is_made_of_the_families() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "run `python -m benchmarks.reports.models`"


def test_every_family_is_tested_with_a_tiny_model_that_exists() -> None:
    assert {name for model in SERVED for name in model["tested"]} == {*FAMILIES, *HYBRIDS, *CONFIGS}


def test_the_stock_cache_of_a_hybrid_is_counted_layer_by_layer() -> None:
    config = {
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "sliding_window": 100,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }  # fmt: skip
    token = 2 * 2 * 64 * 2  # K and V of two heads, 16 bits
    assert stock_bytes(config, 1000) == (1000 + 2 * 100) * token
    assert stock_bytes(config, 80) == 3 * 80 * token


@pytest.mark.parametrize("model", SERVED, ids=lambda model: model["model"])
def test_longer_requests_hold_more_and_dense_pages_gain_nothing(model: dict) -> None:
    config, policy = config_of(model), load_policy(CODEC)
    held = [request_bytes(config, policy, tokens) for tokens in (2048, 8192, 32768)]
    assert held == sorted(held)
    if "window" not in model:
        assert 0.9 < stock_bytes(config, 8192) / request_bytes(config, load_policy("dense"), 8192) <= 1
