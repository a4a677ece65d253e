"""Block manager of a group whose prompts are evicted: appends the kept blocks and gives the replaced ones back.

Seams: as `kvserve.engine.manager`, and `SingleTypeKVCacheManager.remove_skipped_blocks`, which vLLM calls at every step
of a request with the number of tokens whose steps are over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from kvserve.engine.manager import PageManager
from kvserve.pages.plan import EvictionPlan

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.request import Request

logger = init_logger("vllm.kvserve")


class EvictingPageManager(PageManager):
    """PageManager for requests that have an eviction plan; a request without one keeps everything."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plans: dict[str, EvictionPlan] = {}

    @classmethod
    def of(cls, kv_cache_manager: KVCacheManager) -> EvictingPageManager:
        """The one manager behind vLLM's facade: a policy that evicts has a single group."""
        (manager,) = kv_cache_manager.coordinator.single_type_managers
        assert isinstance(manager, cls)
        return manager

    def row_blocks(self, request_id: str, num_tokens: int) -> int:
        plan = self.plans.get(request_id)
        return plan.row_blocks(self.layout, num_tokens) if plan else self.layout.blocks_for(num_tokens)

    def state_block(self, request_id: str) -> int:
        """Block id that identifies the request's row in the worker."""
        return self.req_to_blocks[request_id][0].block_id

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:  # fmt: skip
        """As PageManager; a hit that leaves no window of queries to compute leaves nothing to score by."""
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )
        plan = self.plans.get(request_id)
        if plan and num_local_computed_tokens > plan.window_start:
            logger.info(
                "request %s: a prefix hit covers the queries that its tokens are scored by; kept whole", request_id
            )
            del self.plans[request_id]

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Enter tile blocks of the prompt only: what follows was computed from an evicted cache."""
        plan = self.plans.get(request.request_id)
        if plan:
            num_tokens = min(num_tokens, plan.reusable_tokens(self.block_size))
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Give the replaced tile blocks back once the step that evicted is over."""
        plan = self.plans.get(request_id)
        if plan is None or processed_computed_tokens < plan.prompt_len or request_id not in self.req_to_blocks:
            return
        for indices in plan.replaced(self.layout):
            self._remove_blocks_in_range(request_id, indices.start, indices.stop)
