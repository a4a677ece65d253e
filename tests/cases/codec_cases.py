"""One codec of every kind with random tables, and readers of their bytes that know nothing of kvserve/codecs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from kvserve.codecs.base import Codec
from kvserve.codecs.format import TileFormat
from kvserve.codecs.registry import make_codec
from kvserve.codecs.tile import Half, Tables, Tile, TileShape

KEYS: dict[str, dict[str, Any]] = {
    "affine": {"bits": 2, "group_size": 32},
    "affine-boosted": {"bits": 2, "group_size": 64, "boost_fraction": 0.25},
    "affine-token": {"bits": 4, "group_size": 32, "axis": "token"},
    "affine-clipped": {"bits": 2, "group_size": 32, "axis": "token", "clip": True},
    "table-2": {"name": "table", "bits": 2},
    "table-3": {"name": "table", "bits": 3},
    "table-4-token": {"name": "table", "bits": 4, "norm": "token"},
    "vector": {"name": "vector", "couple": 4},
    "outliers": {"name": "outliers", "fraction": 0.01, "inner": {"bits": 2, "group_size": 32}},
    "outliers-table": {"name": "outliers", "fraction": 0.02, "inner": {"name": "table", "bits": 3}},
    "low-rank": {"name": "low-rank", "rank": 2, "inner": {"bits": 2}},
    "before-rope": {"name": "before-rope", "inner": {"bits": 4, "group_size": 64}},
    "before-rope-part": {"name": "before-rope", "rotary_dim": 32, "interleaved": True, "inner": {"bits": 8}},
    "nested": {
        "name": "before-rope",
        "inner": {"name": "low-rank", "rank": 1, "inner": {"name": "outliers", "fraction": 0.01, "inner": {"bits": 2}}},
    },
}
VALUES: dict[str, dict[str, Any]] = {
    "affine": {"bits": 4, "group_size": 64},
    "affine-channel": {"bits": 2, "group_size": 32, "axis": "channel"},
    "affine-clipped": {"bits": 4, "group_size": 64, "clip": True},
    "symmetric": {"name": "symmetric", "bits": 2},
    "table-3": {"name": "table", "bits": 3},
    "table-2-channel": {"name": "table", "bits": 2, "norm": "channel"},
    "vector": {"name": "vector", "couple": 8},
    "outliers": {"name": "outliers", "fraction": 0.01, "inner": {"bits": 2, "group_size": 64}},
    "outliers-symmetric": {"name": "outliers", "fraction": 0.03, "inner": {"name": "symmetric", "bits": 2}},
    "low-rank": {"name": "low-rank", "rank": 4, "inner": {"name": "symmetric", "bits": 2}},
}
# Wrappers around wrappers: more keys.
CHAINS: dict[str, dict[str, Any]] = {
    "outlier-table-before-rope": {
        "name": "before-rope",
        "inner": {"name": "outliers", "fraction": 0.01, "inner": {"name": "table", "bits": 3}},
    },
    "vector-before-rope": {"name": "before-rope", "inner": {"name": "vector", "couple": 4}},
    "rank-of-outliers": {
        "name": "low-rank",
        "rank": 2,
        "inner": {"name": "outliers", "fraction": 0.01, "inner": {"bits": 2, "group_size": 32}},
    },
    "outliers-of-rank": {
        "name": "outliers",
        "fraction": 0.01,
        "inner": {"name": "low-rank", "rank": 2, "inner": {"bits": 2, "group_size": 32}},
    },
    "rank-of-turned-table": {
        "name": "low-rank",
        "rank": 1,
        "inner": {"name": "before-rope", "inner": {"name": "table", "bits": 4}},
    },
}
CASES = [(Half.KEY, name) for name in KEYS] + [(Half.VALUE, name) for name in VALUES]
Rows = list[list[float]]  # [tokens][head_dim]
LONGEST = 512  # positions of the rotary tables


def codec_of(half: Half, name: str) -> Codec:
    return make_codec((KEYS | CHAINS if half is Half.KEY else VALUES)[name])


def random_rows(shape: TileShape, seed: int = 0) -> torch.Tensor:
    """Rows with an offset and a spread of each channel, and a few that are far out."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape.tokens, shape.head_dim, generator=generator)
    rows = rows * (0.2 + torch.rand(shape.head_dim, generator=generator)) + torch.randn(
        shape.head_dim, generator=generator
    )
    rows[5, 3], rows[40, 11], rows[41, 11] = 30.0, -25.0, 25.0
    return rows


def rotary_table(pairs: int, positions: int = LONGEST, factor: float = 1.0) -> torch.Tensor:
    """Cosines and sines of the usual rotary embedding, float32 [2, pairs, positions]."""
    angles = torch.arange(positions).double() * (10000.0 ** (-torch.arange(pairs).double() / pairs))[:, None]
    return (torch.stack([angles.cos(), angles.sin()]) * factor).float()


def random_tables(codec: Codec, shape: TileShape, rows: torch.Tensor, seed: int = 1) -> dict[str, torch.Tensor]:
    """What one KV head would have calibrated for `rows`."""
    generator = torch.Generator().manual_seed(seed)
    low, high = rows.quantile(0.02, 0), rows.quantile(0.98, 0)
    makers: dict[str, Callable[[tuple[int, ...]], torch.Tensor]] = {
        "table.levels": lambda size: (
            torch.linspace(-1, 1, size[0]).sign() * torch.linspace(-1, 1, size[0]).abs() ** 1.3
        ),
        "table.range": lambda size: torch.stack([(high - low) / 2, (high + low) / 2]),
        "affine.clip": lambda size: 0.5 + 0.5 * torch.rand(size, generator=generator),
        "vector.codebook": lambda size: torch.randn(size, generator=generator),
        "before-rope.rotary": lambda size: rotary_table(size[1], factor=1.25),
    }
    specs = codec.tables(shape)
    return {
        name: makers[name](
            tuple(LONGEST if axis == "positions" else int(axis) for axis in spec.axes if axis != "kv_heads")
        )
        for name, spec in specs.items()
    }


def random_layer_tables(tile_format: TileFormat, num_kv_heads: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """What a layer would have calibrated for rows of `random_rows`, by "half.codec name.table name"."""
    tables = {}
    for half in Half if tile_format.key is not None else ():
        shape = tile_format.shape(half)
        codec, _ = tile_format.half(half)
        heads = [random_tables(codec, shape, random_rows(shape, seed + h), seed + h) for h in range(num_kv_heads)]
        for name, spec in codec.tables(shape).items():
            own = "kv_heads" in spec.axes
            tables[f"{half}.{name}"] = torch.stack([head[name] for head in heads]) if own else heads[0][name]
    return tables


def packed_code(data: list[int], bits: int, rows: int, columns: int, row: int, column: int) -> int:
    """One code of a packed matrix, by the text at the top of packing.py."""
    planes, base = 8 // bits, 0
    width = planes * 16
    block, within = divmod(column, width)
    if columns - block * width < width:  # a folded half block
        base, block = rows * (columns // width * width) * bits // 8, 0
        upper = row >= rows // 2
        row, rows, within = row % (rows // 2), rows // 2, within + (width // 2 if upper else 0)
    plane, lane = divmod(within, 16)
    byte = base + ((block * rows // 4 + row // 4) * 16 + lane) * 4 + row % 4
    return data[byte] >> plane * bits & (1 << bits) - 1


def tile_codes(data: torch.Tensor, shape: TileShape, bits: int) -> list[list[int]]:
    """All codes of a tile, [tokens][head_dim]."""
    raw, (half, tokens, dim) = data.tolist(), shape
    if half is Half.KEY:
        return [[packed_code(raw, bits, dim, tokens, d, t) for d in range(dim)] for t in range(tokens)]
    return [[packed_code(raw, bits, tokens, dim, t, d) for d in range(dim)] for t in range(tokens)]


def read_affine(codec: Any, parts: list[torch.Tensor], shape: TileShape) -> Rows:
    per_channel = (codec.axis or ("channel" if shape.half is Half.KEY else "token")) == "channel"
    codes, boosted = tile_codes(parts[0], shape, codec.bits), int(shape.head_dim * codec.boost_fraction)
    scales = (parts[2] if boosted else parts[1]).double().tolist()
    if boosted:
        for row, channel in enumerate(parts[3].tolist()):
            for t in range(shape.tokens):
                codes[t][channel] += 4 * packed_code(parts[1].tolist(), 2, boosted, shape.tokens, row, t)
    count = shape.tokens if per_channel else shape.head_dim
    size = math.gcd(codec.group_size or count, count)

    def element(t: int, d: int) -> float:
        group, lane = (t // size, d) if per_channel else (d // size, t)
        return codes[t][d] * scales[group][0][lane] + scales[group][1][lane]

    return [[element(t, d) for d in range(shape.head_dim)] for t in range(shape.tokens)]


def read_symmetric(codec: Any, parts: list[torch.Tensor], shape: TileShape) -> Rows:
    scales = parts[1].double().tolist()
    middle = (2**codec.bits - 1) / 2
    return [
        [(code - middle) * scales[t] for code in row] for t, row in enumerate(tile_codes(parts[0], shape, codec.bits))
    ]


def read_table(codec: Any, parts: list[torch.Tensor], shape: TileShape, tables: Tables) -> Rows:
    codes = tile_codes(parts[0], shape, 2 if codec.bits == 3 else codec.bits)
    if codec.bits == 3:
        high = tile_codes(parts[1], shape, 1)
        codes = [[low + 4 * top for low, top in zip(*rows, strict=True)] for rows in zip(codes, high, strict=True)]
    levels = tables["table.levels"].double().tolist()
    if "table.range" in tables:
        half, middle = tables["table.range"].double().tolist()
        return [[levels[code] * half[d] + middle[d] for d, code in enumerate(row)] for row in codes]
    half, middle = parts[-1].double().tolist()
    return [[levels[code] * half[t] + middle[t] for code in row] for t, row in enumerate(codes)]


def read_vector(codec: Any, parts: list[torch.Tensor], shape: TileShape, tables: Tables) -> Rows:
    codebook, codes = tables["vector.codebook"].double().tolist(), parts[0].tolist()
    return [[codebook[group][code][c] for group, code in enumerate(row) for c in range(codec.couple)] for row in codes]


def read_outliers(codec: Any, parts: list[torch.Tensor], shape: TileShape, tables: Tables, first: int) -> Rows:
    rows = read(codec.inner, parts[2:], shape, tables, first)
    for value, place in zip(parts[0].double().tolist(), parts[1].tolist(), strict=True):
        rows[place // shape.head_dim][place % shape.head_dim] = value
    return rows


def read_low_rank(codec: Any, parts: list[torch.Tensor], shape: TileShape, tables: Tables, first: int) -> Rows:
    rows, left, right = read(codec.inner, parts[2:], shape, tables, first), parts[0].double(), parts[1].double()
    return (torch.tensor(rows, dtype=torch.float64) + left @ right).tolist()


def turn(codec: Any, rows: Rows, head_dim: int, tables: Tables, first: int) -> Rows:
    """Apply the rotary embedding to rows of the positions from `first` on, with complex numbers."""
    turned = codec.rotary_dim or head_dim
    table = tables["before-rope.rotary"].double()
    for t, row in enumerate(rows):
        for pair in range(turned // 2):
            i, j = (2 * pair, 2 * pair + 1) if codec.interleaved else (pair, pair + turned // 2)
            z = complex(row[i], row[j]) * complex(float(table[0, pair, first + t]), float(table[1, pair, first + t]))
            row[i], row[j] = z.real, z.imag
    return rows


def read(codec: Any, parts: list[torch.Tensor], shape: TileShape, tables: Tables, first: int) -> Rows:
    """What a codec stored of a tile whose first token has the position `first`, in float64."""
    if codec.name == "affine":
        return read_affine(codec, parts, shape)
    if codec.name == "symmetric":
        return read_symmetric(codec, parts, shape)
    if codec.name == "table":
        return read_table(codec, parts, shape, tables)
    if codec.name == "vector":
        return read_vector(codec, parts, shape, tables)
    if codec.name == "outliers":
        return read_outliers(codec, parts, shape, tables, first)
    if codec.name == "low-rank":
        return read_low_rank(codec, parts, shape, tables, first)
    assert codec.name == "before-rope"
    return turn(codec, read(codec.inner, parts, shape, tables, first), shape.head_dim, tables, first)


def made_tile(tokens: int, head_dim: int, seed: int) -> Tile:
    """Rows that are the same on every machine: multiples of 2^-31 by integer arithmetic, scaled per channel."""
    index = torch.arange(tokens * head_dim, dtype=torch.int64) + seed * 7919
    channel = torch.arange(tokens * head_dim) % head_dim
    x = ((index * 2654435761) % 2**32).double() / 2**31 - 1
    rows = (x * (1 + channel % 7) + (channel % 5 - 2)).float().view(tokens, head_dim)
    return Tile.of(rows, first_counted=8)
