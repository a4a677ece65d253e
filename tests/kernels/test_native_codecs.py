"""Every codec, and every way to nest them, in the compiled kernels: bytes, rows and answers of the reference."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from kvserve.attention import gpu
from kvserve.attention.base import Answers, LayerSpec, NewRows, PagedAttention, Received, Stored
from kvserve.attention.native import NativeAttention, available_isas
from kvserve.attention.reference import ReferenceAttention
from kvserve.codecs.base import Codec
from kvserve.codecs.layer_tables import KV_HEADS, POSITIONS, table_specs
from kvserve.codecs.registry import CODECS, make_codec
from kvserve.codecs.tile import Half
from kvserve.pages.kept import Kept, KeptRows, KeptTable
from kvserve.pages.layout import PageLayout
from kvserve.policies.base import Policy
from tests.cases.attention_cases import Case, build_case, copy_cells, make_batch
from tests.cases.codec_cases import CASES, KEYS, VALUES, random_tables, rotary_table

Content = Mapping[str, Any]
Edit = Callable[[Case], None]
ISAS = available_isas()
SIMPLE: Content = {"bits": 4, "group_size": 32}  # the other half, where a case is about one of them
TABLE: Content = {"name": "table", "bits": 3}
PAIRS: dict[str, tuple[Content, Content]] = {
    **{f"{half}-{name}": (KEYS[name], SIMPLE) for half, name in CASES if half is Half.KEY},
    **{f"{half}-{name}": (SIMPLE, VALUES[name]) for half, name in CASES if half is Half.VALUE},
    "outliers-of-table-before-rope": (
        {"name": "before-rope", "inner": {"name": "outliers", "fraction": 0.01, "inner": TABLE}},
        {"name": "outliers", "fraction": 0.01, "inner": TABLE},
    ),
    "low-rank-of-outliers": (
        {"name": "low-rank", "rank": 2, "inner": {"name": "outliers", "fraction": 0.02, "inner": SIMPLE}},
        {"name": "low-rank", "rank": 8, "inner": {"name": "outliers", "fraction": 0.02, "inner": SIMPLE}},
    ),
    "vector-before-rope": ({"name": "before-rope", "inner": KEYS["vector"]}, VALUES["vector"]),
    "rope-outside-outliers-inside": (
        {"name": "outliers", "fraction": 0.01, "inner": {"name": "before-rope", "inner": TABLE}},
        {"name": "outliers", "fraction": 0.01, "inner": {"bits": 2, "axis": "channel"}},
    ),
    "vector-2": ({"name": "vector", "couple": 2}, {"name": "vector", "couple": 2}),
    "vector-8": ({"name": "vector", "couple": 8}, {"name": "table", "bits": 4, "norm": "channel"}),
    "table-3-token": ({"name": "table", "bits": 3, "norm": "token"}, {"name": "table", "bits": 3, "norm": "channel"}),
    "affine-swapped": ({"bits": 2, "axis": "token"}, {"bits": 8, "group_size": 64, "axis": "channel"}),
}
INTEGERS, FLOATS = 5e-4, 2e-5  # what answers differ by where a half is read in integers, and where none is


def codecs_of(pair: str) -> tuple[Codec, Codec]:
    key, value = PAIRS[pair]
    return make_codec(key), make_codec(value)


def names_in(pair: str) -> set[str]:
    return {stage.name for codec in codecs_of(pair) for stage in codec.chain()}


def is_exact(pair: str) -> bool:
    """Whether the kernels write the reference's bytes: sums of many elements may round differently."""
    return not names_in(pair) & {"low-rank", "symmetric"}


def tolerance_of(pair: str) -> float:
    """How far answers may be from the reference's, on values of order 1."""
    in_integers = any(codec.name in ("affine", "symmetric") for codec in codecs_of(pair))
    return INTEGERS if in_integers else FLOATS


def layer_tables(layout: PageLayout, rows: Mapping[Half, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Random tables of a layer that fit its rows, [tokens, num_kv_heads, head_dim] of each half."""
    made = {}
    for name, spec in table_specs(layout.tile_format).items():
        if POSITIONS in spec.axes:
            made[name] = rotary_table(int(spec.axes[1]), positions=2560, factor=1.25)
            continue
        half, own = Half(name.split(".")[0]), name.split(".", 1)[1]
        codec, shape = layout.tile_format.half(half)[0], layout.tile_format.shape(half)
        heads = [random_tables(codec, shape, head, seed=h)[own] for h, head in enumerate(rows[half].float().unbind(1))]
        made[name] = torch.stack(heads) if KV_HEADS in spec.axes else heads[0]
    return made


class CodedCase:
    """A step of requests with `computed` stored tokens each, over an arena that the reference filled.

    Attributes:
        staged: the step's rows as the reference stages them.
    """

    def __init__(self, pair: str, computed: list[int], new: list[int], edit: Edit | None = None, *,
                 tile_tokens: int = 64, sinks: int = 4, **options: Any):  # fmt: skip
        """`edit` changes the rows of all tokens, stored ones and new ones; `options` are those of `build_case`."""
        key, value = codecs_of(pair)
        policy = Policy(name="coded", summary="", tile_tokens=tile_tokens, sink_tokens=sinks, key=key, value=value)
        totals = [c + n for c, n in zip(computed, new, strict=True)]
        case = build_case(policy, computed=[0] * len(totals), new_tokens=totals, **options)
        self.tables = layer_tables(case.layout, {Half.KEY: case.key, Half.VALUE: case.value})
        if edit:
            edit(case)
        self.layout, self.spec, self.table, self.cells = case.layout, case.spec, case.batch.block_table, case.cells
        self.reference = ReferenceAttention(self.layout, self.spec, self.tables)
        parts = [rows.split(totals) for rows in (case.query, case.key, case.value)]
        _, *past = (torch.cat([r[:c] for r, c in zip(part, computed, strict=True)]) for part in parts)
        self.query, self.key, self.value = (
            torch.cat([r[c:] for r, c in zip(part, computed, strict=True)]) for part in parts
        )
        if sum(computed):
            stored = make_batch(self.layout, [0] * len(new), computed, self.table)
            self.reference.store(*past, self.cells, stored)
        self.batch = make_batch(self.layout, computed, new, self.table)
        self.staged = self.reference.stage(self.key, self.value).clone()

    def native(self, isa: str) -> NativeAttention:
        return NativeAttention(self.layout, self.spec, isa, self.tables)

    def sealed(self, attention: PagedAttention) -> torch.Tensor:
        """The arena after the step's tiles are sealed."""
        cells = copy_cells(self.cells)
        attention.store_sealed(cells, self.batch, self.staged)
        return cells

    def attend(self, attention: PagedAttention, cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and lse over an arena whose tiles are sealed."""
        output, lse = torch.full_like(self.query, torch.nan), torch.full(self.query.shape[:2], torch.nan)
        attention.attend(self.query, cells, self.batch, self.staged, Answers(output, lse))
        return output, lse

    def read(self, attention: PagedAttention, cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all whole tiles, [num_kv_heads, tokens, head_dim]."""
        rows = []
        for row, length in zip(self.table, self.batch.seq_lens.tolist(), strict=True):
            sealed = length // self.layout.tile_tokens * self.layout.tile_tokens
            rows.append(attention.read(Stored(cells, row, sealed), 0, sealed))
        return torch.cat([key for key, _ in rows], 1), torch.cat([value for _, value in rows], 1)


def random_case(pair: str, seed: int) -> CodedCase:
    """Any shape that the codecs of `pair` can write."""
    draw = random.Random(f"{pair} {seed}")
    tile_tokens = draw.choice([64, 128])
    dims = [64, 96, 128]
    if any(codec.name == "table" and codec.bits == 3 for codec in codecs_of(pair)[1].chain()):
        dims.remove(96)
    computed = [draw.randrange(2 * tile_tokens), draw.randrange(3 * tile_tokens), tile_tokens - 1, 2 * tile_tokens]
    return CodedCase(
        pair, computed, [1, draw.randrange(2, 90), 1, 1], tile_tokens=tile_tokens, sinks=draw.choice([0, 1, 4, 33]),
        head_dim=draw.choice(dims), group=draw.randint(1, 8), num_kv_heads=draw.choice([1, 2]),
        tiles_per_block=draw.choice([1, 2]), sliding_window=draw.choice([None, None, None, 70]), seed=seed,
    )  # fmt: skip


@functools.cache
def sealed_case(pair: str, seed: int) -> tuple[CodedCase, torch.Tensor]:
    """A random case, and the arena after the reference sealed its step."""
    case = random_case(pair, seed)
    return case, case.sealed(case.reference)


def test_the_pairs_have_every_codec_in_each_half_that_it_writes():
    tried = {half: {stage.name for p in PAIRS for stage in codecs_of(p)[half is Half.VALUE].chain()} for half in Half}
    for half in Half:
        assert tried[half] == {name for name, cls in CODECS.items() if half in cls.halves}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("pair", PAIRS)
def test_sealed_tiles_are_the_references(pair: str, seed: int):
    case, expected = sealed_case(pair, seed)
    for isa in ISAS:
        cells = case.sealed(case.native(isa))
        if is_exact(pair):
            assert torch.equal(cells, expected), isa
            continue
        assert (cells != expected).float().mean() < 5e-3, isa
        for found, wanted in zip(case.read(case.reference, cells), case.read(case.reference, expected), strict=True):
            assert (found - wanted).norm() <= 0.01 * wanted.norm(), isa


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("pair", PAIRS)
def test_tokens_are_read_as_the_reference_reads_them(pair: str, seed: int):
    case, cells = sealed_case(pair, seed)
    expected = case.read(case.reference, cells)
    for isa in ISAS:
        for found, wanted in zip(case.read(case.native(isa), cells), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-5, msg=isa)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("pair", PAIRS)
def test_decode_and_extend_answer_as_the_reference(pair: str, seed: int):
    case, cells = sealed_case(pair, seed)
    expected = case.attend(case.reference, cells)
    for isa in ISAS:
        for found, wanted in zip(case.attend(case.native(isa), cells), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance_of(pair), msg=isa)


@pytest.mark.parametrize("group", [2, 5])  # heads that share panels, and that decode them again or keep them
@pytest.mark.parametrize("pair", ["outliers-of-table-before-rope", "value-vector", "affine-swapped"])
def test_long_requests_answer_as_the_reference(pair: str, group: int):
    case = CodedCase(pair, [35 * 64 + 10, 9 * 64], [1, 1], num_kv_heads=1, group=group)
    expected = case.attend(case.reference, case.cells)
    for isa in ISAS:
        for found, wanted in zip(case.attend(case.native(isa), case.cells), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance_of(pair), msg=isa)


@pytest.mark.parametrize("pair", PAIRS)
def test_attention_sums_and_received_attention_are_the_references(pair: str):
    case = CodedCase(pair, [150, 70], [1, 1], num_kv_heads=2, group=5)
    cells = case.sealed(case.reference)
    case.reference.store_tail(cells, case.batch, case.staged)
    asked = (case.query[:1], Stored(cells, case.table[0], 151))
    expected = case.reference.attention_sums(*asked, power=2)
    for isa in ISAS:
        native, received = case.native(isa), torch.zeros(2, 151)
        torch.testing.assert_close(native.attention_sums(*asked, power=2), expected, rtol=1e-4, atol=1e-6, msg=isa)
        rows, answers = NewRows(case.query, case.key, case.value), Answers(torch.empty_like(case.query))
        native.forward(rows, copy_cells(case.cells), case.batch, answers, Received(2, {0: received}))
        wanted = expected.unflatten(0, (2, -1)).sum(1)
        torch.testing.assert_close(received, wanted, rtol=2e-3, atol=2e-5, msg=isa)


def constant_rows(whole: Case) -> None:
    whole.key[: len(whole.key) // 2], whole.value[: len(whole.value) // 2] = 1.5, -2.0
    whole.key[70:140] = 0.0


def huge_rows(whole: Case) -> None:
    whole.key[3], whole.key[80, :, :7], whole.value[90], whole.value[20, :, 3] = 3e4, -6e4, 6e4, -1e4


@pytest.mark.parametrize("edit", [constant_rows, huge_rows])
@pytest.mark.parametrize("pair", PAIRS)
def test_constant_and_huge_rows_are_written_as_the_reference_writes_them(pair: str, edit: Edit):
    case = CodedCase(pair, [0], [150], edit=edit, model_dtype=torch.bfloat16)
    expected = case.sealed(case.reference)
    for isa in ISAS:
        cells = case.sealed(case.native(isa))
        if is_exact(pair):
            assert torch.equal(cells, expected), isa
        for found in case.read(case.native(isa), cells):
            assert found.isfinite().all(), isa


@pytest.mark.parametrize("pair", ["vector-2", "vector-8", "vector-before-rope"])
def test_of_equally_near_centroids_the_first_is_taken(pair: str):
    case = CodedCase(pair, [0], [150], constant_rows)
    for name, table in case.tables.items():
        if name.endswith("codebook"):  # each centroid once more, with its first two channels exchanged
            couple = table.shape[-1]
            table[:, :, 128:] = table[:, :, :128][..., [1, 0, *range(2, couple)]]
    expected = case.sealed(case.reference)
    for isa in ISAS:
        assert torch.equal(case.sealed(case.native(isa)), expected), isa


def rows_without_numbers(whole: Case) -> None:
    whole.key[70], whole.value[75, 0, 5] = torch.nan, torch.nan


@pytest.mark.parametrize("pair", PAIRS)
def test_rows_that_are_no_numbers_spoil_no_other_tile(pair: str):
    spoilt, clean = (CodedCase(pair, [0], [200], edit=edit, num_kv_heads=1) for edit in (rows_without_numbers, None))
    for isa in ISAS:
        native = spoilt.native(isa)
        cells = spoilt.sealed(native)
        expected = clean.read(clean.native(isa), clean.sealed(clean.native(isa)))
        for found, wanted in zip(spoilt.read(native, cells), expected, strict=True):
            for tile in (0, 2):
                span = slice(64 * tile, 64 * tile + 64)
                assert torch.equal(found[:, span], wanted[:, span]), isa


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if "before-rope" not in names_in(pair)])
def test_kept_pages_are_written_read_and_attended_to_as_by_the_reference(pair: str):
    key, value = codecs_of(pair)
    policy = Policy(name="coded", summary="", sink_tokens=4, key=key, value=value)
    layout, spec = PageLayout.build(policy, 64, 64, torch.float32, state_blocks=1), LayerSpec(6, 2, 0.125)
    generator = torch.Generator().manual_seed(0)
    rows = {half: torch.randn(137, 2, 64, generator=generator) for half in Half}
    tables = layer_tables(layout, rows)
    reference = ReferenceAttention(layout, spec, tables)
    cells = torch.zeros(15, 2, 1, layout.cell_bytes, dtype=torch.uint8)[:, :, 0]
    table, kept = torch.arange(12, dtype=torch.int32)[None], Kept(128, (12, 13, 14))
    keys, values = ([rows[half][:100, 0], rows[half][100:, 1]] for half in Half)
    reference.write_kept(cells, 0, kept, [0, 2], KeptRows(keys, values))
    query, new = torch.randn(1, 6, 64, generator=generator), torch.randn(2, 1, 2, 64, generator=generator)
    batch = make_batch(layout, [130], [1], table)
    batch.kept = KeptTable.of([kept])
    read, answer = reference.read_kept(cells, 0, kept), torch.empty_like(query)
    reference.forward(NewRows(query, *new), cells.clone(), batch, Answers(answer))
    for isa in ISAS:
        native = NativeAttention(layout, spec, isa, tables)
        written, found = torch.zeros_like(cells), torch.empty_like(query)
        native.write_kept(written, 0, kept, [0, 2], KeptRows(keys, values))
        different = (written[12:] != cells[12:]).float().mean()
        assert different == 0 if is_exact(pair) else different < 5e-3, isa
        for rows_found, rows_read in zip(native.read_kept(cells, 0, kept)[:2], read[:2], strict=True):
            torch.testing.assert_close(torch.cat(rows_found), torch.cat(rows_read), rtol=2e-6, atol=2e-5, msg=isa)
        native.forward(NewRows(query, *new), cells.clone(), batch, Answers(found))
        torch.testing.assert_close(found, answer, rtol=0, atol=INTEGERS, msg=isa)


def test_kept_tokens_have_no_positions_to_turn_keys_by():
    key, value = codecs_of("vector-before-rope")
    layout = PageLayout.build(
        Policy(name="coded", summary="", key=key, value=value), 64, 64, torch.float32, state_blocks=1
    )
    rows = [torch.zeros(3, 64)]
    tables = layer_tables(layout, {half: torch.zeros(3, 1, 64) for half in Half})
    native = NativeAttention(layout, LayerSpec(1, 1, 1.0), ISAS[0], tables)
    cells = torch.zeros(2, 1, layout.cell_bytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"before-rope read positions"):
        native.write_kept(cells, 0, Kept(64, (1,)), [0], KeptRows(rows, rows))


def test_tables_that_do_not_fit_are_refused_before_a_kernel_sees_them():
    case = CodedCase("vector-before-rope", [0], [10])
    for name, wrong, message in (
        ("value.vector.codebook", lambda table: table[:1], "is torch.float32"),
        ("key.vector.codebook", torch.Tensor.double, "is torch.float64"),
        ("key.vector.codebook", lambda table: table.transpose(1, 2).contiguous().transpose(1, 2), "contiguous"),
        ("key.before-rope.rotary", lambda table: table[0], "is torch.float32"),
    ):
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            NativeAttention(case.layout, case.spec, ISAS[0], {**case.tables, name: wrong(case.tables[name])})
    with pytest.raises(ValueError, match="a table key"):
        NativeAttention(case.layout, case.spec, ISAS[0], {})


def test_positions_behind_the_rotary_table_are_refused():
    case = CodedCase("vector-before-rope", [100], [1])
    case.tables["key.before-rope.rotary"] = case.tables["key.before-rope.rotary"][..., :64].contiguous()
    with pytest.raises(ValueError, match=r"101 tokens is longer than the rotary table of 64 positions"):
        case.attend(case.native(ISAS[0]), case.cells)


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("key-table-3", "K table"),
        ("value-vector", "V vector"),
        ("low-rank-of-outliers", "K low-rank of outliers of affine, V low-rank of outliers of affine"),
        ("affine-swapped", "K 2-bit per token, V 8-bit per channel"),
        ("value-affine-clipped", "V 4-bit with clipped ranges"),
    ],
)
def test_the_cuda_kernels_name_codecs_that_they_do_not_cover(pair: str, words: str):
    key, value = codecs_of(pair)
    layout = PageLayout.build(Policy(name="coded", summary="", key=key, value=value), 64, 64, torch.float16)
    assert gpu.uncovered_by_cuda(layout) == f"policy coded ({words})"
    assert gpu.measured_kernels(layout, torch.float16, (9, 0)) == "triton"


@pytest.mark.parametrize("pair", PAIRS)
def test_whatever_bytes_a_page_has_they_are_read_as_the_reference_reads_them(pair: str):
    """An index of a damaged page leads nowhere outside it; of a float16 that is no number the bits are compared."""
    case = CodedCase(pair, [192], [1])
    generator = torch.Generator().manual_seed(1)
    cells = case.cells
    cells.copy_(torch.randint(0, 256, cells.shape, dtype=torch.uint8, generator=generator))
    expected = case.read(case.reference, cells)
    for isa in ISAS:
        for found, wanted in zip(case.read(case.native(isa), cells), expected, strict=True):
            usual = wanted.isfinite() & (wanted.abs() < 1e4)
            assert usual.any()
            torch.testing.assert_close(found[usual], wanted[usual], rtol=2e-3, atol=2e-2, msg=isa)
        case.attend(case.native(isa), cells)
