"""Codecs against readings of their formulas in float64 loops, and the bytes that pages have had from the start."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch

from kvserve.codecs.format import TileFormat
from kvserve.codecs.layer_tables import check_tables, tables_of_head
from kvserve.codecs.low_rank import first_directions, orthonormal
from kvserve.codecs.registry import CODECS, codec_content, make_codec
from kvserve.codecs.tile import Half, Tile, TileShape
from tests.cases.codec_cases import (
    CASES,
    KEYS,
    VALUES,
    codec_of,
    made_tile,
    random_rows,
    random_tables,
    read,
    rotary_table,
    turn,
)

# Offsets of key codes, key boost codes, value codes, key scales, value scales and key boost index, the bytes of a page,
# and the digest of what `made_tile` is written as (of rotated values the sums round differently on other machines).
PAGES = {
    ("int8", 64): ((0, 4096, 4096, 8192, 8448, 8704), 8704, "2d3d3be986481b95"),
    ("int8", 96): ((0, 6144, 6144, 12288, 12672, 12928), 12928, "8f577ef8f188dce8"),
    ("int8", 128): ((0, 8192, 8192, 16384, 16896, 17152), 17152, "3dc453acc7314c9b"),
    ("int8", 160): ((0, 10240, 10240, 20480, 21120, 21376), 21376, "bb9b2e44c93d316f"),
    ("int8", 256): ((0, 16384, 16384, 32768, 33792, 34048), 34048, "823b901710648b3c"),
    ("kivi-4bit", 64): ((0, 2048, 2048, 4096, 4352, 4608), 4608, "b4b360de50033a94"),
    ("kivi-4bit", 96): ((0, 3072, 3072, 6144, 6528, 7296), 7296, "b4627bd60fd4770e"),
    ("kivi-4bit", 128): ((0, 4096, 4096, 8192, 8704, 9216), 9216, "e29744ee0209ad62"),
    ("kivi-4bit", 160): ((0, 5120, 5120, 10240, 10880, 12160), 12160, "69ab761fa1d5f37e"),
    ("kivi-4bit", 256): ((0, 8192, 8192, 16384, 17408, 18432), 18432, "7fa5a958c160c01f"),
    ("kivi-2bit", 64): ((0, 1024, 1024, 2048, 2560, 2816), 2816, "f620e732c65a7d4f"),
    ("kivi-2bit", 96): ((0, 1536, 1536, 3072, 3840, 4608), 4608, "5c84f0795b7bdd2b"),
    ("kivi-2bit", 128): ((0, 2048, 2048, 4096, 5120, 5632), 5632, "5e5dedde0d5df371"),
    ("kivi-2bit", 160): ((0, 2560, 2560, 5120, 6400, 7680), 7680, "2cccf881050bb4a6"),
    ("kivi-2bit", 256): ((0, 4096, 4096, 8192, 10240, 11264), 11264, "6da82ad1f62c7160"),
    ("boost-2bit", 64): ((0, 1024, 1280, 2304, 2560, 2688), 2752, "010de72eb1c51c30"),
    ("boost-2bit", 96): ((0, 1536, 1920, 3456, 3840, 3968), 4032, "0eccdb3d9c3bd18c"),
    ("boost-2bit", 128): ((0, 2048, 2560, 4608, 5120, 5248), 5312, "cc8c7321a44ca68d"),
    ("boost-2bit", 160): ((0, 2560, 3200, 5760, 6400, 6528), 6592, "830688743a7ebda5"),
    ("boost-2bit", 256): ((0, 4096, 5120, 9216, 10240, 10368), 10432, "bb162a656e82ed05"),
}
SHIPPED = {
    "int8": ({"bits": 8, "group_size": 64}, {"bits": 8, "group_size": 0}),
    "kivi-4bit": ({"bits": 4, "group_size": 64}, {"bits": 4, "group_size": 64}),
    "kivi-2bit": ({"bits": 2, "group_size": 32}, {"bits": 2, "group_size": 64}),
    "boost-2bit": ({"bits": 2, "group_size": 64, "boost_fraction": 0.25}, {"bits": 2, "rotate": True}),
}
FIRST = 64  # position of the tiles of most tests: the second tile of a sequence


def written(half: Half, name: str, head_dim: int = 64, tokens: int = 64, first_counted: int = 0):
    """(codec, shape, tile, tables, parts) of one case."""
    codec, shape = codec_of(half, name), TileShape(half, tokens, head_dim)
    codec.check(shape)
    tile = Tile.of(random_rows(shape), first_counted, FIRST)
    tables = random_tables(codec, shape, tile.rows)
    return codec, shape, tile, tables, codec.encode(tile, shape, tables)


def test_every_codec_of_the_registry_is_tested_here():
    tested = {stage.name for half, name in CASES for stage in codec_of(half, name).chain()}
    assert tested == set(CODECS)


def test_kinds_are_numbered_without_gaps():
    assert [cls.kind for cls in CODECS.values()] == list(range(1, len(CODECS) + 1))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("half", "name"), CASES)
def test_a_codec_writes_the_sections_it_says_and_reads_them_back(half, name, head_dim):
    codec, shape, tile, tables, parts = written(half, name, head_dim)
    sections = codec.sections(shape)
    assert [(part.dtype, tuple(part.shape)) for part in parts] == [(s.dtype, s.shape) for s in sections]
    own = codec.own_sections(shape)
    assert sections[: len(own)] == own and len(codec.params(shape)) <= 8 and len(own) <= 6
    decoded = codec.decode(parts, shape, tables, tile.positions)
    expected = torch.tensor(read(codec, list(parts), shape, tables, FIRST))
    assert decoded.dtype == torch.float32 and torch.allclose(decoded, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_dim", [96, 160])
@pytest.mark.parametrize(("half", "name"), [(h, n) for h, n in CASES if not (h is Half.VALUE and n == "table-3")])
def test_codecs_read_back_heads_that_are_no_power_of_two(half, name, head_dim):
    codec, shape, tile, tables, parts = written(half, name, head_dim)
    decoded = codec.decode(parts, shape, tables, tile.positions)
    assert torch.allclose(decoded, torch.tensor(read(codec, list(parts), shape, tables, FIRST)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("half", "name"), [(Half.KEY, "affine"), (Half.KEY, "affine-token"), (Half.VALUE, "affine"),
                                            (Half.VALUE, "affine-channel")])  # fmt: skip
def test_affine_elements_are_within_half_a_step_of_their_group(half, name):
    codec, shape, tile, tables, parts = written(half, name, 96, first_counted=0)
    decoded = codec.decode(parts, shape, tables, tile.positions)
    per_channel = name in ("affine-channel", "affine") if half is Half.KEY else name == "affine-channel"
    size = {64: 32}.get(codec.group_size, codec.group_size)  # of 96 channels or 64 tokens
    size = codec.group_size if per_channel else size
    for t in range(0, 64, 7):
        for d in range(96):
            tokens = range(t // size * size, t // size * size + size) if per_channel else [t]
            channels = [d] if per_channel else range(d // size * size, d // size * size + size)
            group = [float(tile.rows[i, j]) for i in tokens for j in channels]
            step = (max(group) - min(group)) / (2**codec.bits - 1)
            bound = step / 2 + 2**-10 * (max(group) - min(group) + max(map(abs, group)))
            assert abs(float(decoded[t, d]) - float(tile.rows[t, d])) <= bound


@pytest.mark.parametrize("name", ["table-2", "table-3", "table-4-token"])
def test_a_table_takes_the_nearest_level(name):
    codec, shape, tile, tables, parts = written(Half.KEY, name)
    decoded = codec.decode(parts, shape, tables, tile.positions).double()
    levels = tables["table.levels"].double()
    if codec.is_fixed(Half.KEY):
        half, middle = (row.double()[None] for row in tables["table.range"])
    else:
        low, high = tile.rows.double().aminmax(dim=1, keepdim=True)
        half, middle = (high - low) / 2, (high + low) / 2
        assert torch.allclose(parts[-1].double()[..., None], torch.stack([half, middle]), rtol=2**-10, atol=2**-12)
    candidates = levels * half[..., None] + middle[..., None]
    least = (candidates - tile.rows.double()[..., None]).abs().amin(-1)
    slack = 1e-6 if codec.is_fixed(Half.KEY) else 0.05  # the range is rounded to float16
    assert ((decoded - tile.rows.double()).abs() <= least * (1 + 1e-5) + slack).all()


def test_of_two_equally_near_levels_a_table_takes_the_lower():
    codec, shape = make_codec({"name": "table", "bits": 2}), TileShape(Half.KEY, 64, 64)
    tables = {
        "table.levels": torch.tensor([-1.0, -0.5, 0.5, 1.0]),
        "table.range": torch.eye(2)[0][:, None].expand(2, 64),
    }
    rows = torch.tensor([-0.75, 0.0, 0.75, 5.0]).repeat(16)[:, None].expand(64, 64)
    decoded = codec.decode(codec.encode(Tile.of(rows), shape, tables), shape, tables, torch.arange(64))
    assert decoded[:4, 0].tolist() == [-1.0, -0.5, 0.5, 1.0]


@pytest.mark.parametrize(("half", "couple"), [(Half.KEY, 2), (Half.KEY, 4), (Half.VALUE, 8)])
def test_a_vector_takes_the_nearest_centroid(half, couple):
    codec, shape = make_codec({"name": "vector", "couple": couple}), TileShape(half, 64, 64)
    rows = random_rows(shape)
    tables = random_tables(codec, shape, rows)
    tables["vector.codebook"][:, 200] = tables["vector.codebook"][:, 100]  # as near: the first is taken
    (codes,) = codec.encode(Tile.of(rows), shape, tables)
    assert 200 not in codes.tolist()
    codebook, x = tables["vector.codebook"].double(), rows.double().view(64, -1, couple)
    for t in range(0, 64, 9):
        for group in range(64 // couple):
            distances = [
                sum((float(x[t, group, c]) - float(centroid[c])) ** 2 for c in range(couple))
                for centroid in codebook[group]
            ]
            assert distances[int(codes[t, group])] <= min(distances) * (1 + 1e-5)


def test_a_symmetric_scale_is_the_least_squares_fit_to_its_codes():
    codec, shape, tile, tables, parts = written(Half.VALUE, "symmetric")
    decoded = codec.decode(parts, shape, tables, tile.positions).double()
    for t in range(shape.tokens):
        x, codes = tile.rows[t].double(), decoded[t] / float(parts[1][t])
        assert float(parts[1][t]) == pytest.approx(float((x * codes).sum() / codes.square().sum()), rel=2**-9)
        assert codes.abs().max() == 1.5


def outlying(rows, counted, groups, count):
    """Places of the elements furthest from the mean of their group, in its standard deviations."""
    far = []
    for group in groups:
        inside = [float(rows[t, d]) for t, d in group if counted[t]]
        mean = sum(inside) / len(inside)
        deviation = (sum((x - mean) ** 2 for x in inside) / len(inside)) ** 0.5
        far += [(abs(float(rows[t, d]) - mean) / deviation, t * rows.shape[1] + d) for t, d in group if counted[t]]
    return sorted(place for _, place in sorted(far, reverse=True)[:count])


@pytest.mark.parametrize(("half", "name"), [(Half.KEY, "outliers"), (Half.VALUE, "outliers")])
def test_outliers_are_the_elements_furthest_from_their_groups_mean(half, name):
    codec, shape, tile, tables, parts = written(half, name, first_counted=8)
    spans = [range(g, g + 32) for g in (0, 32)]
    groups = [[(t, d) for t in span] for span in spans for d in range(64)]
    if half is Half.VALUE:
        groups = [[(t, d) for d in range(64)] for t in range(8, 64)]
    count = 48  # of 4096 elements 1 %, a multiple of 8
    assert parts[1].tolist() == outlying(tile.rows, tile.counted, groups, count)
    decoded = codec.decode(parts, shape, tables, tile.positions)
    places = parts[1].long()
    assert torch.equal(decoded.flatten()[places], tile.rows.flatten()[places].half().float())


def test_outliers_of_a_fixed_range_are_the_elements_furthest_from_its_middle():
    _, _, tile, tables, parts = written(Half.KEY, "outliers-table")
    half, middle = tables["table.range"].double()
    far = ((tile.rows.double() - middle).abs() / half).flatten().tolist()
    expected = sorted(sorted(range(len(far)), key=lambda place: (-far[place], place))[:88])
    assert parts[1].tolist() == expected


def test_outliers_do_not_widen_the_ranges_of_the_others():
    shape = TileShape(Half.KEY, 64, 64)
    rows = random_rows(shape)
    far = rows.clone()
    far[::16, 7] = 1000.0
    codec, plain = codec_of(Half.KEY, "outliers"), codec_of(Half.KEY, "outliers").inner
    others = torch.arange(64) % 16 != 0

    def error(codec, tile):
        decoded = codec.decode(codec.encode(tile, shape, {}), shape, {}, tile.positions)
        return (decoded - tile.rows)[others, 7].abs().max()

    assert error(codec, Tile.of(far)) < 0.4 and error(plain, Tile.of(far)) > 1


def test_tokens_that_do_not_count_take_no_part_in_a_low_rank():
    shape, codec = TileShape(Half.KEY, 64, 64), codec_of(Half.KEY, "low-rank")
    rows = random_rows(shape)
    far = rows.clone()
    far[:8] *= 100
    parts, others = (codec.encode(Tile.of(r, first_counted=8), shape, {}) for r in (rows, far))
    assert not parts[0][:8].any() and parts[0][8:].any()
    assert torch.equal(parts[0], others[0]) and torch.equal(parts[1], others[1])


def test_low_rank_comes_close_to_the_best_approximation():
    for half, name in ((Half.KEY, "low-rank"), (Half.VALUE, "low-rank")):
        codec, shape, tile, tables, parts = written(half, name)
        error = tile.rows - codec.inner.decode(parts[2:], shape, tables, tile.positions)
        rest = tile.rows - codec.decode(parts, shape, tables, tile.positions)
        best = torch.linalg.svdvals(error.double())[codec.rank :].square().sum()
        assert best <= rest.double().square().sum() < 1.1 * best


def test_low_rank_of_no_error_is_nothing():
    shape, codec = TileShape(Half.KEY, 64, 64), codec_of(Half.KEY, "low-rank")
    tile = Tile.of(torch.full((64, 64), 2.0))
    parts = codec.encode(tile, shape, {})
    assert torch.equal(codec.decode(parts, shape, {}, tile.positions), tile.rows) and not parts[0].any()


def test_columns_that_depend_on_others_become_zero():
    columns = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 1.0], [1.0, 2.0 + 1e-6, 0.0]])
    made = orthonormal(columns)
    assert not made[:, 1].any() and torch.allclose(made.T @ made, torch.diag(torch.tensor([1.0, 0.0, 1.0])), atol=1e-6)
    for head_dim in (64, 96):
        start = first_directions(head_dim, 8)
        assert torch.allclose(start.T @ start, torch.diag((start.T @ start).diag()), atol=1e-4)


@pytest.mark.parametrize("name", ["before-rope", "before-rope-part"])
def test_before_rope_writes_the_keys_that_the_model_had_before_turning(name):
    codec, shape = codec_of(Half.KEY, name), TileShape(Half.KEY, 64, 64)
    rows = random_rows(shape)
    tables = {"before-rope.rotary": rotary_table((codec.rotary_dim or 64) // 2, factor=1.25)}
    turned = torch.tensor(turn(codec, rows.tolist(), 64, tables, FIRST))
    tile = Tile.of(turned, 0, FIRST)
    expected = codec.inner.decode(codec.inner.encode(Tile.of(rows), shape, {}), shape, {}, tile.positions)
    stored = codec.inner.decode(codec.encode(tile, shape, tables), shape, tables, tile.positions)
    step = (rows.amax(0) - rows.amin(0)) / (2**codec.inner.bits - 1)
    assert ((stored - expected).abs() <= step + 1e-3).all()  # rounding may move a code
    assert ((stored - expected).abs() < 1e-3).float().mean() > 0.98


@pytest.mark.parametrize(("policy", "head_dim"), PAGES)
def test_pages_of_shipped_policies_are_byte_for_byte_what_they_were(policy: str, head_dim: int):
    key, value = map(make_codec, SHIPPED[policy])
    tile_format = TileFormat.of(key, value, 64, head_dim)
    keys = {place.section.name: place.offset for place in tile_format.keys}
    values = {place.section.name: place.offset for place in tile_format.values}
    offsets, size, digest = PAGES[policy, head_dim]
    found = (
        keys["codes"],
        keys.get("boost_codes"),
        values["codes"],
        keys["scales"],
        values["scales"],
        keys.get("boost_index"),
    )
    assert [f for f in found if f is not None] == [o for o, f in zip(offsets, found, strict=True) if f is not None]
    assert tile_format.tile_bytes == size
    page = tile_format.encode_tile(made_tile(64, head_dim, 0), made_tile(64, head_dim, 1))
    places = [*tile_format.keys, *(() if value.rotates else tile_format.values)]
    data = b"".join(bytes(page[offset : offset + section.size_bytes].tolist()) for section, offset in places)
    assert hashlib.sha256(data).hexdigest()[:16] == digest


@pytest.mark.parametrize("tokens", [64, 128])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("key", KEYS)
def test_a_tile_of_any_two_codecs_holds_both_and_nothing_overlaps(key: str, value: str, tokens: int):
    tile_format = TileFormat.of(codec_of(Half.KEY, key), codec_of(Half.VALUE, value), tokens, 64)
    places = sorted((*tile_format.keys, *tile_format.values), key=lambda place: place.offset)
    assert all(offset % 64 == 0 for _, offset in places)
    ends = [offset + section.size_bytes for section, offset in places]
    assert all(end <= after.offset for end, after in zip(ends, places[1:], strict=False))
    assert ends[-1] <= tile_format.tile_bytes and tile_format.tile_bytes % tokens == 0
    roles = [("codes", "scales", "index").index(section.role) for section, _ in places]
    assert roles == sorted(roles)
    tiles, tables = {}, {}
    for half, codec in ((Half.KEY, tile_format.key), (Half.VALUE, tile_format.value)):
        tiles[half] = Tile.of(random_rows(tile_format.shape(half), seed=len(half)), 0, FIRST)
        made = random_tables(codec, tile_format.shape(half), tiles[half].rows)
        tables |= {f"{half}.{name}": table for name, table in made.items()}
    data = tile_format.encode_tile(tiles[Half.KEY], tiles[Half.VALUE], tables)
    decoded = tile_format.decode_tile(data, FIRST + torch.arange(tokens), tables)
    for half, codec, rows in zip(Half, (tile_format.key, tile_format.value), decoded, strict=True):
        shape, own = tile_format.shape(half), {n.partition(".")[2]: t for n, t in tables.items() if n.startswith(half)}
        alone = codec.decode(codec.encode(tiles[half], shape, own), shape, own, tiles[half].positions)
        assert torch.equal(rows, alone)


def test_a_dense_tile_is_its_rows():
    tile_format = TileFormat.dense(64, 48, torch.bfloat16)
    key, value = torch.randn(64, 48).bfloat16(), torch.randn(64, 48).bfloat16()
    data = tile_format.encode_tile(Tile.of(key.float()), Tile.of(value.float()))
    assert torch.equal(data.view(torch.bfloat16).view(64, 2, 48), torch.stack([key, value], 1))
    decoded = tile_format.decode_tile(data)
    assert torch.equal(decoded[0], key.float()) and torch.equal(decoded[1], value.float())


def test_sink_tokens_widen_no_range_that_tokens_share():
    for half, name in CASES:
        codec, shape, tile, tables, _ = written(half, name, first_counted=4)
        if codec.chain()[-1].name in ("vector", "symmetric") or not codec.chain()[-1].grouping(shape).per_channel:
            continue
        far = tile._replace(rows=tile.rows.clone())
        far.rows[:4] = 500.0
        decoded = [codec.decode(codec.encode(t, shape, tables), shape, tables, t.positions)[4:] for t in (tile, far)]
        assert torch.equal(*decoded), name


def test_each_kv_head_gets_its_own_tables_and_the_shared_ones():
    tile_format = TileFormat.of(make_codec(KEYS["table-3"]), make_codec(VALUES["vector"]), 64, 64)
    layer = {
        "key.table.levels": torch.linspace(-1, 1, 8), "key.table.range": torch.rand(2, 2, 64),
        "value.vector.codebook": torch.rand(2, 8, 256, 8),
    }  # fmt: skip
    check_tables(layer, tile_format, 2)
    head = tables_of_head(layer, tile_format, 1)
    assert torch.equal(head["key.table.levels"], layer["key.table.levels"])
    assert torch.equal(head["key.table.range"], layer["key.table.range"][1])
    for name, table, part in (
        ("key.table.levels", None, "need a table key.table.levels"),
        ("key.table.levels", torch.rand(4), "reads torch.float32 (8,)"),
        ("key.table.range", torch.rand(3, 2, 64), "reads torch.float32 (2, 2, 64)"),
        ("value.vector.codebook", layer["value.vector.codebook"].half(), "is torch.float16"),
        ("key.table.levels", torch.full((8,), torch.nan), "not finite"),
    ):
        changed = {n: t for n, t in (layer | {name: table}).items() if t is not None}
        with pytest.raises(ValueError, match=r"calibrate") as caught:
            check_tables(changed, tile_format, 2)
        assert part in str(caught.value)


@pytest.mark.parametrize(("half", "name"), CASES)
def test_the_content_of_a_codec_makes_the_same_codec(half, name):
    codec = codec_of(half, name)
    assert make_codec(codec_content(codec)) == codec and hash(make_codec(codec_content(codec))) == hash(codec)
    assert codec.describe(TileShape(half, 64, 64))


def test_codecs_without_a_name_are_affine_and_rotate_means_symmetric():
    assert make_codec({"bits": 2, "group_size": 64}) == make_codec({"name": "affine", "bits": 2, "group_size": 64})
    assert make_codec({"bits": 2, "rotate": True}) == make_codec({"name": "symmetric", "bits": 2})
    assert make_codec({"bits": 2, "rotate": False, "group_size": 32}) == make_codec({"bits": 2, "group_size": 32})
    assert codec_content(make_codec({"bits": 2, "group_size": 64})) == {"bits": 2, "group_size": 64}
    with pytest.raises(ValueError, match="one scale per token"):
        make_codec({"bits": 2, "rotate": True, "group_size": 64})


@pytest.mark.parametrize(
    ("half", "content", "head_dim", "part"),
    [
        (Half.KEY, {"bits": 2, "group_size": 128}, 64, "key.group_size must be at most tile_tokens (64)"),
        (Half.KEY, {"bits": 2, "clip": True}, 64, "set key.axis to token"),
        (Half.KEY, {"name": "symmetric", "bits": 2}, 64, "writes values only"),
        (Half.VALUE, {"name": "before-rope", "inner": {"bits": 2}}, 64, "writes keys only"),
        (Half.VALUE, {"bits": 2, "axis": "channel", "boost_fraction": 0.5}, 64, "leave it out of value"),
        (Half.VALUE, {"name": "table", "bits": 3}, 96, "1-bit codes of values need a head_dim"),
        (Half.KEY, {"bits": 2}, 80, "multiple of 32"),
        (Half.KEY, {"name": "before-rope", "rotary_dim": 96, "inner": {"bits": 2}}, 64, "an even number up to"),
        (Half.KEY, {"name": "low-rank", "rank": 1, "inner": {"name": "low-rank", "rank": 2, "inner": {"bits": 2}}}, 64,
         "each of them once"),
    ],
)  # fmt: skip
def test_a_tile_that_a_codec_cannot_write_is_refused_with_the_fix(half, content, head_dim, part):
    with pytest.raises(ValueError) as caught:
        make_codec(content).check(TileShape(half, 64, head_dim))
    assert part in str(caught.value)


def test_codecs_need_no_pydantic():
    code = "import sys; sys.modules['pydantic'] = None; import kvserve.codecs.registry, kvserve.codecs.format"
    subprocess.run([sys.executable, "-c", code], check=True)
