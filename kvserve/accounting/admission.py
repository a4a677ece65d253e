"""Whether a pool can ever hold a request.

A request that waits for more blocks than there are waits for ever, and everybody behind it. How many it needs at its
widest follows from its limit, its prompt and how far it may grow, so it is known when the request arrives.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

from kvserve.accounting.plan import CutSizes, EvictionPlan, plan_eviction
from kvserve.pages.layout import PageLayout
from kvserve.schedules.base import Limit


@dataclass
class Admission:
    """What one request may come to hold.

    Attributes:
        limit: None: it keeps everything.
        max_tokens: tokens that it may generate; fewer where max_len comes first.
        max_len: the longest that a sequence gets, prompt included.
    """

    layout: PageLayout
    limit: Limit | None
    prompt_len: int
    max_tokens: int
    max_len: int

    @cached_property
    def plan(self) -> EvictionPlan | None:
        """Its cuts; None where there are none."""
        return plan_eviction(self.layout, self.limit, self.prompt_len, self.max_len) if self.limit else None

    def cached_tokens(self, max_tokens: int) -> int:
        """Tokens that are cached in the end, drafts of the last step included: the last one generated never is."""
        drafts = self.layout.draft_tokens
        return max(min(self.prompt_len + max_tokens + drafts, self.max_len) - 1, self.prompt_len)

    def peak_blocks(self, max_tokens: int) -> int:
        """The most blocks that it holds until it has generated so many tokens."""
        length = self.cached_tokens(max_tokens)
        return self.plan.peak_blocks(length) if self.plan else self.layout.blocks_for(length)

    def fits(self, num_blocks: int) -> bool:
        """Whether a pool of so many blocks can hold it; without a look at the plan where that is plain."""
        row = self.layout.blocks_for(self.cached_tokens(self.max_tokens))
        return 2 * row <= num_blocks or self.peak_blocks(self.max_tokens) <= num_blocks

    def fits_uncut(self, num_blocks: int) -> bool:
        """Whether it also fits if a prefix hit leaves out some of its cuts."""
        return self.plan is None or self.plan.uncut_blocks(self.cached_tokens(self.max_tokens)) <= num_blocks

    def refusal(self, num_blocks: int, own_limit: str = "") -> str:
        """What to tell the client of a request that does not fit.

        Args:
            own_limit: the argument by which the request changed the policy's limit, if it did.
        """
        ways = []
        if fitting := self.most_tokens(num_blocks):
            ways.append(f"set max_tokens to at most {fitting}")
        else:
            ways.append("shorten the prompt")
        if own_limit:
            ways.append(f"leave out {own_limit}: under the policy's own limit every request fits")
        held = f"keeping {_kept(self.limit)}" if self.limit else "keeping all its tokens"
        more = self.cached_tokens(self.max_tokens) - self.prompt_len + 1
        return (
            f"the KV pool of {num_blocks} blocks can never hold this request: a prompt of {self.prompt_len} tokens and "
            f"up to {more} more need "
            f"{self.peak_blocks(self.max_tokens)} blocks at once, {held}; {', or '.join(ways)}"
        )

    def most_tokens(self, num_blocks: int) -> int:
        """The most tokens that it could generate; 0 where not even the prompt fits."""
        return bisect_right(range(1, self.max_tokens + 1), num_blocks, key=self.peak_blocks)


def always_fits(layout: PageLayout, limit: Limit | None, max_len: int, num_blocks: int) -> bool:
    """Whether a pool plainly holds any request of at most `max_len` tokens under a limit."""
    boundary = max_len // layout.block_size * layout.block_size
    kept = CutSizes.of(layout, limit).kept_blocks(boundary) if limit else 0  # no cut keeps more
    return layout.blocks_for(max_len) + kept <= num_blocks


def _kept(limit: Limit) -> str:
    return f"one of {limit.rate:g} tokens" if limit.rate else f"{limit.max_tokens} tokens"
