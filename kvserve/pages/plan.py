"""How many blocks a request holds before and after its prompt is evicted.

The scheduler schedules ahead of the worker, so everything here is arithmetic on lengths: data decides which tokens
stay and in which head, never how many blocks. A request's row is

    [state][tail][tile block 0][sinks][tile block 1]...[kept blocks][further tile blocks]...

The kept blocks are appended by the step that completes the prompt; the tile blocks they replace are given back as soon
as that step is processed, and leave their places in the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from kvserve.pages.layout import PageLayout
from kvserve.policies.limits import request_limit
from kvserve.schedules.base import Limit


@dataclass(frozen=True)
class EvictionPlan:
    """What happens to one prompt.

    Attributes:
        prompt_len: its tokens; the step that computes the last of them evicts.
        end: tokens [sinks, end) are then kept in part, in kept blocks; a multiple of the block size.
        kept_row: row index of the first kept block.
        kept_blocks: how many there are; each holds a cell of every layer and KV head.
        window: prompt tokens whose queries the scorer needs in that step.
    """

    prompt_len: int
    end: int
    kept_row: int
    kept_blocks: int
    window: int

    @property
    def window_start(self) -> int:
        """First prompt token of the window: the step that evicts computes it and all after it."""
        return max(self.prompt_len - self.window, 0)

    def row_blocks(self, layout: PageLayout, num_tokens: int) -> int:
        """Length of the row of a request with `num_tokens` computed tokens."""
        return layout.blocks_for(num_tokens) + (self.kept_blocks if num_tokens >= self.prompt_len else 0)

    def replaced(self, layout: PageLayout) -> tuple[range, range]:
        """Row indices of the tile blocks that the kept blocks replace: before and behind the sinks."""
        first, behind, count = layout.tile_row(0), layout.tile_row(1), self.end // layout.block_size
        return range(first, first + min(count, 1)), range(behind, behind + max(count - 1, 0))

    def reusable_tokens(self, block_size: int) -> int:
        """Prompt tokens whose tile blocks may serve other prompts: a hit must leave the window's queries to compute."""
        return self.window_start // block_size * block_size

    def clip_step(self, num_computed_tokens: int, num_new_tokens: int) -> int:
        """New tokens of a step that ends at the prompt's end and leaves the window's rows to the last one.

        0 where the window is all that is left and does not fit: it has to wait for a step with more room.
        """
        left = self.prompt_len - num_computed_tokens
        if left <= 0:
            return num_new_tokens
        if num_new_tokens >= left:
            return left
        return min(num_new_tokens, max(self.window_start - num_computed_tokens, 0))


def plan_eviction(layout: PageLayout, limit: Limit, prompt_len: int, window: int) -> EvictionPlan | None:
    """The plan of a prompt, or None where keeping everything takes no more blocks.

    The limit counts every token that a KV head keeps on average: sinks, kept tokens and the unfinished tile.
    """
    end = prompt_len // layout.block_size * layout.block_size
    wanted = limit.target(prompt_len) - layout.policy.sink_tokens - (prompt_len - end)
    kept_blocks = max(ceil(wanted / layout.block_size), 1)
    if kept_blocks >= end // layout.block_size:
        return None
    return EvictionPlan(prompt_len, end, layout.blocks_for(prompt_len), kept_blocks, window)


def policy_plan(layout: PageLayout, prompt_len: int, window: int = 1) -> EvictionPlan | None:
    """The plan of a prompt under the policy's own limit."""
    eviction = layout.policy.eviction
    limit = eviction and request_limit(eviction, layout.policy, {})
    return plan_eviction(layout, limit, prompt_len, window) if limit else None


def held_blocks(layout: PageLayout, prompt_len: int) -> int:
    """Blocks that a request holds once its prompt is processed, and evicted if the policy evicts."""
    plan = policy_plan(layout, prompt_len)
    if plan is None:
        return layout.blocks_for(prompt_len)
    return plan.row_blocks(layout, prompt_len) - plan.end // layout.block_size
