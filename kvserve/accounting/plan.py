"""How many blocks a request holds, ahead of the worker.

The scheduler schedules ahead of the worker, so everything here is arithmetic on lengths: data decides which tokens
stay and in which head, never how many blocks. A request holds its row

    [state][tail][tile block 0][sinks][tile block 1]...

and, once it was cut, kept blocks beside it. A `Cut` is a compression point at which whole blocks become free. The step
that reaches it gets new kept blocks; the old ones, and the tile blocks that the cut goes over, are given back when that
step is processed. The tile blocks leave their places in the row.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

from kvserve.accounting.sizes import CutSizes, RunSizes
from kvserve.pages.kept import Kept
from kvserve.pages.layout import PageLayout
from kvserve.policies.base import Eviction
from kvserve.policies.limits import check_rate, request_limit
from kvserve.schedules.base import Limit


class Cut(NamedTuple):
    """What a request is cut down to when `point` tokens are computed.

    Attributes:
        end: tokens [sinks, end) are then kept in part; a multiple of the block size.
        kept_blocks: how many blocks hold them, each with a cell of every layer and KV head.
        chosen_pages: of each head, `PageLayout.chosen_unit` tokens each, where heads keep equally many: a retention
            keeps the others too, in another format, or layers have formats of their own. 0: the budget divides the
            pages of the kept blocks.
    """

    point: int
    end: int
    kept_blocks: int
    chosen_pages: int = 0


NO_CUT = Cut(0, 0, 0)


@dataclass(frozen=True)
class RowStep:
    """What the worker must know of one row in one step.

    Attributes:
        kept: what the request keeps as the step begins.
        cut: what it is cut down to when the step ends; None: nothing happens.
        window_start: first token whose query the scorer needs at the next cut; None: no token of this step is one.
        collects: whether the scorer has to know of all this step's queries.
        chosen_pages: of the cut (Cut).
    """

    request_id: str
    kept: Kept
    cut: Kept | None = None
    window_start: int | None = None
    collects: bool = False
    chosen_pages: int = 0


@dataclass
class EvictionPlan:
    """The cuts of one request, in order.

    Attributes:
        max_len: no cut lies behind it.
        first_window: cuts whose window of queries begins before this token are left out: a prefix hit covers them.
    """

    layout: PageLayout
    eviction: Eviction
    limit: Limit
    prompt_len: int
    max_len: int
    first_window: int = 0
    _cuts: list[Cut] = field(default_factory=lambda: [NO_CUT], init=False, repr=False, compare=False)
    _peaks: list[int] = field(default_factory=lambda: [0], init=False, repr=False, compare=False)  # up to each cut
    _is_complete: bool = field(default=False, init=False, repr=False, compare=False)  # no cut follows those known

    @cached_property
    def sizes(self) -> CutSizes:
        """What the cuts keep."""
        return CutSizes.of(self.layout, self.limit)

    def last_cut(self, length: int) -> Cut:
        """The last cut at or before `length` tokens; NO_CUT if there is none."""
        return self._cuts[self._position(length) - 1]

    def next_cut(self, length: int) -> Cut | None:
        """The first cut behind `length` tokens."""
        return next(iter(self._cuts[self._position(length) :]), None)

    def _position(self, length: int) -> int:
        """How many cuts, NO_CUT included, are at or before `length`; they and the next one are then known."""
        while self._cuts[-1].point <= length and not self._is_complete:
            self._find_next()
        return bisect_right(self._cuts, length, key=lambda cut: cut.point)

    def _find_next(self) -> None:
        """Find the first compression point behind the known cuts that saves more than they do."""
        last = self._cuts[-1]
        saved = last.end // self.layout.block_size - last.kept_blocks
        behind = max(last.point, self.first_window + self.eviction.window - 1 if self.first_window else 0)
        length = max(self.sizes.first_saving(saved + 1, self.max_len), behind + 1)
        cut = NO_CUT
        while cut.end // self.layout.block_size - cut.kept_blocks <= saved:
            step = self.eviction.schedule.tokens_to_next_point(self.limit, self.prompt_len, length - 1)
            if step is None or length - 1 + step > self.max_len:
                self._is_complete = True
                return
            cut, length = self._cut_at(length - 1 + step), length + step
        widest = self.layout.blocks_for(cut.point) - saved + cut.kept_blocks
        self._cuts.append(cut)
        self._peaks.append(max(self._peaks[-1], widest))

    def _cut_at(self, point: int) -> Cut:
        end = point // self.layout.block_size * self.layout.block_size
        return Cut(point, end, self.sizes.kept_blocks(point), self.sizes.chosen_pages(point))

    @property
    def computes_all(self) -> bool:
        """Whether the prompt must be computed from its first token on, whatever the prefix cache holds.

        Tokens behind a cut depend on what was kept, and some scorers sum over all queries.
        """
        cut = self.next_cut(0)
        return cut is not None and (cut.point < self.prompt_len or self.eviction.scorer.collects)

    def window_start(self, cut: Cut) -> int:
        """First token whose query the scorer needs at the cut."""
        return max(cut.point - self.eviction.window, 0)

    def reusable_tokens(self) -> int:
        """Prompt tokens whose tile blocks may serve other prompts: a hit must leave the first window to compute."""
        cut = self.next_cut(0)
        tokens = self.prompt_len if cut is None else min(self.window_start(cut), self.prompt_len)
        return tokens // self.layout.block_size * self.layout.block_size

    def clip_step(self, num_computed_tokens: int, num_new_tokens: int) -> int:
        """New tokens of a step that ends at the next cut, with the window's queries all in that step.

        0 where the window is all that is left and does not fit: it has to wait for a step with more room. Where the
        request's state block remembers queries, the window may lie in several steps.
        """
        cut = self.next_cut(num_computed_tokens)
        if cut is None:
            return num_new_tokens
        left = cut.point - num_computed_tokens
        if num_new_tokens >= left:
            return left
        if self.layout.remembered_queries:
            return num_new_tokens
        return min(num_new_tokens, max(self.window_start(cut) - num_computed_tokens, 0))

    def held_blocks(self, num_tokens: int) -> int:
        """Blocks that a request holds with `num_tokens` computed tokens, once what they evict is given back."""
        cut = self.last_cut(num_tokens)
        return self.layout.blocks_for(num_tokens) - cut.end // self.layout.block_size + cut.kept_blocks

    def peak_blocks(self, num_tokens: int) -> int:
        """The most blocks that it holds on the way there; a cut needs the new kept blocks beside the old ones."""
        return max(self.held_blocks(num_tokens), self._peaks[self._position(num_tokens) - 1])

    def uncut_blocks(self, num_tokens: int) -> int:
        """No fewer blocks than it holds on the way there whichever of its first cuts are left out.

        Where there is one cut, exactly what it holds without.
        """
        row = self.layout.blocks_for(num_tokens)
        if not self.eviction.schedule.repeats:
            return row
        boundary = num_tokens // self.layout.block_size * self.layout.block_size
        return row + self.sizes.kept_blocks(boundary)  # no earlier cut keeps more


def kept_elsewhere(layout: PageLayout, end: int, kept_blocks: int, chosen_pages: int = 0) -> int:
    """Tokens before `end`, sinks left out, that a KV head of a layer that is not spared keeps on average.

    Where all are kept (chosen_pages), those that are chosen.
    """
    if chosen_pages:
        return min(chosen_pages * layout.chosen_unit, end - layout.policy.sink_tokens)
    spared, num_layers, size = len(layout.spared_layers), layout.num_layers or 1, layout.block_size
    return (kept_blocks * num_layers * size - spared * end) // (num_layers - spared)


def check_limit(layout: PageLayout, limit: Limit, max_len: int) -> None:
    """Refuse a limit that spared layers, which keep everything, would break.

    Args:
        max_len: the longest that a request gets, in tokens.

    Raises:
        ValueError: naming the limit that would do.
    """
    spared, num_layers = len(layout.spared_layers), layout.num_layers or 1
    if not spared:
        return
    if limit.rate is not None:
        return check_rate(limit.rate, spared, num_layers)
    enough = limit
    while missing := _missing_tokens(layout, enough, max_len):
        enough = replace(enough, max_tokens=(enough.max_tokens or 0) + missing)
    if enough != limit:
        raise ValueError(
            f"{spared} of {num_layers} layers keep all their tokens (eviction.spare_layers), so {limit.max_tokens} "
            f"tokens on average do not hold up to {max_len} tokens; allow at least {enough.max_tokens}, lower "
            "--max-model-len, or spare fewer layers"
        )


def _missing_tokens(layout: PageLayout, limit: Limit, max_len: int) -> int:
    """Tokens on average that a maximum lacks at the widest cut: the last, or one with the longest unfinished tile."""
    sizes, size = CutSizes.of(layout, limit), layout.block_size
    assert limit.max_tokens is not None
    if max_len <= limit.max_tokens:
        return 0
    widest = max(
        sizes.least_blocks(point) * size + layout.policy.sink_tokens + point % size
        for point in (max_len, max_len // size * size - 1)
    )
    return max(widest - sizes.schedule.kept_at(limit, max_len), 0)


def plan_eviction(layout: PageLayout, limit: Limit, prompt_len: int, max_len: int) -> EvictionPlan | None:
    """The plan of a request, or None where it is never cut."""
    assert layout.policy.eviction is not None
    plan = EvictionPlan(layout, layout.policy.eviction, limit, prompt_len, max_len)
    return plan if plan.next_cut(0) else None


def policy_plan(layout: PageLayout, prompt_len: int, max_len: int | None = None) -> EvictionPlan | None:
    """The plan of a request under the policy's own limit; `max_len`: its length in the end, if not the prompt's."""
    eviction = layout.policy.eviction
    limit = eviction and request_limit(eviction, layout.policy, {})
    return plan_eviction(layout, limit, prompt_len, max_len or prompt_len) if limit else None


def held_blocks(layout: PageLayout, prompt_len: int) -> int:
    """Blocks that a request holds once its prompt is processed, and evicted if the policy evicts."""
    plan = policy_plan(layout, prompt_len)
    return plan.held_blocks(prompt_len) if plan else layout.blocks_for(prompt_len)


def peak_blocks(layout: PageLayout, prompt_len: int, max_len: int | None = None) -> int:
    """The most blocks that a request of this prompt holds until it has `max_len` tokens (default: the prompt's)."""
    length = max_len or prompt_len
    plan = policy_plan(layout, prompt_len, length)
    return plan.peak_blocks(length) if plan else layout.blocks_for(length)


@lru_cache(maxsize=64)
def widest_request(layout: PageLayout, max_len: int) -> int:
    """The most blocks that any request of at most `max_len` tokens holds, under the policy's own limit."""
    eviction = layout.policy.eviction
    limit = eviction and request_limit(eviction, layout.policy, {})
    return widest_under(layout, limit, max_len) if limit else layout.blocks_for(max_len)


def widest_under(layout: PageLayout, limit: Limit, max_len: int) -> int:
    """The most blocks that any request of at most `max_len` tokens holds under a limit.

    Two compression points that follow each other decide what a request holds at the second one. Whatever the prompt,
    they also follow each other at the end of one: as the last point of the prompt and the one before, or the one
    behind. Between lengths at which a tile is whole or the second point saves more, a longer prompt can only move the
    first point on, which then saves more: the request holds less. So the shortest prompts that reach such a length
    stand for all others.
    """
    sizes, tile = CutSizes.of(layout, limit), layout.tile_tokens
    if isinstance(sizes, RunSizes):
        return sizes.widest(layout, max_len)
    lengths = {1, max_len + 1, *range(tile, max_len + 1, tile)}
    lengths |= {sizes.first_saving(count, max_len) for count in range(1, sizes.saved_blocks(max_len) + 1)}
    prompts = sizes.schedule.prompts_at(limit, lengths)
    return max(_widest_around(layout, sizes, n, max_len) for n in prompts if 1 <= n <= max_len)


def _widest_around(layout: PageLayout, sizes: CutSizes, prompt_len: int, max_len: int) -> int:
    """The most blocks at the last point of a prompt, at the point behind it, and in the end."""
    schedule, limit, saved = sizes.schedule, sizes.limit, sizes.saved_blocks
    step = schedule.tokens_to_next_point(limit, prompt_len, prompt_len)
    widest = layout.blocks_for(max_len) - saved(schedule.last_point(limit, prompt_len, max_len))
    for point in (schedule.last_point(limit, prompt_len, prompt_len), step and prompt_len + step):
        if not point or point > max_len:
            continue
        before = saved(schedule.last_point(limit, prompt_len, point - 1))
        if saved(point) > before:
            widest = max(widest, layout.blocks_for(point) - before + sizes.kept_blocks(point))
    return widest
