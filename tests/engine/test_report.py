"""The startup report says what the pages of a policy really hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvserve.attention.gpu import measured_kernels
from kvserve.engine.report import (
    EngineReport,
    describe_codecs,
    describe_eviction,
    describe_retention,
    describe_switched_off,
)
from kvserve.engine.settings import EngineSettings
from kvserve.errors import UnsupportedError
from kvserve.pages.layout import PageLayout
from kvserve.policies.loading import load_policy


def test_the_startup_table_names_the_layers_that_stay_whole():
    layout = PageLayout.build(
        load_policy("snapkv", ["eviction.spare_layers=[0,-1]"]), 64, 64, torch.bfloat16, num_layers=30
    )
    assert describe_eviction(layout).endswith("uniform budget; layers 0, 29 keep all")


def report(policy: str, dtype: torch.dtype, *overrides: str) -> EngineReport:
    layout = PageLayout.build(load_policy(policy, overrides), 64, 64, dtype)
    return EngineReport(layout, num_layers=2, num_kv_heads=3, num_blocks=100, max_model_len=4096)


@pytest.mark.parametrize(
    ("policy", "changes", "line"),
    [
        ("int8", [], "nothing"),
        ("snapkv", [], "evict"),
        ("snapkv", ["eviction.retention=compensate"], "compensate, with a log-mass beside each token of a page"),
        ("snapkv", ["eviction.retention=merge"], "merge, with a log-mass beside each token of a page"),
    ],
)
def test_the_startup_table_says_what_becomes_of_the_others(policy: str, changes: list[str], line: str):
    (row,) = [row for row in report(policy, torch.float32, *changes).table().splitlines() if "what goes" in row]
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["what goes", line]


def test_log_masses_are_among_the_bits_of_an_element():
    plain, weighed = (report("snapkv", torch.float32, *more) for more in ([], ["eviction.retention=merge"]))
    bits = [found.layout.bits_per_element() for found in (plain, weighed)]
    assert bits[1] - bits[0] == 32 / (2 * 64)


def test_a_retention_with_log_masses_is_tritons_and_not_the_cuda_kernels():
    policy = load_policy("snapkv", ["eviction.retention=compensate", "codec=kivi-4bit"])
    settings, cuda = (
        EngineSettings(policy, 64, torch.bfloat16, kernels_asked=asked, kernels=asked) for asked in ("triton", "cuda")
    )
    assert settings.with_gpu_kernels(64).kernels == "triton"
    with pytest.raises(UnsupportedError, match=r"cover the retention compensate; use --kernels triton"):
        cuda.with_gpu_kernels(64)
    assert measured_kernels(settings.layout(64), torch.bfloat16, (9, 0)) == "triton"


@pytest.mark.parametrize("logits", ["learned attention sinks", "capped attention logits"])
def test_special_logits_are_tritons_and_not_the_cuda_kernels(logits: str):
    auto, cuda = (
        EngineSettings(load_policy("kivi-4bit"), 64, torch.bfloat16, kernels_asked=asked, kernels=kernels)
        for asked, kernels in (("auto", "native"), ("cuda", "cuda"))
    )
    assert auto.with_gpu_kernels(64, logits).kernels == "triton"
    with pytest.raises(UnsupportedError, match=f"cuda does not cover {logits}; use --kernels triton"):
        cuda.with_gpu_kernels(64, logits)


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


@pytest.mark.parametrize(
    ("policy", "head_dim", "groups"),
    [
        ("kivi-2bit", 128, "V 2-bit per token, groups of 64;"),
        ("kivi-2bit", 96, "V 2-bit per token, groups of 32 (64 asked, they do not divide 96);"),
        ("int8", 96, "V 8-bit per token, groups of 96;"),
        ("boost-2bit", 64, "V 2-bit rotated, one scale per token;"),
        ("boost-2bit", 96, "V 2-bit rotated in blocks of 32 channels, one scale per token;"),
    ],
)
def test_the_startup_table_says_which_channels_share_a_scale(policy: str, head_dim: int, groups: str):
    assert groups in describe_codecs(PageLayout.build(load_policy(policy), head_dim, 64, torch.bfloat16))


def test_the_startup_table_shows_the_kernels():
    found = replace(report("int8", torch.float32), kernels_asked="auto", kernels="triton")
    assert "auto requested, triton in effect" in found.table()


@pytest.mark.parametrize(
    ("policy", "changes", "when", "switched_off"),
    [
        ("snapkv", [], "prompts at their end, to 1 of 4 tokens", "nothing"),
        ("kv-compress-live", [], "prompts at their end, and later (every-n, every 64 tokens)", "nothing"),
        ("snapkv", ["eviction.rate=null", "eviction.max_tokens=512"], "later (over-budget, every 64", "nothing"),
        ("snapkv", ["eviction.schedule.name=end-of-prefill", "eviction.schedule.chunk_tokens=256"],
         "prompts at every 256 tokens and at their end", "prefix cache hits"),
        ("h2o", [], "prompts at their end", "prefix cache hits: accumulated-attention"),
    ],
)  # fmt: skip
def test_the_startup_table_says_when_tokens_are_dropped_and_what_that_switches_off(policy, changes, when, switched_off):
    layout = PageLayout.build(load_policy(policy, changes), 64, 64, torch.bfloat16, query_group=3)
    assert when in describe_eviction(layout)
    assert describe_switched_off(layout).startswith(switched_off)


def test_the_startup_table_says_that_nothing_is_evicted_and_what_pages_leave_unused() -> None:
    layout = PageLayout.build(load_policy("mikv"), 128, 64, torch.bfloat16, num_layers=30)
    assert describe_eviction(layout).startswith("nothing; divides prompts at their end: 1 of 5 tokens a KV head keep")
    told = describe_retention(layout)
    assert "demote: the others stay as K 2-bit per channel" in told and "2.75 bits per element" in told
    assert "pages of 17152 bytes hold tiles, 1 of 17152 bytes (0.0% unused) or 3 of 5632 bytes (1.5% unused)" in told
    assert replace(
        report("int8", torch.bfloat16), layout=layout, max_model_len=100_000
    ).requested_ratio == pytest.approx(16 / (0.2 * 8.375 + 0.8 * 2.75), rel=1e-3)


def test_the_startup_table_says_what_pages_of_several_layers_leave_unused() -> None:
    policy = load_policy("snapkv", ["codec=kivi-2bit", "layers={0: int8}"])
    told = describe_retention(PageLayout.build(policy, 128, 64, torch.bfloat16, num_layers=28))
    assert told.startswith("evict; pages of 17152 bytes hold tiles, 1 of 17152 bytes (0.0% unused) or 3 of 5632")
    # 28 cells of 6080 bytes, the mean of one layer of 17152 and 27 of 5632 in whole bytes a token, hold 9 pages.
    assert told.endswith("and fill a block but for 9.3%")
