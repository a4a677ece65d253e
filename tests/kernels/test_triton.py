"""The Triton kernels against the reference: interpreted on small cases, on a GPU (`make test-gpu`) on large ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.cases.attention_cases import build_case, copy_cells, make_policy

pytest.importorskip("triton")
from benchmarks import gpu as gpu_benchmark
from benchmarks.gpu_cases import FORMATS, layout_of
from kvserve.attention.base import Answers, Batch, LayerSpec, NewRows, Stored
from kvserve.attention.reference import ReferenceAttention
from kvserve.attention.triton import TritonAttention
from kvserve.kernels import decode
from kvserve.pages.layout import PageLayout
from kvserve.pages.reference import decode_page
from kvserve.policies.loading import load_policy
from tests.cases.affine_numbers import affine_family
from tests.cases.triton_cases import DEVICE, batch_on, cells_on, run_case, run_python, with_wide_lengths

FAMILIES = ["int8", "kivi-4", "kivi-2", "boosted", "dense-pages"]
# What rounding queries, weights and outputs to the model's dtype leaves, on values of order 1.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LSE_TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SMALL = {"num_kv_heads": 1, "group": 3}
gpu = pytest.mark.gpu
slow = pytest.mark.slow


def check(family: str, computed: list[int], new_tokens: list[int], tile_tokens: int = 64, sinks: int = 4, **options):
    """Output, lse and every byte of all layers are the reference's, but for rare ties in rotated pages."""
    case = build_case(make_policy(family, tile_tokens, sinks), computed=computed, new_tokens=new_tokens, **options)
    reference = copy_cells(case.cells)
    expected, expected_lse = case.run(ReferenceAttention(case.layout, case.spec), reference)
    output, lse, cells = run_case(case)
    tolerance = TOLERANCE[case.query.dtype]
    torch.testing.assert_close(output.float(), expected.float(), rtol=tolerance, atol=tolerance)
    lse_tolerance = LSE_TOLERANCE[case.query.dtype]
    torch.testing.assert_close(lse, expected_lse, rtol=lse_tolerance, atol=lse_tolerance)
    allowed = 1e-3 if family == "boosted" else 0.0
    if family == "boosted" and DEVICE.type == "cpu" and case.layout.dense_dtype == torch.bfloat16:
        allowed = 2e-2  # the interpreter truncates to bfloat16 where a GPU rounds
    assert (cells != reference).float().mean() <= allowed
    assert torch.equal(outside(cells), outside(reference))


def whole_storage(cells: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(cells.untyped_storage())


def outside(cells: torch.Tensor) -> torch.Tensor:
    """The bytes around a layer's cells, which are other layers'."""
    whole = whole_storage(cells)
    own = torch.zeros_like(whole, dtype=torch.bool)
    own.as_strided(cells.shape, cells.stride(), cells.storage_offset()).fill_(True)
    return whole[~own]


@pytest.mark.parametrize("family", ["dense", *FAMILIES])
def test_decode_matches_the_reference(family: str):
    check(family, [0, 63, 64, 150], [1, 1, 1, 1], **SMALL)


@pytest.mark.parametrize(
    "family", ["dense", "dense-pages", "kivi-2", "boosted", *(pytest.param(f, marks=slow) for f in FAMILIES[:2])]
)
def test_extend_beside_decode_matches_the_reference(family: str):
    check(family, [63, 100, 0], [66, 1, 5], **SMALL)


@pytest.mark.parametrize(("family", "dtype"), [("kivi-2", torch.bfloat16), ("boosted", torch.float16)])
def test_16_bit_models_match_the_reference(family: str, dtype: torch.dtype):
    check(family, [70, 127], [20, 1], model_dtype=dtype, **SMALL)


@slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["dense", *FAMILIES])
def test_16_bit_models_of_every_family_match_the_reference(family: str, dtype: torch.dtype):
    check(family, [70, 127], [20, 1], model_dtype=dtype, **SMALL)


@pytest.mark.parametrize(("family", "tile_tokens"), [("kivi-2", 64), ("kivi-2", 128), ("boosted", 64)])
def test_a_head_dim_that_is_no_power_of_two_matches_the_reference(family: str, tile_tokens: int):
    check(family, [tile_tokens, 2 * tile_tokens - 1], [1, 1], tile_tokens, head_dim=96, **SMALL)


@slow
@pytest.mark.parametrize("head_dim", [96, 128, 160, 256])
@pytest.mark.parametrize("family", ["dense", *FAMILIES])
def test_every_head_dim_matches_the_reference(family: str, head_dim: int):
    check(family, [110, 127], [30, 1], head_dim=head_dim, **SMALL)


@slow
@pytest.mark.parametrize("group", [1, 4, 8, 32])
@pytest.mark.parametrize("family", ["dense", "boosted"])
def test_every_group_size_matches_the_reference(family: str, group: int):
    check(family, [100, 130], [40, 1], num_kv_heads=2, group=group)


@slow
@pytest.mark.parametrize(("tile_tokens", "tiles_per_block", "sinks"), [(64, 2, 0), (128, 1, 16), (128, 2, 40)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_geometry_matches_the_reference(family: str, tile_tokens: int, tiles_per_block: int, sinks: int):
    computed, new_tokens = [3 * tile_tokens - 10, 2 * tile_tokens], [30, 1]
    check(family, computed, new_tokens, tile_tokens, sinks, tiles_per_block=tiles_per_block, **SMALL)


@pytest.mark.parametrize("window", [1, pytest.param(70, marks=slow), pytest.param(130, marks=slow)])
@pytest.mark.parametrize("family", ["dense", "kivi-2"])
def test_a_sliding_window_hides_older_tokens(family: str, window: int):
    check(family, [180, 190], [20, 1], sliding_window=window, **SMALL)


@slow
@pytest.mark.parametrize("head_dim", [80, 112])
@pytest.mark.parametrize("family", ["dense", "dense-pages"])
def test_a_dense_head_dim_that_is_no_power_of_two_matches_the_reference(family: str, head_dim: int):
    check(family, [70, 127], [20, 1], head_dim=head_dim, **SMALL)


@pytest.mark.parametrize("head_dim", [64, 96])
def test_a_tile_of_keys_that_are_no_numbers_stays_in_its_page(head_dim: int):
    policy = make_policy("boosted", sink_tokens=0)
    case = build_case(policy, computed=[0], new_tokens=[64], model_dtype=torch.bfloat16, head_dim=head_dim, **SMALL)
    case.key[:] = torch.nan
    _, _, cells = run_case(case)
    layout, block = case.layout, case.batch.block_table[0, case.layout.tile_row(0)]
    others = torch.arange(len(cells)) != block
    assert torch.equal(outside(cells), outside(case.cells)) and torch.equal(cells[others], case.cells[others])
    page = cells[block, 0]
    numbers = affine_family(layout.tile_format)
    index = page[numbers.key_boost_index :][: numbers.boost_channels]
    assert (index < head_dim).all() and (index.diff() > 0).all()


def test_requests_without_tokens_are_left_alone():
    case = build_case(make_policy("kivi-2"), computed=[70, 64], new_tokens=[1, 1], **SMALL)
    expected, _, cells = run_case(case)
    starts, lengths, table = case.batch.query_start_loc, case.batch.seq_lens, case.batch.block_table
    empty = torch.full((2, table.shape[1]), 1 << 30, dtype=torch.int32)  # block ids that nobody may follow
    case.batch = Batch(
        torch.cat([starts, starts[-1:], starts[-1:]]),
        torch.cat([lengths, torch.zeros(2, dtype=torch.int32)]),
        torch.cat([table, empty]),
    )
    output, _, padded_cells = run_case(case)
    assert torch.equal(output, expected) and torch.equal(padded_cells, cells)


def test_any_number_of_splits_gives_the_same_answer(monkeypatch: pytest.MonkeyPatch):
    case = build_case(make_policy("kivi-2"), computed=[300, 0, 64], new_tokens=[1, 1, 1], **SMALL)
    expected, expected_lse = case.run(ReferenceAttention(case.layout, case.spec))
    for splits in (1, 3):
        monkeypatch.setattr(decode, "num_splits", lambda *arguments, splits=splits: splits)
        output, lse, _ = run_case(case)
        torch.testing.assert_close(output, expected, rtol=5e-6, atol=5e-6)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_splits_depend_on_shapes_and_stay_within_the_table():
    geometry = TritonAttention(
        build_case(make_policy("int8"), computed=[0], new_tokens=[1]).layout, LayerSpec(8, 2, 1.0)
    ).geometry
    assert decode.num_splits(geometry, num_reqs=1, max_blocks=500, processors=132) == decode.MAX_SPLITS
    assert decode.num_splits(geometry, num_reqs=1, max_blocks=3, processors=132) == 4
    assert decode.num_splits(geometry, num_reqs=512, max_blocks=500, processors=132) == 1


def test_the_boost_picks_the_lower_channel_among_equals():
    case = build_case(make_policy("boosted", sink_tokens=0), computed=[0], new_tokens=[64], **SMALL)
    case.key[:] = case.key[:, :, :1].expand_as(case.key)
    numbers, block = affine_family(case.layout.tile_format), case.batch.block_table[0, case.layout.tail_blocks]
    index = run_case(case)[2][block, 0, numbers.key_boost_index :][: numbers.boost_channels]
    assert index.tolist() == list(range(numbers.boost_channels))


def test_rotated_pages_decode_to_the_reference_but_for_rare_ties():
    case = build_case(make_policy("boosted"), computed=[0], new_tokens=[64], num_kv_heads=2)
    reference, found = copy_cells(case.cells), run_case(case)[2]
    case.run(ReferenceAttention(case.layout, case.spec), reference)
    block, size = case.batch.block_table[0, case.layout.tail_blocks], case.layout.tile_format.tile_bytes
    for head in range(2):
        pages = (arena[block, head][:size] for arena in (found, reference))
        (key, value), (key_ref, value_ref) = (decode_page(page, case.layout) for page in pages)
        assert torch.equal(key, key_ref)
        assert ((value - value_ref).abs() > 2e-3).float().mean() < 1e-3


@pytest.mark.parametrize("family", ["dense", "kivi-2"])
def test_staging_rounds_like_torch_and_saturates_float16(family: str):
    case = build_case(make_policy(family), computed=[0], new_tokens=[20])
    special = torch.tensor([1e6, -1e6, 65519.9, 65520.0, 1e-7, -3e-8, 6.1e-5, 0.0, -0.0, 2049.0, 2051.0])
    case.key[0, 0, : len(special)] = special
    wide = torch.cat([case.key, case.value], 1).to(DEVICE)
    staged = TritonAttention(case.layout, case.spec).stage(*wide.split(case.spec.num_kv_heads, 1))
    assert torch.equal(staged.cpu(), ReferenceAttention(case.layout, case.spec).stage(case.key, case.value))


@pytest.mark.parametrize(
    ("family", "head_dim"), [*((family, 64) for family in FAMILIES), ("kivi-2", 96), ("boosted", 96)]
)
def test_read_gives_sinks_pages_and_tail_as_stored(family: str, head_dim: int):
    case = build_case(make_policy(family), computed=[150, 40], new_tokens=[1, 1], head_dim=head_dim, **SMALL)
    cells, table = cells_on(DEVICE, case.cells), case.batch.block_table.to(DEVICE)
    attention, reference = TritonAttention(case.layout, case.spec), ReferenceAttention(case.layout, case.spec)
    for first, last in ((0, 150), (62, 66), (5, 5)):
        expected = reference.read(Stored(case.cells, case.batch.block_table[0], 150), first, last)
        rows = attention.read(Stored(cells, table[0], 150), first, last)
        torch.testing.assert_close([row.cpu() for row in rows], list(expected), rtol=1e-6, atol=2e-6)
        alone, nothing = attention.read(Stored(cells, table[0], 150), first, last, with_values=False)
        assert torch.equal(alone, rows[0]) and nothing is None


@pytest.mark.parametrize(("power", "reduce"), [(2, "sum"), (1, "max"), pytest.param(1, "sum", marks=slow)])
@pytest.mark.parametrize("stored", [150, pytest.param(128, marks=slow), pytest.param(40, marks=slow)])
@pytest.mark.parametrize(
    "family", ["boosted", *(pytest.param(f, marks=slow) for f in ("kivi-2", "int8", "dense-pages", "dense"))]
)
def test_attention_sums_are_the_references(family: str, stored: int, power: int, reduce: str):
    case = build_case(make_policy(family), computed=[stored], new_tokens=[1], num_kv_heads=2, group=3)
    row, query = case.batch.block_table[0], torch.randn(36, 6, 64, generator=torch.Generator().manual_seed(3))
    expected = ReferenceAttention(case.layout, case.spec).attention_sums(
        query, Stored(case.cells, row, stored), power, reduce
    )
    attention, cells = TritonAttention(case.layout, case.spec), cells_on(DEVICE, case.cells)
    sums = attention.attention_sums(query.to(DEVICE), Stored(cells, row.to(DEVICE), stored), power, reduce)
    torch.testing.assert_close(sums.cpu(), expected, rtol=2e-5, atol=2e-6)


def test_wrong_tensors_are_refused_by_name():
    case = build_case(make_policy("kivi-2"), computed=[0], new_tokens=[2])
    attention = TritonAttention(case.layout, case.spec)
    with pytest.raises(TypeError, match="key must be float32"):
        attention.stage(case.key.double(), case.value)
    with pytest.raises(ValueError, match="value is on meta, but key on cpu"):
        attention.stage(case.key, case.value.to("meta"))
    with pytest.raises(ValueError, match="bytes a cell"):
        attention.store(case.key.to(DEVICE), case.value.to(DEVICE), case.cells[:, :, :-64].to(DEVICE), case.batch)
    shifted = torch.zeros(case.cells.numel() + 8, dtype=torch.uint8, device=DEVICE)[8:].view(case.cells.shape)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        attention.store(case.key.to(DEVICE), case.value.to(DEVICE), shifted, case.batch)
    with pytest.raises(ValueError, match="at least one query row"):
        attention.attention_sums(case.query[:0], Stored(case.cells, case.batch.block_table[0], 2))


BLOCKED = "import sys; sys.modules.update(dict.fromkeys(['vllm', 'pydantic', 'yaml', 'rich'])); "


def test_the_kernels_import_with_torch_and_triton_alone():
    out = run_python("-c", BLOCKED + "import kvserve.attention.triton, benchmarks.gpu_cases; print('imported')")
    assert out.strip() == "imported"


@slow
def test_the_gpu_benchmark_runs_dry_with_torch_and_triton_alone(tmp_path: Path):
    path = tmp_path / "dry.json"
    code = "from benchmarks.gpu import main; sys.exit(main(['--dry-run', '--output', sys.argv[1]]))"
    out = run_python("-c", BLOCKED + code, str(path))
    content = json.loads(path.read_text())
    assert "5 checks against the reference passed" in out and len(content["checks"]) == 5
    timed = {(row["what"], row["variant"]) for row in content["rows"]}
    assert {("decode", name) for name in FORMATS} <= timed
    assert all(row["time_us"] > 0 for row in content["rows"])
    assert all(line.startswith("baseline ") and line.endswith(": needs a GPU") for line in content["left_out"])
    assert f"wrote {path}" in out and "kivi-2bit" in out


def test_the_gpu_benchmark_names_what_it_lacks(capsys: pytest.CaptureFixture[str]):
    if DEVICE.type == "cuda":
        pytest.skip("there is a GPU")
    assert gpu_benchmark.main([]) == 2
    assert "no CUDA device; `--dry-run` runs without one" in capsys.readouterr().err


def test_the_benchmark_times_the_formats_of_the_policies():
    for name in FORMATS:
        layout = layout_of(name, 128, torch.bfloat16)
        assert layout.tile_format == PageLayout.build(load_policy(name), 128, 64, torch.bfloat16).tile_format
        assert layout.policy.sink_tokens == load_policy(name).sink_tokens


# On a GPU: `make test-gpu`


@gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["dense", *FAMILIES])
def test_large_random_steps_match_the_reference_on_a_gpu(family: str, dtype: torch.dtype, head_dim: int, seed: int):
    pick = torch.Generator().manual_seed(seed)
    computed = torch.randint(0, 1500, (6,), generator=pick).tolist()
    new_tokens = torch.tensor([1, 1, 1, 1, 1, int(torch.randint(2, 200, (1,), generator=pick))]).tolist()
    group = (1, 4, 8)[seed]
    check(family, computed, new_tokens, head_dim=head_dim, group=group, model_dtype=dtype, seed=seed)


@gpu
@pytest.mark.parametrize("family", ["dense", "kivi-2", "boosted"])
def test_a_cuda_graph_of_a_decode_step_follows_lengths_and_tables(family: str):
    case = build_case(make_policy(family), computed=[200, 90], new_tokens=[1, 1], model_dtype=torch.bfloat16)
    attention = TritonAttention(case.layout, case.spec)
    batch = with_wide_lengths(batch_on(DEVICE, case.batch), 1)
    cells = cells_on(DEVICE, case.cells)
    query, key, value = (tensor.to(DEVICE) for tensor in (case.query, case.key, case.value))
    output, lengths = torch.empty_like(query), batch.seq_lens.clone()
    attention.forward(NewRows(query, key, value), cells, batch, Answers(output))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention.forward(NewRows(query, key, value), cells, batch, Answers(output))
    for shorter in (0, 9, 70):
        batch.seq_lens.copy_(lengths - shorter)
        cells.copy_(case.cells)
        graph.replay()
        case.batch.seq_lens = (lengths - shorter).cpu()
        expected, _ = case.run(ReferenceAttention(case.layout, case.spec))
        assert (output.cpu().float() - expected.float()).abs().max() <= TOLERANCE[torch.bfloat16]
