"""What cuts keep, by length alone."""

from __future__ import annotations

from dataclasses import dataclass

from kvserve.pages.layout import PageLayout
from kvserve.schedules.base import Limit, Schedule


@dataclass(frozen=True)
class CutSizes:
    """What cuts of one limit keep, by length alone.

    A cut at `point` saves whole blocks. How many, `saved_blocks`, never falls with the point: `point - kept_at(point)`
    does not, and rounding to blocks and the blocks that stay in any case keep the order. So of any compression points
    the last saves most, and those that save no more than one before them need not be cuts at all.
    """

    schedule: Schedule
    limit: Limit
    block_size: int
    sink_tokens: int
    spared: int
    num_layers: int

    @classmethod
    def of(cls, layout: PageLayout, limit: Limit) -> CutSizes:
        """Under a limit of a request, or of the policy that `layout` is of."""
        policy, num_layers = layout.policy, layout.num_layers or 1
        assert policy.eviction is not None
        own = (policy.eviction.schedule, limit, layout.block_size, policy.sink_tokens, len(layout.spared_layers))
        if not layout.other_formats and layout.is_uniform:
            return cls(*own, num_layers)
        pages = tuple(layer.page_tokens() for layer in layout.each_layer(num_layers))
        others = layout.page_tokens(1) if layout.other_formats else 0
        return RunSizes(*own, num_layers, layout.chosen_unit, pages, others, layout.pages_per_strip(num_layers))

    def kept_blocks(self, point: int) -> int:
        """Kept blocks of a cut at `point`.

        The limit counts every token that a KV head keeps on average: sinks, kept tokens and those behind the last
        whole block. A rate is rounded up to whole blocks, a maximum of tokens down; protected tokens and one block stay
        in any case, and all tokens of spared layers.
        """
        size = self.block_size
        kept = self.schedule.kept_at(self.limit, point)
        if kept >= point:
            return point // size
        wanted = kept - self.sink_tokens - point % size
        return max(-(-wanted // size) if self.limit.rate else wanted // size, self.least_blocks(point))

    def least_blocks(self, point: int) -> int:
        """Kept blocks of a cut that leaves each head its protected tokens and a block, and spared layers everything."""
        size, spared = self.block_size, self.spared
        per_head = max(-((self.sink_tokens + point % size - self.limit.protected) // size), 1)
        if not spared:
            return per_head
        return -(-(spared * (point // size) + (self.num_layers - spared) * per_head) // self.num_layers)

    def chosen_pages(self, point: int) -> int:
        """As Cut."""
        return 0

    def saved_blocks(self, point: int) -> int:
        """Blocks that a sequence cut at `point` lacks; 0 where a cut would not make it smaller."""
        return max(point // self.block_size - self.kept_blocks(point), 0)

    def first_saving(self, count: int, max_len: int) -> int:
        """The first length at which a cut saves `count` blocks, one at least; max_len + 1 if it is longer than that."""
        size, sinks = self.block_size, self.sink_tokens
        evicted = (count * size if self.limit.rate else (count - 1) * size + 1) - sinks
        unspared = -(-count * self.num_layers // (self.num_layers - self.spared))  # what the other layers have to save
        least = max((unspared + 1) * size, self.limit.protected - sinks + unspared * size)
        return min(max(self.schedule.first_evicting(self.limit, max(evicted, 1), max_len), least), max_len + 1)


@dataclass(frozen=True)
class RunSizes(CutSizes):
    """The same of a request that is cut once, and of which every head keeps equally many tokens in its layer's format.

    The others are gone, or stay in the format behind it. Pages are whole for each (layer, KV head). Within a block a
    longer sequence keeps no more blocks: a page of chosen tokens holds no more tokens than one of the others.

    Attributes:
        unit: chosen tokens are a multiple of it, or all that there are.
        page_tokens: tokens of a page, by layer.
        other_tokens: those of a page of the others; 0: they are gone.
        pages_per_strip: kept pages of one (block, KV head).
    """

    unit: int
    page_tokens: tuple[int, ...]
    other_tokens: int
    pages_per_strip: int

    def chosen_pages(self, point: int) -> int:
        """As Cut: the limit's tokens, of which sinks and the last ones take their share.

        A rate is rounded up to whole units, a maximum of tokens down; protected tokens and one unit stay in any case.
        """
        size, others = self.unit, self.sink_tokens + point % self.block_size
        wanted = self.schedule.kept_at(self.limit, point) - others
        pages = -(-wanted // size) if self.limit.rate else wanted // size
        return max(min(max(pages, -(-(self.limit.protected - others) // size), 1), -(-self._held(point) // size)), 0)

    def kept_blocks(self, point: int) -> int:
        """Kept blocks of a cut at `point`."""
        if self.schedule.kept_at(self.limit, point) >= point:
            return point // self.block_size
        held = self._held(point)
        chosen = min(self.chosen_pages(point) * self.unit, held)
        pages = sum(-(-chosen // tokens) for tokens in self.page_tokens)
        if self.other_tokens:
            pages -= -(held - chosen) // self.other_tokens * self.num_layers
        return -(-pages // self.pages_per_strip)

    def first_saving(self, count: int, max_len: int) -> int:
        """No later than the first length at which a cut saves `count` blocks."""
        return min(count * self.block_size, max_len + 1)

    def widest(self, layout: PageLayout, max_len: int) -> int:
        """The most blocks that any request of at most `max_len` tokens holds.

        After its cut it holds less than one that is not cut. Of prompts that end in the same tile, the shortest that is
        cut holds most in that step.
        """
        most, size = layout.blocks_for(max_len), layout.tile_tokens
        for tile in range(0, max_len + 1, size):
            lengths = range(max(tile, 1), min(tile + size, max_len + 1))
            cut = next((length for length in lengths if self.saved_blocks(length)), None)
            most = max(most, layout.blocks_for(cut) + self.kept_blocks(cut) if cut else 0)
        return most

    def _held(self, point: int) -> int:
        """Tokens that a head chooses among."""
        return max(point // self.block_size * self.block_size - self.sink_tokens, 0)
