"""Evicted requests: reading tokens, writing kept pages, and attention over them, for every built instruction set."""

from __future__ import annotations

import functools

import pytest
import torch

from kvserve.attention.base import Answers, Batch, LayerSpec, NewRows, Stored
from kvserve.attention.native import NativeAttention, available_isas
from kvserve.attention.reference import ReferenceAttention
from kvserve.codecs.packing import pack_codes, unpack_codes
from kvserve.pages.kept import Header, Kept, KeptRows, Run, arena_of, kept_page, read_header
from kvserve.pages.layout import PageLayout
from kvserve.pages.reference import decode_page, encode_page, hadamard
from tests.cases.affine_numbers import affine_family
from tests.cases.attention_cases import POISON, build_case, make_batch, make_policy
from tests.cases.kept_cases import (
    ABSURD,
    LAYERS,
    NUM_LAYERS,
    Ask,
    KeptCase,
    build_kept_case,
    coded,
    rotated,
    write_kept,
)

ISAS = available_isas()
FAMILIES = ["int8", "kivi-4", "kivi-2", "boosted", "dense-pages"]
DECODE_TOLERANCE = 2e-4  # the decode kernel rounds its factors to integers
EXTEND_TOLERANCE = 3e-5  # rotated values are staged with another rounding than the reference's

SUMMATION_ORDER = 2e-6  # all that dense rows leave

# Evicted with sealed tiles and a tail after it; never evicted; evicted at the last token before the step.
DECODE = (
    Ask(128, 200, 1, (70, 3, 0, 124)),
    Ask(0, 70, 1),
    Ask(64, 64, 1, (60, 17, 1, 40)),
)
EXTEND = (
    Ask(128, 200, 70, (70, 3, 0, 124)),
    Ask(0, 70, 30),
    Ask(64, 64, 65, (60, 17, 1, 40)),
)
MIXED = (Ask(128, 140, 1, (64, 65, 100, 2)), Ask(128, 128, 40, (5, 99)), Ask(0, 30, 1), Ask(0, 0, 66))


@functools.cache
def kept_case(family: str, asks: tuple[Ask, ...], tile_tokens: int = 64, sinks: int = 4, **options) -> KeptCase:
    return build_kept_case(make_policy(family, tile_tokens, sinks), list(asks), **options)


@functools.cache
def answers(*arguments, **options) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """By layer: the softmax over the decoded tokens."""
    case = kept_case(*arguments, **options)
    return {layer: case.expected(layer) for layer in LAYERS}


def check(isa: str, tolerance: float, *arguments, lse_tolerance: float = DECODE_TOLERANCE, **options) -> None:
    case, expected = kept_case(*arguments, **options), answers(*arguments, **options)
    for layer in LAYERS:
        output, lse = case.run(NativeAttention(case.layout, case.spec, isa), layer)
        assert (output - expected[layer][0]).abs().max() <= tolerance
        assert (lse - expected[layer][1]).abs().max() <= lse_tolerance


@pytest.mark.parametrize("asks", [DECODE, EXTEND, MIXED], ids=["decode", "extend", "mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_equals_a_plain_softmax_over_what_each_head_keeps(family: str, asks: tuple[Ask, ...]):
    case, expected = kept_case(family, asks), answers(family, asks)
    for layer in LAYERS:
        output, lse = case.run(ReferenceAttention(case.layout, case.spec), layer)
        assert (output - expected[layer][0]).abs().max() <= EXTEND_TOLERANCE
        assert (lse - expected[layer][1]).abs().max() <= 1e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_decode_equals_the_softmax_for_every_codec(family: str, sinks: int, isa: str):
    check(isa, DECODE_TOLERANCE, family, DECODE, sinks=sinks)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_extend_equals_the_softmax_for_every_codec(family: str, sinks: int, isa: str):
    check(isa, EXTEND_TOLERANCE, family, EXTEND, sinks=sinks, lse_tolerance=3e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", ["kivi-4", "boosted", "dense-pages"])
def test_a_batch_of_decode_and_extend_rows_of_evicted_and_whole_requests(family: str, isa: str):
    check(isa, DECODE_TOLERANCE, family, MIXED)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("new", [1, 20])
@pytest.mark.parametrize(("tile_tokens", "tiles_per_block", "sinks"), [(64, 2, 4), (128, 1, 16), (128, 2, 0)])
@pytest.mark.parametrize("family", ["kivi-2", "dense-pages"])
def test_every_geometry_equals_the_softmax(family, tile_tokens, tiles_per_block, sinks, new, isa):
    # With two tiles a block, the first request keeps half a block of tiles, and later tiles lie behind its kept blocks.
    asks = (
        Ask(tile_tokens, 4 * tile_tokens + 3, new, (tile_tokens - 20, 7)),
        Ask(2 * tile_tokens, 2 * tile_tokens + 9, new, (tile_tokens, tile_tokens + 1, 1)),
    )
    check(isa, DECODE_TOLERANCE, family, asks, tile_tokens, sinks, tiles_per_block=tiles_per_block, head_dim=128)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("group", [1, 8])
def test_every_group_size_equals_the_softmax(group: int, isa: str):
    check(isa, DECODE_TOLERANCE, "boosted", DECODE, group=group)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("asks", [DECODE, EXTEND], ids=["decode", "extend"])
@pytest.mark.parametrize("family", ["int8", "dense-pages"])
def test_bfloat16_models_round_only_the_output(family: str, asks: tuple[Ask, ...], isa: str):
    check(isa, 1.6e-2, family, asks, model_dtype=torch.bfloat16)


LONG = (Ask(2304, 2310, 1, (2300, 2049, 2048, 10)), Ask(0, 20, 1))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", ["kivi-2", "dense-pages"])
def test_kept_tokens_of_several_chunks_merge(family: str, isa: str):
    check(isa, DECODE_TOLERANCE, family, LONG, group=1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("asks", [LONG, DECODE, EXTEND], ids=["long", "decode", "extend"])
@pytest.mark.parametrize("family", ["kivi-2", "dense-pages"])
def test_a_request_gets_bitwise_the_same_answer_alone_and_beside_evicted_ones(
    family: str, asks: tuple[Ask, ...], isa: str
):
    case = kept_case(family, asks, group=1)
    attention = NativeAttention(case.layout, case.spec, isa)
    together, _ = case.run(attention, 2)
    key, value, query = case.new_rows(case.key[2]), case.new_rows(case.value[2]), torch.cat(case.query[2])
    for r, ask in enumerate(case.asks):
        batch, rows = case.alone(r)
        if not ask.end:
            batch.kept = None
        output = torch.empty_like(query[rows])
        attention.forward(
            NewRows(query[rows], key[rows], value[rows]), case.arena.clone()[:, :, 2], batch, Answers(output)
        )
        assert torch.equal(output, together[rows])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_every_token_gives_the_answer_of_a_whole_request(family: str, sinks: int, isa: str):
    for asks in ((Ask(128, 200, 1),), (Ask(128, 150, 20),)):
        evicted = kept_case(family, asks, sinks=sinks, exact=True)
        whole = kept_case(family, asks, sinks=sinks, exact=True, evict=False)
        assert whole.batch.kept is None
        for layer in LAYERS:
            outputs = [case.run(NativeAttention(case.layout, case.spec, isa), layer)[0] for case in (evicted, whole)]
            tolerance = SUMMATION_ORDER if family == "dense-pages" else DECODE_TOLERANCE
            assert (outputs[0] - outputs[1]).abs().max() <= tolerance


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("asks", [DECODE, EXTEND], ids=["decode", "extend"])
@pytest.mark.parametrize("family", ["kivi-4", "dense-pages"])
def test_stale_blocks_and_unused_bytes_never_reach_the_result(family: str, asks: tuple[Ask, ...], isa: str):
    case, clean = (kept_case(family, asks, poison=poison) for poison in (POISON, 0))
    assert (case.batch.block_table == ABSURD).sum() >= 3 and (case.arena != clean.arena).any()
    for layer in LAYERS:
        outputs = [c.run(NativeAttention(c.layout, c.spec, isa), layer)[0] for c in (case, clean)]
        assert outputs[0].isfinite().all() and torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("asks", [DECODE, EXTEND], ids=["decode", "extend"])
def test_the_unused_columns_of_a_page_are_never_visible(asks: tuple[Ask, ...], isa: str):
    case = kept_case("boosted", asks)
    sections, size = affine_family(case.layout.tile_format), case.layout.tile_tokens
    changed, head_dim = case.arena.clone(), case.layout.head_dim
    for (layer, r), chosen in case.chosen.items():
        arena = arena_of(changed[:, :, layer], case.layout)
        for first, tokens in zip(case.first_pages[layer, r], chosen, strict=True):
            used = len(tokens) % size
            if not used:
                continue
            page = kept_page(arena, case.layout, case.kept_of(r), first + len(tokens) // size)
            codes = page[sections.key_codes : sections.key_codes + head_dim * size // 4]
            columns = unpack_codes(codes, 2, head_dim, size)
            columns[:, used:] = 3 - columns[:, used:]
            codes[:] = pack_codes(columns, 2)
            scales = page[sections.value_scales : sections.value_scales + 2 * size].view(torch.float16)
            scales[used:] = 1000.0
    assert (changed != case.arena).any()
    for layer in LAYERS:
        attention = NativeAttention(case.layout, case.spec, isa)
        assert torch.equal(case.run(attention, layer, changed.clone())[0], case.run(attention, layer)[0])


def test_kept_pages_lie_in_the_cells_of_other_layers():
    case = kept_case("kivi-2", DECODE)
    assert (case.arena[:, :, 1] != POISON).any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", ["kivi-2", "int8", "dense-pages"])
def test_decoding_token_by_token_seals_tiles_behind_the_kept_blocks(family: str, isa: str):
    case = build_kept_case(make_policy(family), [Ask(128, 189, 6, (70, 3, 64)), Ask(0, 62, 6)])
    expected = {layer: case.expected(layer)[0].view(2, 6, 6, 64) for layer in LAYERS}  # [request, step, head, :]
    arenas = {}
    for attention in (NativeAttention(case.layout, case.spec, isa), ReferenceAttention(case.layout, case.spec)):
        arena = arenas[attention] = case.arena.clone()
        for layer in LAYERS:
            for step in range(6):
                batch, rows = token_step(case, layer, step)
                output = torch.empty_like(rows[0])
                attention.forward(NewRows(*rows), arena[:, :, layer], batch, Answers(output))
                assert (output - expected[layer][:, step]).abs().max() <= DECODE_TOLERANCE
    assert torch.equal(*arenas.values())


def token_step(case: KeptCase, layer: int, step: int) -> tuple[Batch, tuple[torch.Tensor, ...]]:
    """The batch and (query, key, value) rows of one token of every request."""
    lengths = torch.tensor([ask.computed + step + 1 for ask in case.asks], dtype=torch.int32)
    batch = Batch(torch.arange(len(case.asks) + 1).int(), lengths, case.batch.block_table, case.batch.kept)
    at = [ask.computed + step for ask in case.asks]
    key, value = (torch.stack([x[i] for x, i in zip(rows[layer], at, strict=True)]) for rows in (case.key, case.value))
    return batch, (torch.stack([query[step] for query in case.query[layer]]), key, value)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", FAMILIES)
def test_written_pages_equal_the_reference(family: str, isa: str):
    case = kept_case(family, DECODE)
    arenas = [torch.full_like(case.arena, POISON) for _ in range(2)]
    for arena, kind in zip(arenas, (ReferenceAttention, lambda *a: NativeAttention(*a, isa)), strict=True):
        attention = kind(case.layout, case.spec)
        for layer, r in case.chosen:
            write_kept(case, attention, layer, r, arena)
    if not rotated(case.layout.policy):
        assert torch.equal(*arenas)
        return
    assert (arenas[0] != arenas[1]).float().mean() < 1e-3
    for (layer, r), chosen in case.chosen.items():
        state_block = int(case.batch.block_table[r, 0])
        for h, tokens in enumerate(chosen):
            expected, found = (arena_of(arena[:, :, layer], case.layout) for arena in arenas)
            header = read_header(expected, state_block, h)
            first = case.first_pages[layer, r][h]
            assert header == Header(case.asks[r].end, (Run(0, first, len(tokens)),))
            assert read_header(found, state_block, h) == header
            for page in range(first, first - (-len(tokens) // 64)):
                pages = (kept_page(arena, case.layout, case.kept_of(r), page) for arena in (expected, found))
                (key, value), (key_ref, value_ref) = (decode_page(p, case.layout) for p in pages)
                assert torch.equal(key, key_ref)
                assert ((value - value_ref).abs() > 2e-3).float().mean() < 1e-3


def test_a_kept_page_is_where_the_numbering_says():
    layout = PageLayout.build(make_policy("kivi-2"), 64, 128, torch.float32, state_blocks=1)
    attention = ReferenceAttention(layout, LayerSpec(2, 2, 1.0))
    arena = torch.full((9, 2, NUM_LAYERS, layout.cell_bytes), POISON, dtype=torch.uint8)
    size = layout.tile_format.tile_bytes
    keys = [torch.randn(130, 64), torch.randn(1, 64)]
    attention.write_kept(arena[:, :, 1], 8, Kept(128, (5, 6)), [11, 7], KeptRows(keys, keys))
    # 12 pages a block: [kv_head][page of the strip of 3 layers]; head 0 has pages 11, 12, 13 and head 1 page 7.
    places = [(5, 1, 2, 1), (6, 0, 0, 0), (6, 0, 0, 1), (5, 1, 0, 1)]
    tiles = [keys[0][:64], keys[0][64:128], keys[0][128:], keys[1]]
    for (block, head, layer, index), tile in zip(places, tiles, strict=True):
        filled = torch.cat([tile, tile[-1:].repeat(64 - len(tile), 1)])
        page = arena[block, head, layer, index * size : (index + 1) * size]
        assert torch.equal(page, encode_page(filled, filled, layout))
    assert arena[8, 0, 1, :56].view(torch.int32).tolist() == [128, 1, 0, 11, 130, *[0] * 9]
    assert arena[8, 1, 1, :56].view(torch.int32).tolist() == [128, 1, 0, 7, 1, *[0] * 9]
    touched = (arena != POISON).flatten(1).any(1)
    assert touched.nonzero().flatten().tolist() == [5, 6, 8]


SPANS = [(0, 200), (3, 130), (64, 128), (190, 200), (0, 2), (127, 129), (5, 5)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_read_gives_sinks_pages_and_tail_as_stored(family: str, sinks: int, isa: str):
    case = build_case(make_policy(family, sink_tokens=sinks), computed=[200, 40], new_tokens=[1, 1])
    reference, native = ReferenceAttention(case.layout, case.spec), NativeAttention(case.layout, case.spec, isa)
    staged = reference.stage(case.past_key[0], case.past_value[0]).transpose(0, 1)  # [heads, tokens, 2, head_dim]
    expected = staged.clone()
    for head in range(case.spec.num_kv_heads):
        for tile in range(3):
            rows, skipped = staged[head, tile * 64 : (tile + 1) * 64], sinks if tile == 0 else 0
            page = encode_page(rows[:, 0], rows[:, 1], case.layout, skipped)
            decoded = torch.stack(decode_page(page, case.layout), 1)
            expected[head, tile * 64 + skipped : (tile + 1) * 64] = decoded[skipped:]
    if rotated(case.layout.policy):
        expected[:, :, 1] = expected[:, :, 1] @ hadamard(case.layout.head_dim)
    for first, last in SPANS:
        for attention in (reference, native):
            key, value = attention.read(Stored(case.cells, case.batch.block_table[0], 200), first, last)
            assert key.shape == value.shape == (2, last - first, 64)
            torch.testing.assert_close(key, expected[:, first:last, 0], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(value, expected[:, first:last, 1], rtol=1e-6, atol=2e-6)
            alone, nothing = attention.read(
                Stored(case.cells, case.batch.block_table[0], 200), first, last, with_values=False
            )
            assert torch.equal(alone, key) and nothing is None
    # A request without a full tile has its sinks in the tail.
    short = [a.read(Stored(case.cells, case.batch.block_table[1], 40), 0, 40) for a in (reference, native)]
    torch.testing.assert_close(short[0], short[1], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(short[0][0], case.past_key[1].to(case.layout.dense_dtype).float().transpose(0, 1))


@pytest.mark.parametrize("isa", ["reference", *ISAS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dense_pages_give_back_every_bit(dtype: torch.dtype, isa: str):
    case = build_kept_case(make_policy("dense-pages"), [Ask(128, 200, 0, (70, 64, 1, 124))], model_dtype=dtype)
    attention = (ReferenceAttention if isa == "reference" else NativeAttention)(case.layout, case.spec)
    arena, row, place = torch.full_like(case.arena, POISON), case.full_table[0], case.kept_of(0)
    for layer in LAYERS:
        written = [torch.stack([key, value], 2) for key, value in zip(case.key[layer], case.value[layer], strict=True)]
        cells, step = arena[:, :, layer], make_batch(case.layout, [0], [200], case.full_table)
        attention.store(case.key[layer][0], case.value[layer][0], cells, step)
        found = torch.stack(attention.read(Stored(cells, row, 200), 0, 200), 2).transpose(0, 1)
        assert torch.equal(found.to(dtype), written[0]) and case.layout.dense_dtype == dtype
        write_kept(case, attention, layer, 0, arena)
        for head, tokens in enumerate(case.chosen[layer, 0]):
            pages = range(case.first_pages[layer, 0][head], 99)[: -(-len(tokens) // 64)]
            raw = torch.cat([kept_page(arena_of(cells, case.layout), case.layout, place, page) for page in pages])
            assert torch.equal(raw.view(dtype).view(-1, 2, 64)[: len(tokens)], written[0][tokens, head])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("tile_tokens", "tiles_per_block", "head_dim"), [(64, 2, 128), (128, 1, 256), (128, 2, 96)])
@pytest.mark.parametrize("family", ["kivi-2", "boosted", "dense-pages"])
def test_read_matches_the_reference_in_every_geometry(family, tile_tokens, tiles_per_block, head_dim, isa):
    policy, options = make_policy(family, tile_tokens, 16), dict(head_dim=head_dim, tiles_per_block=tiles_per_block)
    case = build_case(policy, computed=[2 * tile_tokens + 9], new_tokens=[1], model_dtype=torch.bfloat16, **options)
    kernels = ReferenceAttention(case.layout, case.spec), NativeAttention(case.layout, case.spec, isa)
    stored = Stored(case.cells, case.batch.block_table[0], 2 * tile_tokens + 9)
    rows = [kernel.read(stored, 5, stored.num_tokens) for kernel in kernels]
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", ["kivi-2", "dense-pages"])
def test_of_an_evicted_request_sinks_and_later_tokens_can_be_read(family: str, isa: str):
    case = kept_case(family, DECODE)
    cells, row = case.arena[:, :, 0], case.batch.block_table[0]
    kernels = ReferenceAttention(case.layout, case.spec), NativeAttention(case.layout, case.spec, isa)
    for first, last in ((0, 4), (128, 200), (150, 195)):
        rows = [kernel.read(Stored(cells, row, 200), first, last) for kernel in kernels]
        torch.testing.assert_close(rows[0], rows[1], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_each_head_keeps_is_read_back_as_its_codec_left_it(family: str, isa: str):
    case = kept_case(family, DECODE)
    for (layer, r), written in case.kept_rows.items():
        for attention in (ReferenceAttention(case.layout, case.spec), NativeAttention(case.layout, case.spec, isa)):
            state_block = int(case.batch.block_table[r, 0])
            keys, values, *_ = attention.read_kept(case.arena[:, :, layer], state_block, case.kept_of(r))
            for h in range(case.spec.num_kv_heads):
                turned = attention_rows(case, written, h)
                expected = coded(turned, case.layout)
                torch.testing.assert_close(keys[h], expected[:, 0], rtol=1e-6, atol=1e-6)
                back = hadamard(64) if rotated(case.layout.policy) else torch.eye(64)
                torch.testing.assert_close(values[h], expected[:, 1] @ back, rtol=1e-6, atol=2e-6)


def attention_rows(case: KeptCase, written: KeptRows, head: int) -> torch.Tensor:
    """One head's kept K and V as they go into the codec, [tokens, 2, head_dim]."""
    turn = hadamard(case.layout.head_dim) if rotated(case.layout.policy) else torch.eye(case.layout.head_dim)
    return torch.stack([written.keys[head], written.values[head] @ turn], 1)


def test_wrong_arguments_are_refused_by_name():
    case = kept_case("kivi-2", DECODE)
    cells, row, kept = case.arena[:, :, 0], case.batch.block_table[0], case.kept_of(0)
    state = int(row[0])
    rows = [torch.zeros(70, 64), torch.zeros(1, 64)]
    for attention in (ReferenceAttention(case.layout, case.spec), NativeAttention(case.layout, case.spec)):
        with pytest.raises(ValueError, match="do not fit in"):
            attention.write_kept(cells, state, kept, [0, 6 * len(kept.blocks)], KeptRows(rows, rows))
        with pytest.raises(ValueError, match="positive multiple of 64"):
            attention.write_kept(cells, state, kept._replace(end=100), [0, 2], KeptRows(rows, rows))
        with pytest.raises(ValueError, match="keys and values differ"):
            attention.write_kept(cells, state, kept, [0, 2], KeptRows(rows, rows[::-1]))
        with pytest.raises(ValueError, match="not among the 64 stored"):
            attention.read(Stored(cells, row, 64), 0, 65)
        with pytest.raises(TypeError, match="block_table_row must be contiguous int32"):
            attention.read(Stored(cells, row.long(), 64), 0, 64)
        windowed = type(attention)(case.layout, LayerSpec(6, 2, 1.0, sliding_window=8))
        with pytest.raises(ValueError, match="without sliding window"):
            case.run(windowed, 0)
    with pytest.raises(ValueError, match="the dense policy never evicts"):
        PageLayout.build(make_policy("dense"), 64, 16, torch.float32, state_blocks=1)


def test_the_reference_refuses_a_query_before_the_eviction():
    case = build_kept_case(make_policy("kivi-2"), [Ask(128, 130, 1, (70,))])
    case.batch.seq_lens -= 10
    with pytest.raises(AssertionError, match="evicted at 128"):
        case.run(ReferenceAttention(case.layout, case.spec), 0)


def test_state_blocks_shift_every_row_index():
    plain, shifted = (PageLayout.build(make_policy("kivi-2"), 64, 64, torch.float32, state_blocks=n) for n in (0, 2))
    for num_tokens in (0, 63, 64, 500):
        assert shifted.blocks_for(num_tokens) == plain.blocks_for(num_tokens) + 2
    assert [shifted.tile_row(i) - plain.tile_row(i) for i in range(3)] == [2, 2, 2]
