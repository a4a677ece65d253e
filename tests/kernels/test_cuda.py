"""The CUDA kernels against the reference: on a GPU (`make cuda test-gpu`), or thread by thread on the CPU.

Without a GPU the device code itself is compiled for the CPU (tests/cases/cuda_emulation.cpp): mma, movmatrix and
shuffles by the PTX ISA's tables of which lane holds what, threads in random order between barriers, copies at once or
as late as allowed. What it cannot show is that the inline PTX does what it stands for, and speed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases.attention_cases import POISON, Case, build_case, make_policy
from tests.cases.kept_cases import Ask, KeptCase, build_kept_case, with_masses

pytest.importorskip("triton")
from kvserve.attention import gpu
from kvserve.attention.base import Answers, Batch, LayerSpec
from kvserve.attention.cuda import CudaAttention, load_library
from kvserve.attention.reference import ReferenceAttention
from kvserve.kernels.geometry import Tables
from kvserve.pages.kept import arena_of, kept_page
from kvserve.pages.layout import PageLayout
from tests.cases.affine_numbers import affine_family
from tests.cases.triton_cases import DEVICE, batch_on, cells_on, run

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tests" / "cases" / "cuda_emulation.cpp"
FAMILIES = ["kivi-4", "kivi-2", "boosted"]
DTYPES = [torch.float16, torch.bfloat16]
# What rounding scaled queries, weights and outputs to the model's dtype leaves, on values of order 1.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
SMALL = {"num_kv_heads": 1, "group": 3}
slow = pytest.mark.slow


@pytest.fixture(scope="session")
def library() -> Path:
    """The kernels for this machine: for its GPU, or emulated; built once for each state of the sources."""
    if DEVICE.type == "cuda":
        return gpu.CUDA_LIBRARY
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    sources = [SOURCE, *sorted((ROOT / "csrc").rglob("*.h"))]
    state = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    path = ROOT / "build" / f"cuda_emulation-{state}.so"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        made = path.with_suffix(f".{os.getpid()}")
        flags = ("-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
        subprocess.run([compiler, *flags, str(SOURCE), "-o", str(made)], check=True)
        made.replace(path)
    return path


def decode_case(family: str, computed: list[int], *, tile_tokens: int = 64, sinks: int = 4, **options: Any) -> Case:
    """A step in which every request brings one token."""
    policy = make_policy(family, tile_tokens, sinks)
    return build_case(policy, computed=computed, new_tokens=[1] * len(computed), **(SMALL | options))


def decode(library: Path, case: Case, batch: Batch | None = None, **launch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of the decode kernels alone, on the CPU."""
    attention, cells = CudaAttention(case.layout, case.spec, library), cells_on(DEVICE, case.cells)
    tables = Tables.of(case.layout, cells, batch_on(DEVICE, batch or case.batch), 1)
    query = case.query.to(DEVICE)
    output, lse = torch.full_like(query, torch.nan), torch.full(query.shape[:2], torch.nan, device=DEVICE)
    staged = attention.stage(case.key.to(DEVICE), case.value.to(DEVICE))
    attention.decode(query, tables, staged, Answers(output, lse), **launch)
    return output.cpu(), lse.cpu()


def expected_of(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """What the reference answers, from the same pages."""
    return case.run(ReferenceAttention(case.layout, case.spec))


def assert_close(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    tolerance = TOLERANCE[found[0].dtype]
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.float(), reference.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_decode_matches_the_reference(library: Path, family: str, dtype: torch.dtype):
    case = decode_case(family, [0, 63, 64, 150, 330], model_dtype=dtype)
    assert_close(decode(library, case), expected_of(case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_head_dim_128_matches_the_reference(library: Path, family: str, dtype: torch.dtype):
    case = decode_case(family, [127, 200], head_dim=128, model_dtype=dtype)
    assert_close(decode(library, case), expected_of(case))


@pytest.mark.parametrize("group", [1, 9, *(pytest.param(g, marks=slow) for g in (4, 8, 16, 32))])
def test_any_number_of_query_heads_shares_a_kv_head(library: Path, group: int):
    case = decode_case("boosted", [130], num_kv_heads=2, group=group, model_dtype=torch.float16)
    assert_close(decode(library, case), expected_of(case))


@slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tile_tokens", "tiles_per_block", "sinks"), [(64, 2, 0), (128, 1, 16), (128, 2, 40)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_geometry_matches_the_reference(library: Path, family: str, tile_tokens: int, tiles_per_block: int,
                                              sinks: int, dtype: torch.dtype):  # fmt: skip
    how = {"tile_tokens": tile_tokens, "sinks": sinks, "tiles_per_block": tiles_per_block, "model_dtype": dtype}
    case = decode_case(family, [3 * tile_tokens - 10, 5 * tile_tokens], **how)
    assert_close(decode(library, case), expected_of(case))


@pytest.mark.parametrize(("key_bits", "value_bits"), [(2, 4), (4, 2)])
@pytest.mark.parametrize(("key_group", "value_group"), [(32, 0), (64, 32), pytest.param(128, 64, marks=slow)])
def test_any_bits_and_groups_match_the_reference(library: Path, key_bits: int, value_bits: int, key_group: int,
                                                 value_group: int):  # fmt: skip
    policy = make_policy("kivi-2", 128 if key_group == 128 else 64, 8)
    policy = policy.model_copy(
        update={
            "key": replace(policy.key, bits=key_bits, group_size=key_group),
            "value": replace(policy.value, bits=value_bits, group_size=value_group),
        }
    )
    how = {"head_dim": 128, "model_dtype": torch.float16}
    case = build_case(policy, computed=[300], new_tokens=[1], **SMALL, **how)
    assert_close(decode(library, case), expected_of(case))


@pytest.mark.parametrize("dtype", DTYPES)
def test_boosted_channels_match_the_reference_in_small_groups(library: Path, dtype: torch.dtype):
    policy = make_policy("boosted")
    key = replace(policy.key, boost_fraction=0.5, group_size=32)
    policy = policy.model_copy(update={"key": key})
    case = build_case(policy, computed=[200], new_tokens=[1], head_dim=128, model_dtype=dtype, **SMALL)
    assert_close(decode(library, case), expected_of(case))


@pytest.mark.parametrize("window", [1, 70, pytest.param(64, marks=slow), pytest.param(130, marks=slow)])
def test_a_sliding_window_hides_older_tokens(library: Path, window: int):
    case = decode_case("kivi-2", [3, 128, 300], sliding_window=window, model_dtype=torch.float16)
    assert_close(decode(library, case), expected_of(case))


def test_the_shape_of_a_launch_does_not_change_the_answer(library: Path):
    case = decode_case("kivi-2", [700, 0, 64], model_dtype=torch.float16)
    expected = expected_of(case)
    for splits, warps, stages in ((1, 1, 2), (3, 4, 2), (5, 2, 3), (64, 1, 4)):
        found = decode(library, case, splits=splits, warps=warps, stages=stages)
        assert_close(found, expected)


def test_float16_has_room_for_large_queries_times_large_scales(library: Path):
    case = decode_case("boosted", [0], model_dtype=torch.float16)
    big = build_case(case.layout.policy, computed=[0], new_tokens=[64], model_dtype=torch.float16, **SMALL)
    scales, case = (big.key * 300, big.value * 300), decode_case("boosted", [64], model_dtype=torch.float16)
    reference, past = ReferenceAttention(case.layout, case.spec), replace(big.batch, block_table=case.batch.block_table)
    reference.store(*scales, case.cells, past)
    case.query *= 300
    case.spec = replace(case.spec, scale=1e-6)
    found, expected = decode(library, case), expected_of(case)
    assert found[0].isfinite().all() and expected[0].abs().max() > 100
    torch.testing.assert_close(found[0].float(), expected[0].float(), rtol=5e-3, atol=1.0)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-3)


def test_longer_steps_are_left_to_triton_and_padding_alone(library: Path):
    case = build_case(make_policy("kivi-2"), computed=[70, 100, 64], new_tokens=[1, 5, 1], model_dtype=torch.float16,
                      **SMALL)  # fmt: skip
    expected = expected_of(case)
    arguments = (case.query, case.key, case.value, case.cells)
    output, lse, _ = run(CudaAttention(case.layout, case.spec, library), *arguments, case.batch)
    torch.testing.assert_close(output.float(), expected[0].float(), rtol=4e-3, atol=4e-3)
    starts, lengths, table = case.batch.query_start_loc, case.batch.seq_lens, case.batch.block_table
    absurd = torch.full((2, table.shape[1]), 1 << 30, dtype=torch.int32)  # block ids that nobody may follow
    zeros = torch.zeros(2, dtype=torch.int32)
    padded_starts = torch.cat([starts, starts[-1:], starts[-1:]])
    padded = Batch(padded_starts, torch.cat([lengths, zeros]), torch.cat([table, absurd]))
    again, again_lse, _ = run(CudaAttention(case.layout, case.spec, library), *arguments, padded)
    torch.testing.assert_close(again, output, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(again_lse, lse, rtol=2e-3, atol=2e-3)


# Evicted with a sealed tile and a tail behind it; evicted at the last token before the step; never evicted.
MIXED = (Ask(128, 200, 1, (70, 3, 0, 124)), Ask(64, 64, 1, (60, 17, 1, 40)), Ask(0, 70, 1))


def kept_case(family: str, dtype: torch.dtype) -> KeptCase:
    return build_kept_case(make_policy(family), list(MIXED), group=2, model_dtype=dtype)


def kept_answer(library: Path, case: KeptCase, layer: int, arena: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows = (torch.cat(case.query[layer]), *(case.new_rows(rows[layer]) for rows in (case.key, case.value)))
    return run(CudaAttention(case.layout, case.spec, library), *rows, arena[:, :, layer], case.batch)[:2]


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_equals_a_plain_softmax_over_what_each_head_keeps(library: Path, family: str):
    case = kept_case(family, torch.float16)
    for layer in (0, 2):
        assert_close(kept_answer(library, case, layer, case.arena), case.expected(layer))


@pytest.mark.parametrize("poison", [POISON, 0x7B])
def test_the_unused_columns_of_a_page_are_never_visible(library: Path, poison: int):
    case = kept_case("kivi-2", torch.float16)
    sections, size = affine_family(case.layout.tile_format), case.layout.tile_tokens
    changed = case.arena.clone()
    for (layer, r), chosen in case.chosen.items():
        arena = arena_of(changed[:, :, layer], case.layout)
        for first, tokens in zip(case.first_pages[layer, r], chosen, strict=True):
            if used := len(tokens) % size:
                page = kept_page(arena, case.layout, case.kept_of(r), first + len(tokens) // size)
                page[sections.value_scales : sections.value_scales + 4 * size].view(2, -1)[:, 2 * used :] = poison
    assert (changed != case.arena).any()
    assert torch.equal(kept_answer(library, case, 2, changed)[0], kept_answer(library, case, 2, case.arena)[0])


def test_what_the_kernels_do_not_cover_is_refused_with_what_does(library: Path):
    for family, options, message in (
        ("int8", {}, "keys of 2 or 4 bits; use Triton"),
        ("dense-pages", {}, "keys of 2 or 4 bits; use Triton"),
        ("kivi-2", {"head_dim": 256}, "head_dim 64 and 128; use Triton"),
    ):
        case = decode_case(family, [0], model_dtype=torch.float16, **options)
        with pytest.raises(ValueError, match=message):
            CudaAttention(case.layout, case.spec, library)
    weighed = PageLayout.build(with_masses(make_policy("kivi-2")), 64, 64, torch.float16, state_blocks=1)
    with pytest.raises(ValueError, match="no log-masses to logits; use Triton"):
        CudaAttention(weighed, case.spec, library)
    narrow = decode_case("kivi-2", [0], model_dtype=torch.float16).layout
    for options, message in (
        ({"soft_cap": 50.0}, "do not cap logits"),
        ({"sink_logits": torch.zeros(6)}, "learned sinks"),
    ):
        with pytest.raises(ValueError, match=f"{message}; use Triton"):
            CudaAttention(narrow, LayerSpec(6, 2, 0.125, **options), library)
    wide = decode_case("kivi-2", [0], model_dtype=torch.float32)
    with pytest.raises(ValueError, match="must have the dtype of the cache"):
        decode(library, wide)
    case = decode_case("kivi-2", [0], model_dtype=torch.float16)
    with pytest.raises(ValueError, match="does not fit into shared memory"):
        decode(library, case, warps=3)
    odd = torch.zeros(case.query.numel() + 1, dtype=torch.float16)[1:].view(case.query.shape)
    case.query = odd.copy_(case.query) if DEVICE.type == "cpu" else case.query
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match="multiples of 4 bytes"):
            decode(library, case)


def test_kernels_that_are_not_built_are_named(tmp_path: Path):
    with pytest.raises(RuntimeError, match="run `make cuda`"):
        load_library(tmp_path / "_cuda.so")


def test_splits_fill_the_device_and_leave_each_warp_a_page(library: Path):
    layout = decode_case("kivi-2", [0], model_dtype=torch.float16).layout
    attention = CudaAttention(layout, LayerSpec(32, 8, 1.0), library)
    assert attention.num_splits(num_reqs=1, max_blocks=500, processors=132) == 64
    assert attention.num_splits(num_reqs=1, max_blocks=10, processors=132) == 3
    assert attention.num_splits(num_reqs=512, max_blocks=500, processors=132) == 1


# The choice between the kernels (kvserve/attention/gpu.py)


def choose(library: Path, monkeypatch: pytest.MonkeyPatch, faster: set[gpu.Format], family: str = "kivi-2",
           dtype: torch.dtype = torch.float16) -> str:  # fmt: skip
    monkeypatch.setattr(gpu, "CUDA_LIBRARY", library)
    monkeypatch.setattr(gpu, "CUDA_IS_FASTER", faster)
    return gpu.measured_kernels(decode_case(family, [0], model_dtype=dtype).layout, dtype, (9, 0))


def test_the_table_of_measurements_chooses_the_kernels(library: Path, monkeypatch: pytest.MonkeyPatch):
    measured = {gpu.Format((9, 0), 64, 2, 2)}
    assert choose(library, monkeypatch, measured) == "cuda"
    assert choose(library, monkeypatch, measured, "kivi-4") == "triton"
    assert choose(library, monkeypatch, measured, "dense") == "triton"
    assert choose(library, monkeypatch, measured, dtype=torch.float32) == "triton"
    assert choose(library.with_name("none.so"), monkeypatch, measured) == "triton"
    assert choose(library, monkeypatch, set()) == "triton", "what was not measured"


def test_named_kernels_that_cannot_serve_a_layer_are_refused(library: Path):
    int8 = decode_case("int8", [0], model_dtype=torch.float16)
    with pytest.raises(ValueError, match="use Triton"):
        CudaAttention(int8.layout, int8.spec, library)
    with pytest.raises(RuntimeError, match="make cuda"):
        CudaAttention(int8.layout, int8.spec, library.with_name("none.so"))


# The build (scripts/build_cuda.py)


def test_every_target_compiles_without_spills(tmp_path: Path):
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import build_cuda
    finally:
        sys.path.pop(0)
    nvcc = build_cuda.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    path = tmp_path / "_cuda.so"
    usages = build_cuda.build(nvcc, build_cuda.TARGETS, path)
    assert len(usages) == 2 * 16 * len(build_cuda.TARGETS)
    assert [usage for usage in usages if usage.spilled_bytes] == []
    assert load_library(path).kvs_cuda_decode
