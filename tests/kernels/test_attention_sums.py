"""Attention paid to stored tokens: the reference against loops in float64, the kernels against the reference."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from kvserve.attention.base import LayerSpec, PagedAttention, Stored
from kvserve.attention.native import NativeAttention, available_isas
from kvserve.attention.reference import ReferenceAttention
from kvserve.eviction.collector import received
from kvserve.eviction.query_window import PagedWindow
from kvserve.pages.kept import held_tokens
from kvserve.pages.layout import PageLayout
from kvserve.pages.reference import decode_page, encode_page
from kvserve.scorers.base import Accumulation
from kvserve.scorers.query_window import PlainWindow
from tests.cases.attention_cases import POISON, Case, build_case, make_policy
from tests.cases.kept_cases import LAYERS, Ask, KeptCase, build_kept_case, coded

ISAS = available_isas()
FAMILIES = ["int8", "kivi-4", "kivi-2", "boosted", "dense-pages", "dense"]
HOW = [(1, "sum"), (2, "sum"), (1, "max"), (2, "max")]
ASKS = (Ask(128, 200, 1, (70, 3, 0, 124)), Ask(0, 70, 1), Ask(64, 71, 1, (60, 17, 1, 40)))


@functools.cache
def stored_case(family: str, lengths: tuple[int, ...], tile_tokens: int = 64, sinks: int = 4, **options) -> Case:
    policy = make_policy(family, tile_tokens, sinks)
    return build_case(policy, computed=list(lengths), new_tokens=[1] * len(lengths), **options)


@functools.cache
def kept_case(family: str, tile_tokens: int = 64, sinks: int = 4, **options) -> KeptCase:
    return build_kept_case(make_policy(family, tile_tokens, sinks), list(ASKS), **options)


def query_rows(rows: int, spec: LayerSpec, head_dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, spec.num_heads, head_dim, generator=generator).to(dtype)


def sums_of(attention: PagedAttention, case: Case, request: int, rows: int | torch.Tensor, *how) -> torch.Tensor:
    query = query_rows(rows, case.spec, case.layout.head_dim) if isinstance(rows, int) else rows
    num_tokens = case.past_key[request].shape[0]
    return attention.attention_sums(query, Stored(case.cells, case.batch.block_table[request], num_tokens), *how)


def kernels(case: Case | KeptCase, isa: str) -> tuple[PagedAttention, PagedAttention]:
    return NativeAttention(case.layout, case.spec, isa), ReferenceAttention(case.layout, case.spec)


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-4, atol=2e-6)


def tokens_as_stored(layout: PageLayout, keys: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Keys [n, head_dim] of the tokens from `first` (a tile border) on: coded where their tile is full, else dense."""
    keys, size = keys.to(layout.dense_dtype).float(), layout.tile_tokens
    parts, sealed = [], len(keys) // size * size
    for start in range(0, sealed, size):
        tile, sinks = keys[start : start + size], 0 if first or start else layout.policy.sink_tokens
        parts += [tile[:sinks], decode_page(encode_page(tile, tile, layout, sinks), layout)[0][sinks:]]
    return torch.cat([*parts, keys[sealed:]])


def paid(query: torch.Tensor, keys: list[torch.Tensor], scale: float, power: int, reduce: str) -> list[list[float]]:
    """By query head, what each of its KV head's tokens gets; the last rows of `keys` are the queries' own tokens."""
    heads = []
    for head in range(query.shape[1]):
        own = keys[head * len(keys) // query.shape[1]].double()
        tokens = [0.0] * len(own)
        for row in range(len(query)):
            newest = len(own) - len(query) + row
            logits = (own[: newest + 1] @ query[row, head].double() * scale).tolist()
            weights = [math.exp(logit - max(logits)) for logit in logits]
            for t, weight in enumerate(weights):
                share = (weight / sum(weights)) ** power
                tokens[t] = tokens[t] + share if reduce == "sum" else max(tokens[t], share)
        heads.append(tokens)
    return heads


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_pays_what_a_plain_softmax_pays(family: str):
    case = stored_case(family, (133, 67), group=2)
    reference = ReferenceAttention(case.layout, case.spec)
    for request, rows, how in ((0, 1, (1, "sum")), (0, 5, (2, "sum")), (1, 67, (1, "sum")), (1, 9, (2, "max"))):
        query = query_rows(rows, case.spec, 64)
        keys = [tokens_as_stored(case.layout, case.past_key[request][:, head]) for head in range(2)]
        expected = torch.tensor(paid(query, keys, case.spec.scale, *how))
        assert_equal(sums_of(reference, case, request, query, *how), expected)


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("family", FAMILIES[:-1])
def test_the_reference_pays_to_what_each_head_of_an_evicted_request_holds(family: str, sinks: int):
    case = kept_case(family, sinks=sinks)
    reference = ReferenceAttention(case.layout, case.spec)
    query = query_rows(7, case.spec, 64)
    for layer in LAYERS:
        for r in (0, 2):
            ask, cells, row = case.asks[r], case.arena[:, :, layer], case.batch.block_table[r]
            keys = []
            for head in range(2):
                own, kept = case.key[layer][r][: ask.computed, head], case.kept_rows[layer, r][0][head]
                packed = coded(torch.stack([kept, kept], 1), case.layout)[:, 0]
                later = tokens_as_stored(case.layout, own[ask.end :], ask.end)
                keys.append(torch.cat([own[:sinks].to(case.layout.dense_dtype).float(), packed, later]))
            counts = [len(k) for k in keys]
            assert held_tokens(cells, case.layout, int(row[0]), ask.computed, case.kept_of(r)) == counts
            sums = reference.attention_sums(query, Stored(cells, row, ask.computed, case.kept_of(r)), 2)
            assert sums.shape == (6, max(counts))
            for head, expected in enumerate(paid(query, keys, case.spec.scale, 2, "sum")):
                assert_equal(sums[head, : len(expected)], torch.tensor(expected))
                assert (sums[head, len(expected) :] == 0).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 160, 256])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_codec_and_head_dim_matches_the_reference(family: str, head_dim: int, isa: str):
    case = stored_case(family, (1, 63, 64, 65, 200), head_dim=head_dim)
    native, reference = kernels(case, isa)
    for request, key in enumerate(case.past_key):
        for rows in {1, min(9, len(key)), len(key)}:
            assert_equal(sums_of(native, case, request, rows), sums_of(reference, case, request, rows))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("power", "reduce"), HOW)
def test_every_power_and_reduction_matches_the_reference(power: int, reduce: str, isa: str):
    case = stored_case("kivi-4", (150,))
    native, reference = kernels(case, isa)
    for rows in (1, 31, 150):
        expected = sums_of(reference, case, 0, rows, power, reduce)
        assert_equal(sums_of(native, case, 0, rows, power, reduce), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sinks", [0, 16, 63])
@pytest.mark.parametrize(("tile_tokens", "tiles_per_block"), [(64, 2), (128, 1), (128, 2)])
def test_every_geometry_matches_the_reference(tile_tokens: int, tiles_per_block: int, sinks: int, isa: str):
    lengths = (5, tile_tokens - 1, tile_tokens, 2 * tile_tokens + 70)
    case = stored_case("boosted", lengths, tile_tokens, sinks, tiles_per_block=tiles_per_block)
    native, reference = kernels(case, isa)
    for request, rows in ((0, 5), (1, 11), (2, tile_tokens), (3, 130)):
        assert_equal(sums_of(native, case, request, rows), sums_of(reference, case, request, rows))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("group", [1, 2, 7, 8, 32])
def test_every_group_size_matches_the_reference(group: int, isa: str):
    case = stored_case("kivi-2", (97,), group=group)
    native, reference = kernels(case, isa)
    for rows in (1, 2, 40):
        assert_equal(sums_of(native, case, 0, rows), sums_of(reference, case, 0, rows))


@pytest.mark.parametrize("isa", ISAS)
def test_a_dense_head_dim_that_is_no_multiple_of_a_panel_matches_the_reference(isa: str):
    case = stored_case("dense", (75,), head_dim=80)
    native, reference = kernels(case, isa)
    assert_equal(sums_of(native, case, 0, 75), sums_of(reference, case, 0, 75))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_more_rows_than_one_block_holds_add_up(reduce: str, isa: str):
    case = stored_case("dense", (333,), group=24, num_kv_heads=1)
    assert 333 * 24 * 333 > 2 * 2**20  # at least three blocks
    native, reference = kernels(case, isa)
    assert_equal(sums_of(native, case, 0, 333, 1, reduce), sums_of(reference, case, 0, 333, 1, reduce))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_query_rows_of_any_dtype_and_stride(dtype: torch.dtype, isa: str):
    case = stored_case("int8", (90,))
    native, reference = kernels(case, isa)
    query = query_rows(20, case.spec, 64, dtype)
    wide = torch.full((23, 8, 100), torch.nan, dtype=dtype)
    wide[1:21, 1:7, 7:71] = query
    expected = sums_of(reference, case, 0, query.float())
    for rows in (query, wide[1:21, 1:7, 7:71]):
        assert_equal(sums_of(native, case, 0, rows), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_each_row_pays_one_in_all(isa: str):
    case = stored_case("kivi-2", (200,))
    native, _ = kernels(case, isa)
    torch.testing.assert_close(sums_of(native, case, 0, 77).sum(1), torch.full((6,), 77.0))
    assert sums_of(native, case, 0, query_rows(77, case.spec, 64) * 1e3).isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("family", FAMILIES[:-1])
def test_evicted_requests_match_the_reference(family: str, sinks: int, isa: str):
    case = kept_case(family, sinks=sinks)
    native, reference = kernels(case, isa)
    for layer in LAYERS:
        for r, ask in enumerate(case.asks):
            for rows in {1, 3, ask.computed - ask.end}:
                place = Stored(case.arena[:, :, layer], case.batch.block_table[r], ask.computed, case.kept_of(r))
                query = query_rows(rows, case.spec, 64)
                assert_equal(native.attention_sums(query, place), reference.attention_sums(query, place))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("tile_tokens", "tiles_per_block", "sinks"), [(64, 2, 4), (128, 1, 64), (128, 2, 0)])
def test_evicted_requests_of_every_geometry_match_the_reference(tile_tokens, tiles_per_block, sinks, isa):
    # The second head fills its last page to the last column of its first panel.
    asks = [Ask(2 * tile_tokens, 4 * tile_tokens + 3, 1, (2 * tile_tokens - sinks, 64, 1, 65))]
    policy, options = make_policy("kivi-2", tile_tokens, sinks), dict(tiles_per_block=tiles_per_block, head_dim=128)
    case = build_kept_case(policy, asks, **options)
    native, reference = kernels(case, isa)
    for layer in LAYERS:
        place = Stored(case.arena[:, :, layer], case.batch.block_table[0], asks[0].computed, case.kept_of(0))
        for rows in (1, tile_tokens + 2):
            query = query_rows(rows, case.spec, 128)
            assert_equal(native.attention_sums(query, place), reference.attention_sums(query, place))


@pytest.mark.parametrize("isa", ISAS)
def test_unused_bytes_and_the_number_of_threads_do_not_change_a_bit(isa: str):
    answers, threads = [], torch.get_num_threads()
    for poison, count in ((POISON, 1), (0, 3)):
        case = kept_case("boosted", poison=poison)
        native, _ = kernels(case, isa)
        torch.set_num_threads(count)
        for r, ask in enumerate(case.asks):
            place = Stored(case.arena[:, :, 2], case.batch.block_table[r], ask.computed, case.kept_of(r))
            answers.append(native.attention_sums(query_rows(6, case.spec, 64), place))
    torch.set_num_threads(threads)
    half = len(answers) // 2
    for with_poison, clean in zip(answers[:half], answers[half:], strict=True):
        assert with_poison.isfinite().all() and torch.equal(with_poison, clean)


@pytest.mark.parametrize("rows", [1, 8, 150])
def test_a_window_over_pages_pays_what_a_window_over_tensors_pays(rows: int):
    case = stored_case("kivi-4", (150,))
    native, _ = kernels(case, ISAS[0])
    query, row = query_rows(150, case.spec, 64), case.batch.block_table[0]
    keys, _ = native.read(Stored(case.cells, row, 150), 0, 150)
    plain = PlainWindow(query.transpose(0, 1), keys, torch.arange(150), case.spec.scale)
    paged = PagedWindow(native, Stored(case.cells, row, 150), query)
    assert paged.num_rows == plain.num_rows == 150
    for how in HOW:
        assert_equal(paged.attention(rows, *how), plain.attention(rows, *how))
    for head, window in enumerate(paged.by_head([150, 150])):
        assert torch.equal(window.attention(rows), paged.attention(rows)[3 * head : 3 * head + 3])


def test_sums_accumulated_over_the_chunks_of_a_prompt_are_those_of_the_prompt():
    case = stored_case("dense", (150,))  # keys that do not change when a tile is full
    native, _ = kernels(case, ISAS[0])
    query, row, sums = query_rows(150, case.spec, 64), case.batch.block_table[0], torch.zeros(2, 150)
    for start, stop in ((0, 63), (63, 64), (64, 150)):
        window = PagedWindow(native, Stored(case.cells, row, stop), query[start:stop])
        sums[:, :stop] += received(window, 2, Accumulation(2))
    assert_equal(sums, received(PagedWindow(native, Stored(case.cells, row, 150), query), 2, Accumulation(2)))


def test_the_windows_of_an_evicted_requests_heads_end_with_their_tokens():
    case = kept_case("int8")
    native, _ = kernels(case, ISAS[0])
    stored = Stored(case.arena[:, :, 0], case.batch.block_table[0], 200, case.kept_of(0))
    place = stored, query_rows(9, case.spec, 64)
    sums = PagedWindow(native, *place).attention(9, 2)
    held = [4 + kept + 72 for kept in (70, 3)]  # sinks, kept, from kept.end on
    for head, (tokens, window) in enumerate(zip(held, PagedWindow(native, *place).by_head(held), strict=True)):
        assert window.num_rows == 9
        assert torch.equal(window.attention(9, 2), sums[3 * head : 3 * head + 3, :tokens])


def test_wrong_arguments_are_refused_by_name():
    case = kept_case("kivi-2")
    cells, row, kept = case.arena[:, :, 0], case.batch.block_table[0], case.kept_of(0)
    query = query_rows(73, case.spec, 64)
    for attention in (ReferenceAttention(case.layout, case.spec), NativeAttention(case.layout, case.spec)):
        with pytest.raises(ValueError, match=r"at most those of the tokens \[128, 200\), got 73"):
            attention.attention_sums(query, Stored(cells, row, 200, kept))
        with pytest.raises(ValueError, match="at least one query row"):
            attention.attention_sums(query[:0], Stored(cells, row, 200, kept))
        with pytest.raises(ValueError, match=r"query must be \[tokens, 6, 64\]"):
            attention.attention_sums(query[:, :3], Stored(cells, row, 200, kept))
        with pytest.raises(ValueError, match="power must be 1 or 2 and reduce sum or max, got 3 and sum"):
            attention.attention_sums(query[:5], Stored(cells, row, 200, kept), 3)
        with pytest.raises(TypeError, match="block_table_row must be contiguous int32"):
            attention.attention_sums(query[:5], Stored(cells, row.long(), 200, kept))
        windowed = type(attention)(case.layout, LayerSpec(6, 2, 1.0, sliding_window=8))
        with pytest.raises(ValueError, match="without sliding window"):
            windowed.attention_sums(query[:5], Stored(cells, row, 200, kept))
