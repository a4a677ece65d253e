"""The affine family as single numbers: affine keys per channel, and affine values per token or symmetric ones."""

from __future__ import annotations

from typing import NamedTuple

from kvserve.codecs.affine_family import is_in_family
from kvserve.codecs.format import TileFormat, align
from kvserve.codecs.tile import Half


class AffineFamily(NamedTuple):
    """Bits, groups and byte offsets; what a codec does not have is 0, and the offset of an absent section its end's."""

    key_bits: int
    key_group: int
    boost_channels: int
    value_bits: int
    value_group: int
    value_rotated: int
    key_codes: int
    key_boost_codes: int
    value_codes: int
    key_scales: int
    value_scales: int
    key_boost_index: int


def affine_family(tile_format: TileFormat) -> AffineFamily:
    """The numbers of a tile of two codecs of the family."""
    key, value = tile_format.key, tile_format.value
    shape = tile_format.shape(Half.KEY), tile_format.shape(Half.VALUE)
    assert key is not None and value is not None, "a dense tile has no codecs"
    assert is_in_family(key, Half.KEY) and is_in_family(value, Half.VALUE), f"{key.name} keys, {value.name} values"
    keys, values = ({p.section.name: p.offset for p in places} for places in (tile_format.keys, tile_format.values))
    last = tile_format.values[-1]
    end = align(last.offset + last.section.size_bytes)
    key_bits, key_group, boost_channels, *_ = key.params(shape[0])
    value_bits, value_group = value.params(shape[1])[0], 0
    if not value.rotates:
        value_group = value.params(shape[1])[1]
    return AffineFamily(
        key_bits, key_group, boost_channels, value_bits, value_group or tile_format.head_dim, int(value.rotates),
        keys["codes"], keys.get("boost_codes", values["codes"]), values["codes"], keys["scales"], values["scales"],
        keys.get("boost_index", end),
    )  # fmt: skip
