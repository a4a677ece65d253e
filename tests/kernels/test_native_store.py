"""Staging, sealing and tail stores of every built instruction set, against the reference's arena bytes."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from kvserve.attention import native
from kvserve.attention.base import Batch, LayerSpec
from kvserve.attention.native import ISA_FLAGS, NativeAttention, available_isas, choose_isa, load_library
from kvserve.attention.reference import ReferenceAttention
from kvserve.attention.structs import KvsArena
from kvserve.pages.reference import decode_page
from kvserve.policies.base import Policy
from tests.cases.affine_numbers import affine_family
from tests.cases.attention_cases import Case, build_case, copy_cells, make_policy

ISAS = available_isas()
COMPUTED, NEW = (0, 0, 63, 64, 100, 0, 10), (1, 64, 1, 64, 130, 65, 3)


@functools.cache
def stored_case(
    policy: Policy, computed: tuple[int, ...], new: tuple[int, ...], **options
) -> tuple[Case, torch.Tensor]:
    """A case and its arena after the reference stored the step."""
    case = build_case(policy, computed=list(computed), new_tokens=list(new), **options)
    reference = copy_cells(case.cells)
    ReferenceAttention(case.layout, case.spec).store(case.key, case.value, reference, case.batch)
    return case, reference


def native_arena(case: Case, isa: str) -> torch.Tensor:
    cells = copy_cells(case.cells)
    NativeAttention(case.layout, case.spec, isa).store(case.key, case.value, cells, case.batch)
    return cells


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["int8", "kivi-4", "kivi-2", "dense-pages", "dense"])
def test_stored_bytes_equal_the_reference(family: str, model_dtype: torch.dtype, isa: str):
    case, reference = stored_case(make_policy(family), COMPUTED, NEW, model_dtype=model_dtype)
    assert torch.equal(native_arena(case, isa), reference)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize(("tile_tokens", "tiles_per_block", "sinks"), [(64, 2, 0), (128, 1, 16), (128, 2, 40)])
@pytest.mark.parametrize("family", ["kivi-2", "dense-pages"])
def test_stored_bytes_equal_the_reference_in_other_geometries(
    family, tile_tokens, tiles_per_block, sinks, head_dim, isa
):
    policy = make_policy(family, tile_tokens, sinks)
    options = dict(head_dim=head_dim, tiles_per_block=tiles_per_block, num_kv_heads=1)
    case, reference = stored_case(policy, (0, 100), (300, 157), **options)
    assert torch.equal(native_arena(case, isa), reference)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rotated_pages_decode_to_the_reference_but_for_rare_ties(head_dim: int, isa: str):
    case, reference = stored_case(make_policy("boosted"), (0, 64), (192, 64), head_dim=head_dim)
    native = native_arena(case, isa)
    size, block = case.layout.tile_format.tile_bytes, case.batch.block_table[0, case.layout.tail_blocks]
    for head in range(case.spec.num_kv_heads):
        pages = (arena[block, head][:size] for arena in (native, reference))
        (key, value), (key_ref, value_ref) = (decode_page(page, case.layout) for page in pages)
        assert torch.equal(key, key_ref)
        differs = (value - value_ref).abs() > 2e-3
        assert differs.float().mean() < 1e-3
        assert (native != reference).float().mean() < 1e-3


@pytest.mark.parametrize("isa", ISAS)
def test_the_boost_picks_the_lower_channel_among_equals(isa: str):
    case = build_case(make_policy("boosted", sink_tokens=0), computed=[0], new_tokens=[64])
    case.key[:] = case.key[:, :, :1].expand_as(case.key)
    numbers, block = affine_family(case.layout.tile_format), case.batch.block_table[0, case.layout.tail_blocks]
    index = native_arena(case, isa)[block, 0, numbers.key_boost_index :][: numbers.boost_channels]
    assert index.tolist() == list(range(numbers.boost_channels))


@pytest.mark.parametrize("isa", ISAS)
def test_chunks_of_any_size_leave_the_same_pages_as_one_step(isa: str):
    whole = build_case(make_policy("kivi-2"), computed=[0], new_tokens=[150])
    attention = NativeAttention(whole.layout, whole.spec, isa)
    once, chunked = copy_cells(whole.cells), copy_cells(whole.cells)
    attention.store(whole.key, whole.value, once, whole.batch)
    done = 0
    for size in (1, 62, 1, 1, 70, 15):
        rows = slice(done, done + size)
        done += size
        step = Batch(
            torch.tensor([0, size], dtype=torch.int32), torch.tensor([done], dtype=torch.int32), whole.batch.block_table
        )
        attention.store(whole.key[rows], whole.value[rows], chunked, step)
    layout, row = whole.layout, whole.batch.block_table[0].tolist()
    assert torch.equal(once[row[layout.tail_blocks :]], chunked[row[layout.tail_blocks :]])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_staging_rounds_like_torch_and_saturates_float16(dtype: torch.dtype, isa: str):
    case = build_case(make_policy("kivi-2"), computed=[0], new_tokens=[40], model_dtype=dtype)
    special = torch.tensor([1e6, -1e6, 65519.9, 65520.0, 1e-7, -3e-8, 6.1e-5, 0.0, -0.0, 2049.0, 2051.0])
    case.key[0, 0, : len(special)] = special.to(dtype)
    case.key[1:] *= torch.logspace(-8, 3, 39)[:, None, None]
    native = NativeAttention(case.layout, case.spec, isa).stage(case.key, case.value)
    reference = ReferenceAttention(case.layout, case.spec).stage(case.key, case.value)
    assert torch.equal(native, reference)
    assert native.isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
def test_strided_rows_are_staged_like_contiguous_ones(isa: str):
    case = build_case(make_policy("boosted"), computed=[0], new_tokens=[9], model_dtype=torch.float16)
    attention = NativeAttention(case.layout, case.spec, isa)
    packed = torch.cat([case.key, case.value], 1)
    key, value = packed.split(case.spec.num_kv_heads, 1)
    assert torch.equal(attention.stage(key, value).clone(), attention.stage(case.key, case.value))


def test_exactly_one_openmp_runtime_is_mapped():
    for isa in ISAS:
        load_library(isa)
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert len({line.split()[-1] for line in maps if "libgomp.so.1" in line}) == 1


def test_the_kernels_use_torchs_thread_count():
    case = build_case(make_policy("dense"), computed=[0], new_tokens=[1])
    assert NativeAttention(case.layout, case.spec).num_threads == torch.get_num_threads()


def test_every_library_names_its_instruction_set():
    assert "portable" in ISAS
    assert [load_library(isa).kvs_isa().decode() for isa in ISAS] == ISAS


def test_the_environment_chooses_the_instruction_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KVSERVE_ISA", "portable")
    assert choose_isa() == "portable"
    monkeypatch.delenv("KVSERVE_ISA")
    assert choose_isa() == ISAS[0]


def test_an_unknown_or_unsupported_instruction_set_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KVSERVE_ISA", "sse9")
    with pytest.raises(RuntimeError, match="sse9 is unknown; choose one of avx512, avx2, portable"):
        choose_isa()
    monkeypatch.setitem(ISA_FLAGS, "avx512", {"no_such_flag"})
    monkeypatch.setenv("KVSERVE_ISA", "avx512")
    with pytest.raises(RuntimeError, match="lacks no_such_flag"):
        choose_isa()


def test_wrong_tensors_are_refused_by_name():
    case = build_case(make_policy("kivi-2"), computed=[0], new_tokens=[2])
    attention = NativeAttention(case.layout, case.spec)
    with pytest.raises(TypeError, match="key must be float32"):
        attention.stage(case.key.double(), case.value)
    with pytest.raises(ValueError, match="value must be contiguous in its last dim"):
        attention.stage(case.key, case.value.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(ValueError, match="bytes a cell"):
        attention.store(case.key, case.value, case.cells[:, :, :-64], case.batch)
    wide = Batch(case.batch.query_start_loc, case.batch.seq_lens.long(), case.batch.block_table)
    with pytest.raises(TypeError, match="seq_lens must be int32"):
        attention.store(case.key, case.value, case.cells, wide)
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        NativeAttention(case.layout, LayerSpec(5, 2, 1.0))


@pytest.mark.parametrize("family", ["kivi-2", "dense"])
def test_a_block_table_that_ends_before_the_last_block_is_refused(family: str):
    case = build_case(make_policy(family), computed=[128], new_tokens=[1])
    case.batch.block_table = case.batch.block_table[:, :-1]
    with pytest.raises(ValueError, match=r"129 tokens needs \d+ entries of block_table"):
        case.run(NativeAttention(case.layout, case.spec))


def test_a_library_of_other_structs_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "KvsLayout", KvsArena)
    with pytest.raises(RuntimeError, match="built from other sources"):
        load_library.__wrapped__(ISAS[0])
