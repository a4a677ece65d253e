"""How many requests fit into equal KV bytes, held by vLLM's own block manager."""

from __future__ import annotations

from typing import Any

from kvserve.measuring.results import Row, SuiteResult, spread
from kvserve.measuring.shape import ModelShape
from kvserve.policies.loading import load_policy

POOL_BYTES = 2**35  # hundreds of dense requests, so that rounding to whole ones does not matter
RATIO_TARGETS = {("kivi-2bit", "16-bit"): 5.0, ("kivi-2bit", "fp32"): 10.0}


class CapacityHost:
    """Builds block managers and fills them; lives in a child process, since it imports vLLM."""

    def __init__(self, shape: ModelShape, dtype: str) -> None:
        import torch

        self.shape, self.dtype = shape, getattr(torch, dtype)

    def dense(self, block_size: int, dtype: str, num_tokens: int) -> dict[str, int]:
        """Requests held by vLLM's own dense cache."""
        import torch
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        shape = self.shape
        spec = FullAttentionSpec(
            block_size=block_size, num_kv_heads=shape.num_kv_heads, head_size=shape.head_dim,
            dtype=getattr(torch, dtype),
        )  # fmt: skip
        return self._fill(spec, num_tokens)

    def policy(self, name: str, num_tokens: int) -> dict[str, int]:
        """Requests held under a kvserve policy, and what its page arithmetic says."""
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        from kvserve.accounting.plan import held_blocks, peak_blocks, policy_plan
        from kvserve.engine.spec import EvictingPageSpec, PageSpec
        from kvserve.pages.layout import PageLayout

        policy, shape = load_policy(name), self.shape
        layout = PageLayout.build(
            policy, shape.head_dim, policy.tile_tokens, self.dtype, query_group=shape.query_group,
            num_layers=shape.num_layers,
        )  # fmt: skip
        spec = FullAttentionSpec(
            block_size=layout.block_size, num_kv_heads=shape.num_kv_heads, head_size=shape.head_dim, dtype=self.dtype
        )
        if layout.has_pages:
            spec = (EvictingPageSpec if layout.state_blocks else PageSpec).from_attention(spec, layout)
        plan = policy_plan(layout, num_tokens)
        found = self._fill(spec, num_tokens, plan)
        # The last request, too, is held whole before it is evicted.
        peak = peak_blocks(layout, num_tokens)
        held = held_blocks(layout, num_tokens)
        return {**found, "expected": (found["num_blocks"] - 1 - peak) // held + 1}

    def _fill(self, spec: Any, num_tokens: int, plan: Any = None) -> dict[str, int]:
        """Allocate requests of `num_tokens` distinct tokens, each evicted by `plan`, until one is refused."""
        from vllm import SamplingParams
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.request import Request

        num_blocks = POOL_BYTES // (spec.page_size_bytes * self.shape.num_layers)
        manager = KVCacheManager(
            KVCacheConfig(num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]),
            max_model_len=num_tokens,
            scheduler_block_size=spec.block_size,
            hash_block_size=spec.block_size,
            enable_caching=False,
        )
        (pages,) = manager.coordinator.single_type_managers
        held = 0
        params = SamplingParams(max_tokens=1)
        while True:
            request = Request(str(held), [0] * num_tokens, params, None)
            if plan:
                pages.plans[request.request_id] = plan
            if manager.allocate_slots(request, num_tokens) is None:
                break
            held += 1
            pages.remove_skipped_blocks(request.request_id, num_tokens, num_tokens)
        return {"held": held, "num_blocks": num_blocks, "block_bytes": spec.page_size_bytes * self.shape.num_layers}


def run(host: Any, policies: list[str], num_tokens: int) -> SuiteResult:
    """Compare every policy with a 16-bit cache and with stock's fp32 cache.

    Args:
        host: the CapacityHost's Child.
        num_tokens: context of each request.
    """
    raw: dict[str, Any] = {"pool_bytes": POOL_BYTES, "context_tokens": num_tokens}
    raw["16-bit"] = host.call("dense", block_size=16, dtype="float16", num_tokens=num_tokens)
    raw["fp32"] = host.call("dense", block_size=128, dtype="float32", num_tokens=num_tokens)
    rows = []
    for name in policies:
        found = raw[name] = host.call("policy", name=name, num_tokens=num_tokens)
        if found["held"] != found["expected"]:
            raise RuntimeError(f"{name}: the block manager held {found['held']} requests, not {found['expected']}")
        for reference in ("16-bit", "fp32"):
            ratio = found["held"] / raw[reference]["held"]
            metric = f"requests of {num_tokens:,} tokens in equal bytes, vs {reference}"
            rows.append(Row("capacity", name, metric, "x", spread([ratio]), RATIO_TARGETS.get((name, reference))))
    return SuiteResult(rows, raw)
