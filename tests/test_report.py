"""The startup report says what the pages of a policy really hold."""

from __future__ import annotations

import pytest
import torch

from kvserve.engine.report import EngineReport
from kvserve.pages.layout import PageLayout
from kvserve.policies.loading import load_policy


def report(policy: str, dtype: torch.dtype, *overrides: str) -> EngineReport:
    layout = PageLayout.build(load_policy(policy, overrides), 64, 64, dtype)
    return EngineReport(layout, num_layers=2, num_kv_heads=3, num_blocks=100, max_model_len=4096)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.bfloat16, 16)])
def test_dense_pages_are_reported_with_the_models_dtype(dtype: torch.dtype, bits: int):
    found = report("snapkv", dtype, "codec=dense")
    name = str(dtype).removeprefix("torch.")
    assert f"dense pages, {name}: {bits} bits per element" in found.table()
    assert "every token; the unfinished tile of 64 tokens in a block of its own" in found.table()
    assert found.block_bytes == 2 * 3 * 64 * 2 * 64 * bits // 8
    assert found.requested_ratio == pytest.approx(4 * 16 / bits)
    assert found.pages(free_blocks=49, num_running=5) == {"free": 294, "kept": 0, "dense": 60, "sealed": 240}


def test_a_policy_without_pages_and_one_with_codes_are_reported_as_such():
    assert "dense, float32: 32 bits per element" in report("none", torch.float32).table()
    table = report("int8", torch.float32).table()
    assert "K 8-bit per channel" in table and "tile of 64 tokens and the first 0, in float16" in table
