"""The block manager against a simulated worker: nothing leaks, counts are exact, shared blocks hold the right tokens.

The simulated worker writes into each block what the real one would (which tokens of which prefix), so a wrong row, a
stale hit or a lost sink shows as wrong content. No model and no tensor is involved.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash, maybe_convert_block_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from kvserve.codecs.affine import Affine
from kvserve.engine.sinks import SinkCache
from kvserve.engine.spec import EvictingPageSpec, PageSpec
from kvserve.pages.layout import PageLayout
from kvserve.policies.base import Eviction, Policy

init_none_hash(sha256)


def make_layout(sink_tokens: int, block_size: int = 64, eviction: Eviction | None = None) -> PageLayout:
    policy = Policy(
        name="test", summary="", tile_tokens=64, sink_tokens=sink_tokens,
        key=Affine(bits=2, group_size=64), value=Affine(bits=2), eviction=eviction,
    )  # fmt: skip
    return PageLayout.build(policy, 64, block_size, torch.float32, num_layers=12)


def make_manager(layout: PageLayout, num_blocks: int) -> KVCacheManager:
    dense = FullAttentionSpec(block_size=layout.block_size, num_kv_heads=1, head_size=64, dtype=torch.float32)
    spec = EvictingPageSpec if layout.state_blocks else PageSpec
    group = KVCacheGroupSpec(["layer"], spec.from_attention(dense, layout))
    return KVCacheManager(
        KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[group]),
        max_model_len=4096,
        scheduler_block_size=layout.block_size,
        hash_block_size=layout.block_size,
        enable_kv_cache_events=True,
    )


@dataclass
class Simulation:
    """A scheduler that admits, chunks, decodes, preempts and aborts at random, and the worker behind it."""

    layout: PageLayout
    num_blocks: int
    seed: int
    contents: dict[int, object] = field(default_factory=dict)
    running: list[Request] = field(default_factory=list)
    waiting: list[Request] = field(default_factory=list)
    num_finished: int = 0
    num_preempted: int = 0
    num_hit_tokens: int = 0
    stored: Counter = field(default_factory=Counter)  # hashes that listeners of KV events hold to be cached
    num_removed: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.manager = make_manager(self.layout, self.num_blocks)
        self.pool = self.manager.block_pool
        self.hasher = get_request_block_hasher(self.layout.block_size, sha256)

    def new_request(self, name: int) -> Request:
        shared = self.random.choice([0, 0, 64, 70, 128, 300])
        length = shared + self.random.choice([1, 5, 63, 64, 65, 130, 400])
        family = self.random.randrange(3)
        tokens = [family * 1000 + i for i in range(shared)] + [
            self.random.randrange(10**6) for _ in range(length - shared)
        ]
        params = SamplingParams(max_tokens=self.random.choice([1, 3, 70, 200]), temperature=0.0)
        params.update_from_generation_config({}, eos_token_id=0)
        return Request(str(name), tokens, params, None, block_hasher=self.hasher)

    def row(self, request: Request) -> list[int]:
        return self.manager.get_block_ids(request.request_id)[0]

    def chunk(self, request: Request, num_computed_tokens: int) -> int:
        """New tokens of the request's next step."""
        return min(request.num_tokens - num_computed_tokens, self.random.choice([32, 100, 512]))

    def step(self) -> None:
        for request in list(self.running):
            if request in self.running:
                self.advance(request)
        while self.waiting and len(self.running) < 6 and self.admit(self.waiting[0]):
            self.waiting.pop(0)
        if self.running and self.random.random() < 0.03:
            self.finish(self.random.choice(self.running), RequestStatus.FINISHED_ABORTED)
        self.check()

    def admit(self, request: Request) -> bool:
        hits, num_hit = self.manager.get_computed_blocks(request)[:2]
        chunk = self.chunk(request, num_hit)
        if chunk == 0:
            return False
        slots = self.manager.allocate_slots(
            request, chunk, num_new_computed_tokens=num_hit, new_computed_blocks=hits, full_sequence_must_fit=True
        )
        if slots is None:
            return False
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = num_hit
        self.num_hit_tokens += num_hit
        self.running.append(request)
        self.work(request, chunk)
        return True

    def advance(self, request: Request) -> None:
        chunk = self.chunk(request, request.num_computed_tokens)
        if chunk == 0:
            return
        while self.manager.allocate_slots(request, chunk) is None:
            victim = self.running.pop()
            self.manager.free(victim)
            victim.status, victim.num_computed_tokens = RequestStatus.PREEMPTED, 0
            self.waiting.insert(0, victim)
            self.num_preempted += 1
            if victim is request:
                return
        self.work(request, chunk)

    def work(self, request: Request, chunk: int) -> None:
        """Write what the worker writes in a step, after checking what it would read."""
        start, end = request.num_computed_tokens, request.num_computed_tokens + chunk
        row, layout, tokens = self.row(request), self.layout, request.all_token_ids
        assert len(row) == layout.blocks_for(end), "the row is exactly what the accounting says"
        tail, tile = layout.private_blocks, layout.tile_tokens
        for index in range(self.first_token(request) // tile, start // tile):
            assert self.contents[row[self.tile_position(index)]] == self.tile(request, self.tile_end(index, start))
        if start >= tile:
            for block in row[tail + 1 : tail + 1 + layout.sink_blocks]:
                assert self.contents[block] == ("sinks", tuple(tokens[:tile]))
        if start % tile:
            for block in row[:tail]:
                assert self.contents[block] == ("tail", request.request_id)
        for index in range(start // tile, end // tile):
            self.contents[row[self.tile_position(index)]] = self.tile(request, (index + 1) * tile)
        if start < tile <= end:
            for block in row[tail + 1 : tail + 1 + layout.sink_blocks]:
                self.contents[block] = ("sinks", tuple(tokens[:tile]))
        for block in row[:tail]:
            self.contents[block] = ("tail", request.request_id)
        self.finish_step(request, end)

    def first_token(self, request: Request) -> int:
        """First token whose tile is still there."""
        return 0

    def tile(self, request: Request, end: int) -> object:
        """What the tile of the tokens before `end` holds: it depends on all of them."""
        return tuple(request.all_token_ids[:end])

    def held(self, request: Request) -> list[int]:
        """Ids of its blocks."""
        return [block for block in self.row(request) if block != self.pool.null_block.block_id]

    def held_beside(self, request: Request) -> list[int]:
        """Ids of its blocks in other groups."""
        return []

    def finish_step(self, request: Request, end: int) -> None:
        request.num_computed_tokens = end
        if end == request.num_tokens:
            request.append_output_token_ids(self.random.randrange(1, 10**6))
            if request.num_output_tokens >= request.max_tokens:
                self.finish(request, RequestStatus.FINISHED_LENGTH_CAPPED)

    def tile_position(self, index: int) -> int:
        block = index // self.layout.tiles_per_block
        return self.layout.private_blocks + block + (self.layout.sink_blocks if block else 0)

    def tile_end(self, index: int, num_tokens: int) -> int:
        """Tokens that the last write to the block of tile `index` covered."""
        block_end = (index // self.layout.tiles_per_block + 1) * self.layout.block_size
        return min(block_end, num_tokens // self.layout.tile_tokens * self.layout.tile_tokens)

    def finish(self, request: Request, status: RequestStatus) -> None:
        request.status = status
        self.running.remove(request)
        self.manager.free(request)
        self.num_finished += 1

    def check(self) -> None:
        held = {block for request in self.running for block in self.held(request) + self.held_beside(request)}
        assert self.pool.get_num_free_blocks() + len(held) + 1 == self.num_blocks, "free + held + null = total"
        owners = [block for request in self.running for block in self.row(request)[: self.layout.private_blocks]]
        assert len(owners) == len(set(owners)), "a tail belongs to one request"
        self.hear(self.pool.take_events())

    def hear(self, events: list) -> None:
        """What a listener makes of KV events: tile blocks, removed only after they were stored."""
        for event in events:
            if isinstance(event, BlockStored):
                assert event.block_size == self.layout.block_size
                assert len(event.token_ids) == len(event.block_hashes) * event.block_size
                self.stored.update(event.block_hashes)
            elif isinstance(event, BlockRemoved):
                self.num_removed += len(event.block_hashes)
                self.stored.subtract(event.block_hashes)
                assert all(self.stored[block_hash] >= 0 for block_hash in event.block_hashes), "never stored"

    def run(self, num_requests: int) -> None:
        for name in range(num_requests):
            self.waiting.append(self.new_request(name))
            self.step()
        while self.running or self.waiting:
            self.step()
        assert self.num_finished == num_requests
        assert self.pool.get_num_free_blocks() == self.num_blocks - 1
        assert all(block.ref_cnt == 0 for block in self.pool.blocks if not block.is_null)


@given(seed=st.integers(0, 2**32), sink_tokens=st.sampled_from([0, 4, 16, 32]), num_blocks=st.integers(30, 90))
@settings(max_examples=25, deadline=None)
def test_free_and_held_blocks_always_add_up(seed: int, sink_tokens: int, num_blocks: int) -> None:
    Simulation(make_layout(sink_tokens), num_blocks, seed).run(25)


@pytest.mark.parametrize(("block_size", "num_blocks"), [(64, 60), (128, 26)])
def test_nothing_leaks_over_5000_requests(block_size: int, num_blocks: int) -> None:
    simulation = Simulation(make_layout(16, block_size), num_blocks, seed=7)
    simulation.run(2500)
    assert simulation.num_preempted > 50
    assert simulation.num_hit_tokens > 10_000
    assert simulation.num_removed > 1000


def test_sinks_make_no_kv_events_and_their_memory_is_bounded_by_the_pool() -> None:
    """Listeners hear of tile blocks alone: every hash that is stored or removed is one of a request's own."""
    simulation, hashes = Simulation(make_layout(16), 20, seed=1), set()
    for name in range(40):
        tokens = [name * 1000 + i for i in range(200)]
        request = Request(str(name), tokens, SamplingParams(max_tokens=1), None, block_hasher=simulation.hasher)
        hashes.update(maybe_convert_block_hash(block_hash) for block_hash in request.block_hashes)
        assert simulation.admit(request)
        while request in simulation.running:
            simulation.advance(request)
        simulation.check()
    assert simulation.num_removed > 60 and set(simulation.stored) <= hashes
    cache = SinkCache.of(simulation.pool)
    assert sum(map(len, cache._blocks.values())) == len(cache._hashes) <= 20
    assert simulation.manager.reset_prefix_cache()
    assert simulation.manager.get_computed_blocks(request)[1] == 0


def test_a_prefix_hit_needs_the_sinks_of_its_first_tile() -> None:
    simulation = Simulation(make_layout(16), 40, seed=1)
    first = Request("a", list(range(200)), SamplingParams(max_tokens=1), None, block_hasher=simulation.hasher)
    assert simulation.admit(first)
    while first in simulation.running:
        simulation.advance(first)
    again = Request("b", list(range(200)), SamplingParams(max_tokens=1), None, block_hasher=simulation.hasher)
    _, num_hit = simulation.manager.get_computed_blocks(again)[:2]
    assert num_hit == 192
    pool = simulation.pool
    sink = next(block for block in pool.blocks if block.block_hash and b"kvserve-sink" in block.block_hash)
    pool.evict_blocks({sink.block_id})
    assert simulation.manager.get_computed_blocks(again)[1] == 0


def test_blocks_of_tokens_that_the_request_has_not_hashed_yet_wait() -> None:
    """With lookahead vLLM may name more tokens than there are hashes for."""
    manager = make_manager(make_layout(16), 40)
    (pages,) = manager.coordinator.single_type_managers
    hasher = get_request_block_hasher(64, sha256)
    request = Request("a", list(range(200)), SamplingParams(max_tokens=99), None, block_hasher=hasher)
    assert manager.allocate_slots(request, 300) is not None
    pages.cache_blocks(request, 300, replay_boundaries=())
    assert pages.num_cached_block["a"] == 3
    request.append_output_token_ids(list(range(100)))
    pages.cache_blocks(request, 300, replay_boundaries=())
    assert pages.num_cached_block["a"] == 4


def test_what_a_draft_model_writes_ahead_takes_no_pages() -> None:
    layout = make_layout(16)
    manager = make_manager(layout, 40)
    request = Request("a", list(range(200)), SamplingParams(max_tokens=99), None)
    blocks = manager.allocate_slots(request, 191, num_lookahead_tokens=100)
    assert blocks is not None and len(blocks.blocks[0]) == layout.blocks_for(191) < layout.blocks_for(192)


def test_capacity_in_tokens_is_what_really_fits() -> None:
    layout = make_layout(16)
    num_blocks = 10 * layout.blocks_for(4096) + 1
    manager = make_manager(layout, num_blocks)
    hasher = get_request_block_hasher(layout.block_size, sha256)
    fitted = 0
    for name in range(20):
        tokens = [name * 10_000 + i for i in range(4096)]
        request = Request(str(name), tokens, SamplingParams(max_tokens=1), None, block_hasher=hasher)
        fitted += manager.allocate_slots(request, 4096) is not None
    assert fitted == 10
