"""The codecs of one half of a page, put together: a chain of wrappers around one that writes codes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from kvserve.codecs.format import TileFormat
from kvserve.codecs.tile import Half
from kvserve.kernels.codecs.affine import AFFINE, SYMMETRIC, AffineStage, affine_rows, encode_affine
from kvserve.kernels.codecs.before_rope import BEFORE_ROPE, BeforeRopeStage, turned_rows
from kvserve.kernels.codecs.low_rank import LOW_RANK, LowRankStage, encode_low_rank, low_rank_rows
from kvserve.kernels.codecs.outliers import OUTLIERS, OutliersStage, outlier_rows, take_outliers
from kvserve.kernels.codecs.table import TABLE, TableStage, encode_table, table_rows
from kvserve.kernels.codecs.vector import VECTOR, VectorStage, encode_vector, vector_rows

STAGES: dict[int, Any] = {
    AFFINE.value: AffineStage,
    SYMMETRIC.value: AffineStage,
    TABLE.value: TableStage,
    VECTOR.value: VectorStage,
    OUTLIERS.value: OutliersStage,
    LOW_RANK.value: LowRankStage,
    BEFORE_ROPE.value: BeforeRopeStage,
}


class HalfFormat(NamedTuple):
    """How the keys, or the values, of a page are written: compile-time constants.

    Attributes:
        stages: of the codecs, outermost first; a codec is in a chain only once.
        wrappers: stages but the last, which writes codes.
        integer: codes enter the dots as they are (`affine_scores`, `affine_values`).
        low_rank: index of the low-rank codec; -1: there is none.
    """

    stages: tuple[Any, ...]
    wrappers: int
    integer: bool
    low_rank: int

    @classmethod
    def of(cls, tile_format: TileFormat, half: Half) -> HalfFormat:
        """The stages of one half of a page.

        Raises:
            ValueError: the kernels do not know a codec.
        """
        codec, places = tile_format.half(half)
        shape, stages, offsets = tile_format.shape(half), [], iter(places)
        for stage in codec.chain():
            if stage.kind not in STAGES:
                raise ValueError(f"the Triton kernels have no codec {stage.name}; choose another codec")
            at = {section.name: next(offsets).offset for section in stage.own_sections(shape)}
            stages.append(STAGES[stage.kind].of(stage, shape, at))
        only = stages[0]
        integer = isinstance(only, AffineStage) and only.per_token == (half is Half.VALUE)
        kinds = [stage.kind for stage in stages]
        low_rank = kinds.index(LOW_RANK.value) if LOW_RANK.value in kinds else -1
        return cls(tuple(stages), len(stages) - 1, integer, low_rank)


class HalfTables(NamedTuple):
    """The tables of one layer that the codecs of a half read, on the device; None: there is none."""

    levels: torch.Tensor | None = None
    ranges: torch.Tensor | None = None
    codebook: torch.Tensor | None = None
    clip: torch.Tensor | None = None
    rotary: torch.Tensor | None = None
    positions: int | None = None  # that `rotary` has


class CodecTables(NamedTuple):
    """What kernels take of both halves' tables."""

    key: HalfTables = HalfTables()
    value: HalfTables = HalfTables()


NO_TABLES = CodecTables()
FIELDS = {  # by a table's own name
    "levels": "levels", "range": "ranges", "codebook": "codebook", "clip": "clip", "rotary": "rotary",
}  # fmt: skip


@triton.jit
def read_rows(
    page, column0, first_position, head, tables, CHUNK: tl.constexpr, H: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """One half of the tokens [column0, column0 + CHUNK) of a page, float32 [CHUNK, block_dim]; 0 from head_dim on.

    Args:
        first_position: position in the sequence of the token in column0; the others follow it.
        tables: HalfTables of the half.
    """
    WRAPPERS: tl.constexpr = H.wrappers
    rows = _inmost_rows(page, column0, head, tables, CHUNK, H.stages[WRAPPERS], G)
    for i in tl.static_range(WRAPPERS):
        rows = _wrapped_rows(rows, page, column0, first_position, tables, CHUNK, H.stages[WRAPPERS - 1 - i], G)
    return rows


@triton.jit
def _inmost_rows(page, column0, head, tables, CHUNK: tl.constexpr, S: tl.constexpr, G: tl.constexpr):
    if S.kind == TABLE:
        rows = table_rows(page, column0, head, tables, CHUNK, S, G)
    elif S.kind == VECTOR:
        rows = vector_rows(page, column0, head, tables, CHUNK, S, G)
    else:
        rows = affine_rows(page, column0, CHUNK, S, G)
    return rows


@triton.jit
def _wrapped_rows(
    rows, page, column0, first_position, tables, CHUNK: tl.constexpr, S: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    if S.kind == OUTLIERS:
        rows = outlier_rows(rows, page, column0, CHUNK, S, G)
    elif S.kind == LOW_RANK:
        rows = low_rank_rows(rows, page, column0, CHUNK, S, G)
    else:
        rows = turned_rows(rows, first_position, tables, False, S, G)
    return rows


@triton.jit
def encode_rows(page, rows, first_counted, first_position, head, tables, H: tl.constexpr, G: tl.constexpr):
    """Write one half of a tile, float32 [tile_tokens, block_dim].

    Tokens before first_counted define no range that tokens share. Other arguments as of `read_rows`.
    """
    WRAPPERS: tl.constexpr = H.wrappers
    target, exact, is_outlier = rows, rows, rows != rows
    for i in tl.static_range(WRAPPERS):
        if H.stages[i].kind == OUTLIERS:
            is_outlier, exact, rows = take_outliers(page, rows, first_counted, head, tables, H.stages[i], G)
        elif H.stages[i].kind == LOW_RANK:
            target = rows
        else:
            rows = turned_rows(rows, first_position, tables, True, H.stages[i], G)
    decoded = _encode_inmost(page, rows, first_counted, head, tables, H.stages[WRAPPERS], G)
    if H.low_rank >= 0:
        for i in tl.static_range(WRAPPERS - 1 - H.low_rank):  # what it wraps, from the inside out
            if H.stages[WRAPPERS - 1 - i].kind == OUTLIERS:
                decoded = tl.where(is_outlier, exact, decoded)
            else:
                decoded = turned_rows(decoded, first_position, tables, False, H.stages[WRAPPERS - 1 - i], G)
        encode_low_rank(page, target, decoded, first_counted, H.stages[H.low_rank], G)


@triton.jit
def _encode_inmost(page, rows, first_counted, head, tables, S: tl.constexpr, G: tl.constexpr):
    if S.kind == TABLE:
        decoded = encode_table(page, rows, head, tables, S, G)
    elif S.kind == VECTOR:
        decoded = encode_vector(page, rows, head, tables, S, G)
    else:
        decoded = encode_affine(page, rows, first_counted, head, tables, S, G)
    return decoded
