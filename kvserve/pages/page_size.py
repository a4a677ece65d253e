"""The size of kept pages, which tiles of several formats share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from kvserve.codecs.format import SECTION_ALIGN_BYTES

MAX_RUNS = 4  # of what a KV head keeps, each in a format of its own
MAX_LARGEST_TILES = 4
MAX_WASTE = 0.1


class PageSize(NamedTuple):
    """How tiles of several formats fill pages of one size, back to back.

    Attributes:
        page_bytes: a multiple of SECTION_ALIGN_BYTES.
        tiles: of one page, by format.
        waste: share of a page that they leave unused, by format.
    """

    page_bytes: int
    tiles: tuple[int, ...]
    waste: tuple[float, ...]

    @classmethod
    def of(cls, page_bytes: int, tile_bytes: Sequence[int]) -> PageSize:
        tiles = tuple(page_bytes // size for size in tile_bytes)
        waste = tuple(1 - count * size / page_bytes for count, size in zip(tiles, tile_bytes, strict=True))
        return cls(page_bytes, tiles, waste)


@lru_cache(maxsize=64)
def page_size(tile_bytes: tuple[int, ...]) -> PageSize:
    """The page for tiles of these sizes.

    Of the pages that hold so many of the largest tiles, that with the least waste; of those, the one with the fewest
    tiles that wastes no more than MAX_WASTE in any format: what the last page of a run leaves free grows with the page.

    Raises:
        ValueError: every page of up to MAX_LARGEST_TILES of the largest tiles wastes more; the message names the fix.
    """
    largest, least = max(tile_bytes), None
    for count in range(1, MAX_LARGEST_TILES + 1):
        sizes = range(count * largest, (count + 1) * largest, SECTION_ALIGN_BYTES)
        page = min((PageSize.of(size, tile_bytes) for size in sizes), key=lambda page: max(page.waste))
        if max(page.waste) <= MAX_WASTE:
            return page
        least = page if least is None else min(least, page, key=lambda page: max(page.waste))
    assert least is not None
    raise ValueError(
        f"tiles of {', '.join(map(str, tile_bytes))} bytes share no page of which less than {max(least.waste):.1%} is "
        f"wasted, and at most {MAX_WASTE:.0%} may be; change the bits or the group size of a codec"
    )
