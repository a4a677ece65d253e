"""Block manager of a group whose requests are evicted: holds their kept blocks and gives the replaced ones back.

Seams: as `kvserve.engine.manager`, and `SingleTypeKVCacheManager.remove_skipped_blocks`, which vLLM calls at every step
of a request with the number of tokens whose steps are over. Where window layers have groups beside it
(`KVCacheCoordinator.single_type_managers`), those are vLLM's, and `KVCacheCoordinator.cache_blocks` is the one place
through which all groups enter blocks into the prefix cache.

What goes wrong here with the plan of one request ends that request (kvserve.engine.failures).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from kvserve.accounting.plan import NO_CUT, Cut, EvictionPlan
from kvserve.engine.failures import Failures
from kvserve.engine.log import logger
from kvserve.engine.manager import PageManager
from kvserve.pages.kept import NOT_KEPT, Kept

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.request import Request


class KeptBlocks(NamedTuple):
    """The kept blocks of one cut."""

    cut: Cut
    blocks: list[KVCacheBlock]


class EvictingPageManager(PageManager):
    """PageManager for requests that have an eviction plan; a request without one keeps everything.

    Attributes:
        plans: by request id.
        kept: by request id, the kept blocks of its cuts that are not given back yet, the newest last. They are no part
            of the row: the worker learns of them through the connector.
        given_back: by request id, how many tile blocks have left its row.
        failures: requests that cannot go on.
        asked_for: the request whose need of blocks was asked for last.
        windows: the managers of the window layers' groups, or of a draft model's, which take blocks of the same pool.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plans: dict[str, EvictionPlan] = {}
        self.kept: dict[str, list[KeptBlocks]] = {}
        self.given_back: dict[str, int] = {}
        self.failures = Failures()
        self.asked_for: str | None = None
        self.windows: tuple[SingleTypeKVCacheManager, ...] = ()

    @classmethod
    def of(cls, kv_cache_manager: KVCacheManager) -> EvictingPageManager:
        """The one among the managers behind vLLM's facade: layers that are evicted are a single group."""
        managers = kv_cache_manager.coordinator.single_type_managers
        (manager,) = (one for one in managers if isinstance(one, cls))
        manager.windows = tuple(one for one in managers if one is not manager)
        return manager

    @property
    def window(self) -> int:
        """Tokens that window layers see; 0: there are none."""
        specs = [one.kv_cache_spec for one in self.windows]
        return max((spec.sliding_window for spec in specs if isinstance(spec, SlidingWindowSpec)), default=0)

    def usable_blocks(self, num_tokens: int) -> int:
        """Blocks that a request of so many tokens can get here when it is alone.

        One of the pool's is vLLM's null block; window layers take theirs as vLLM admits requests, a draft model's
        layers with the tokens that are drafted.
        """
        tokens = num_tokens + self.layout.draft_tokens
        most = [(-(-tokens // one.block_size), one.max_admission_blocks_per_request) for one in self.windows]
        return self.block_pool.num_gpu_blocks - 1 - sum(min(row, cap or row) for row, cap in most)

    def window_blocks(self, request_id: str) -> int:
        """Blocks that a request holds in the groups of `windows`; what lies outside of a window is null."""
        rows = [one.req_to_blocks.get(request_id, []) for one in self.windows]
        return sum(len(row) - bisect_left(row, True, key=lambda block: not block.is_null) for row in rows)

    def state_block(self, request_id: str) -> int:
        """Block id that identifies the request's row in the worker."""
        return self.req_to_blocks[request_id][0].block_id

    def kept_at(self, request_id: str, num_tokens: int) -> Kept:
        """What a request keeps with `num_tokens` computed tokens."""
        entry = self._entry_at(request_id, num_tokens)
        return Kept(entry.cut.end, tuple(block.block_id for block in entry.blocks)) if entry else NOT_KEPT

    def cut_at(self, request_id: str, num_tokens: int) -> Cut:
        """The cut that a request with `num_tokens` computed tokens is left by; NO_CUT: it keeps everything.

        Unlike its plan this knows what happened: a preemption takes kept blocks away, and a prefix hit brings none.
        """
        entry = self._entry_at(request_id, num_tokens)
        return entry.cut if entry else NO_CUT

    def _entry_at(self, request_id: str, num_tokens: int) -> KeptBlocks | None:
        entries = [entry for entry in self.kept.get(request_id, ()) if entry.cut.point <= num_tokens]
        return entries[-1] if entries else None

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:  # fmt: skip
        """As PageManager; a hit that leaves no window of queries to compute leaves nothing to score by."""
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )
        with self.failures.guard(request_id):
            self._leave_out_covered(request_id, num_local_computed_tokens)

    def _leave_out_covered(self, request_id: str, num_local_computed_tokens: int) -> None:
        """Leave out the cuts whose windows the prefix hit covers."""
        plan = self.plans.get(request_id)
        first = plan.next_cut(0) if plan else None
        if plan is None or first is None or num_local_computed_tokens <= plan.window_start(first):
            return
        logger.info(
            "request %s: a prefix hit covers the queries that its tokens are scored by; not cut at %d tokens",
            request_id, first.point,
        )  # fmt: skip
        plan = self.plans[request_id] = replace(plan, first_window=num_local_computed_tokens)
        if plan.next_cut(0) is None:
            del self.plans[request_id]

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int, num_local_computed_tokens: int, num_tokens_main_model: int,
        apply_admission_cap: bool = False, **kwargs: Any,
    ) -> int:  # fmt: skip
        """As PageManager, with kept blocks; for admission, what the request needs at its widest on the way."""
        self.asked_for = request_id
        needed = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, num_local_computed_tokens,
            num_tokens_main_model, **kwargs,
        )  # fmt: skip
        plan = self.plans.get(request_id)
        if plan is None:
            return needed
        with self.failures.guard(request_id):
            if apply_admission_cap:
                row = self.layout.blocks_for(num_tokens_main_model)
                return needed + plan.peak_blocks(num_tokens_main_model) - row
            return needed + self._missing_kept(request_id, num_tokens_main_model).kept_blocks
        return self.block_pool.num_gpu_blocks  # more than there ever are: it gets none

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """As PageManager; where the step reaches a cut, take its kept blocks too. Returns those of the row."""
        new_blocks = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        with self.failures.guard(request_id):
            cut = self._missing_kept(request_id, num_tokens_main_model)
            if cut.kept_blocks:
                self.kept.setdefault(request_id, []).append(KeptBlocks(cut, self._take(cut.kept_blocks)))
        return new_blocks

    def _missing_kept(self, request_id: str, num_tokens: int) -> Cut:
        """The cut at `num_tokens` if its kept blocks are not taken yet, else NO_CUT."""
        plan = self.plans.get(request_id)
        cut = plan.last_cut(num_tokens) if plan else NO_CUT
        entries = self.kept.get(request_id)
        return NO_CUT if entries and entries[-1].cut == cut else cut

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Enter tile blocks of the prompt only: what follows was computed from an evicted cache."""
        super().cache_blocks(request, self.reusable_tokens(request.request_id, num_tokens), *args, **kwargs)

    def reusable_tokens(self, request_id: str, num_tokens: int) -> int:
        """Of a request's first tokens, those whose blocks may serve other requests."""
        plan = self.plans.get(request_id)
        if plan is None:
            return num_tokens
        with self.failures.guard(request_id):
            return min(num_tokens, plan.reusable_tokens())
        return 0

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Give back what a cut replaces once its step is over: tile blocks, and the kept blocks of the cut before."""
        with self.failures.guard(request_id):
            self._give_back(request_id, processed_computed_tokens)

    def _give_back(self, request_id: str, processed_computed_tokens: int) -> None:
        plan = self.plans.get(request_id)
        if plan is None or request_id not in self.req_to_blocks:
            return
        layout, entries = self.layout, self.kept.get(request_id, [])
        tile_blocks = plan.last_cut(processed_computed_tokens).end // layout.block_size
        if tile_blocks > self.given_back.get(request_id, 0):
            self.given_back[request_id] = tile_blocks
            self._remove_blocks_in_range(request_id, layout.tile_row(0), layout.tile_row(0) + 1)
            self._remove_blocks_in_range(request_id, layout.tile_row(1), layout.tile_row(tile_blocks))
        while len(entries) > 1 and entries[1].cut.point <= processed_computed_tokens:
            self.block_pool.free_blocks(entries.pop(0).blocks)

    def waits_for_own(self, request_id: str, num_computed_tokens: int, num_in_flight_tokens: int) -> bool:
        """Whether steps of the request that are under way will give back some of its blocks."""
        plan = self.plans.get(request_id)
        if plan is None or not num_in_flight_tokens:
            return False
        return plan.last_cut(num_computed_tokens) != plan.last_cut(num_computed_tokens - num_in_flight_tokens)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """As PageManager, with the kept blocks."""
        row = super().pop_blocks_for_free(request_id)
        self.given_back.pop(request_id, None)
        return row + [block for entry in self.kept.pop(request_id, []) for block in entry.blocks]


def share_prompts_only(kv_cache_manager: KVCacheManager) -> None:
    """Let the other groups, too, enter no block that was computed from an evicted cache into the prefix cache.

    Those are window layers' or a draft model's. Their blocks have the hash of the same tokens computed from a whole
    cache, and would serve requests beside those. Of a window vLLM enters the blocks before the token where an equal
    prompt could go on; here that is where it will.
    """
    coordinator, manager = kv_cache_manager.coordinator, EvictingPageManager.of(kv_cache_manager)
    enter = coordinator.cache_blocks

    def cache_blocks(request: Request, num_computed_tokens: int) -> None:
        if request.request_id not in manager.plans:
            return enter(request, num_computed_tokens)
        reusable = manager.reusable_tokens(request.request_id, request.num_prompt_tokens)
        for group, one in enumerate(coordinator.single_type_managers):
            if one.enable_caching:
                tokens = coordinator.get_num_cacheable_tokens(min(num_computed_tokens, reusable), group)
                interval = coordinator.retention_interval
                one.cache_blocks(request, tokens, retention_interval=interval, replay_boundaries=(reusable,))

    if manager.windows:
        coordinator.cache_blocks = cache_blocks  # type: ignore[method-assign]
