"""How codes are packed into bytes, so that a kernel reads them with plain shifts.

A matrix of b-bit codes has `rows` (the dimension a dot product sums over, taken in fours) and `columns` (the dimension
that stays in SIMD lanes). It is stored as bytes

    byte[column block][row quad][lane 0..15][row of the quad 0..3]

and column `block * (128 / b) + plane * 16 + lane` sits in bits [plane * b, plane * b + b) of its byte: the 32 bits of
a lane hold one column of four rows. For K the rows are channels and the columns tokens; for V the rows are tokens and
the columns channels.

Columns that fill half a block are folded: the block has half of the rows, the upper ones in its left half of the planes
and the lower ones in its right half. 2-bit codes of an odd multiple of 32 columns have such a block, and 1-bit codes of
an odd multiple of 64.
"""

from __future__ import annotations

from kvserve.codecs.lazy import torch
from kvserve.codecs.tile import Half, Section, TileShape

LANES = 16  # columns of one bit plane


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack integer codes [rows, columns] into bytes, uint8 [rows * columns * bits / 8]."""
    rows, columns = codes.shape
    planes = 8 // bits
    if columns % (planes * LANES):
        half = planes * LANES // 2
        folded = torch.cat([codes[: rows // 2, -half:], codes[rows // 2 :, -half:]], 1)
        return torch.cat([pack_codes(codes[:, :-half], bits), pack_codes(folded, bits)])
    split = codes.to(torch.int32).reshape(rows // 4, 4, columns // (planes * LANES), planes, LANES)
    shifts = (torch.arange(planes, dtype=torch.int32) * bits).reshape(1, 1, 1, planes, 1)
    packed = (split << shifts).sum(3, dtype=torch.int32)  # [quad, row of the quad, block, lane]
    return packed.permute(2, 0, 3, 1).contiguous().to(torch.uint8).flatten()


def unpack_codes(data: torch.Tensor, bits: int, rows: int, columns: int) -> torch.Tensor:
    """Inverse of `pack_codes`: uint8 bytes to int32 codes [rows, columns]."""
    planes = 8 // bits
    if columns % (planes * LANES):
        half = planes * LANES // 2
        whole = unpack_codes(data[: rows * (columns - half) * bits // 8], bits, rows, columns - half)
        folded = unpack_codes(data[whole.numel() * bits // 8 :], bits, rows // 2, 2 * half)
        return torch.cat([whole, torch.cat([folded[:, :half], folded[:, half:]])], 1)
    packed = data.to(torch.int32).reshape(columns // (planes * LANES), rows // 4, LANES, 4)
    shifts = torch.arange(planes, dtype=torch.int32) * bits
    codes = (packed[..., None] >> shifts) & ((1 << bits) - 1)  # [block, quad, lane, row of the quad, plane]
    return codes.permute(1, 3, 0, 4, 2).reshape(rows, columns)


def planes_section(name: str, shape: TileShape, bits: int) -> Section:
    """The section of a tile's packed codes."""
    return Section(name, torch.uint8, (shape.tokens * shape.head_dim * bits // 8,), "codes")


def pack_tile(codes: torch.Tensor, shape: TileShape, bits: int) -> torch.Tensor:
    """Pack the codes of a tile, integers [tokens, head_dim], in the order of its half."""
    return pack_codes(codes.T if shape.half is Half.KEY else codes, bits)


def unpack_tile(data: torch.Tensor, shape: TileShape, bits: int) -> torch.Tensor:
    """Inverse of `pack_tile`: int32 codes [tokens, head_dim]."""
    if shape.half is Half.KEY:
        return unpack_codes(data, bits, shape.head_dim, shape.tokens).T
    return unpack_codes(data, bits, shape.tokens, shape.head_dim)


def check_planes(shape: TileShape, bits: int) -> None:
    """Refuse heads whose codes do not fill whole or half blocks.

    Raises:
        ValueError: the message names the fix.
    """
    columns = shape.tokens if shape.half is Half.KEY else shape.head_dim
    least = max(8 // bits * LANES // 2, LANES)
    if columns % least or shape.head_dim % 32:
        raise ValueError(
            f"{bits}-bit codes of {shape.half}s need a head_dim that is a multiple of {max(least, 32)}, the model has "
            f"{shape.head_dim}; choose a codec with other bits, or --policy none"
        )
