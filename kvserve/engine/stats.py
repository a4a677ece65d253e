"""What evictions did and what requests hold, on its way from the workers to the API server.

    workers: WorkerLog --StepEvictions, summed over ranks--> scheduler: Accounting --CacheStats--> stat loggers

Seams: `KVConnectorWorkerMetadata`, which vLLM aggregates over the workers of a step, and `KVConnectorStats`, which it
hands to the stat loggers as `SchedulerStats.kv_connector_stats`. Each hop takes what is there and leaves nothing, so a
step counts once. A token of a KV head of a layer is a *head token*; sums of them add up over heads, ranks and requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

from kvserve.engine.own_requests import is_own
from kvserve.engine.request_report import request_report
from kvserve.eviction.observer import EvictionObserver, Selection

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from kvserve.engine.eviction_manager import EvictingPageManager
    from kvserve.schedules.base import Limit


@dataclass(frozen=True)
class Evicted:
    """One request was evicted.

    Attributes:
        num_tokens: its tokens so far, evicted ones included.
        evicted: head tokens that went.
        demoted: head tokens that stay in another format than the policy's own.
        kept: tokens held afterwards, sinks and unfinished tile included, [layer][kv_head].
        first_layer: index in the model of the first of them; a stage of a pipeline has some of its layers.
    """

    num_tokens: int
    evicted: int
    kept: list[list[int]]
    demoted: int = 0
    first_layer: int = 0

    def beside(self, other: Evicted) -> Evicted:
        """The same eviction with the heads of another rank: of the same layers, or of another stage's."""
        layers = {layer: list(heads) for layer, heads in enumerate(self.kept, self.first_layer)}
        for layer, heads in enumerate(other.kept, other.first_layer):
            layers.setdefault(layer, []).extend(heads)
        kept, evicted = [layers[layer] for layer in sorted(layers)], self.evicted + other.evicted
        return Evicted(self.num_tokens, evicted, kept, self.demoted + other.demoted, min(layers, default=0))

    @property
    def mean_kept(self) -> float:
        """Tokens held afterwards, averaged over layers and KV heads."""
        return sum(map(sum, self.kept)) / self._heads

    @property
    def mean_demoted(self) -> float:
        """Tokens demoted, averaged likewise."""
        return self.demoted / self._heads

    @property
    def _heads(self) -> int:
        return sum(map(len, self.kept))


@dataclass
class StepEvictions(KVConnectorWorkerMetadata):
    """The evictions of one step by request id: of one worker, or of all once they are aggregated."""

    requests: dict[str, Evicted] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepEvictions:
        """Ranks evict the same requests in the same step, each its own heads or layers.

        Where vLLM recovers from a failed step it may hand over a rank's output of an earlier step: a request that one
        side lacks stays as the other has it, and of two cuts the later one counts.
        """
        assert isinstance(other, StepEvictions)
        merged = {**other.requests, **self.requests}
        for name in self.requests.keys() & other.requests.keys():
            mine, theirs = self.requests[name], other.requests[name]
            is_same_cut = mine.num_tokens == theirs.num_tokens
            merged[name] = mine.beside(theirs) if is_same_cut else max(mine, theirs, key=lambda cut: cut.num_tokens)
        return StepEvictions(merged)


class WorkerLog(EvictionObserver):
    """Notes the evictions of the step that this worker runs.

    Attributes:
        recorder: also hears of everything; None: nobody asks which tokens stay.
        first_layer: index in the model of this worker's first layer.
    """

    def __init__(self) -> None:
        self.requests: dict[str, Evicted] = {}
        self.first_layer = 0
        self.recorder: EvictionObserver | None = None

    def selected(self, request_id: str, layer: int, selection: Selection) -> None:
        if self.recorder:
            self.recorder.selected(request_id, layer, selection)

    def evicted(
        self, request_id: str, num_tokens: int, evicted: torch.Tensor, kept: torch.Tensor, demoted: torch.Tensor
    ) -> None:
        counts = (int(evicted.sum()), kept.tolist(), int(demoted.sum()))
        self.requests[request_id] = Evicted(num_tokens, *counts, self.first_layer)
        if self.recorder:
            self.recorder.evicted(request_id, num_tokens, evicted, kept, demoted)

    def take(self) -> StepEvictions | None:
        """What was noted since the last call."""
        requests, self.requests = self.requests, {}
        return StepEvictions(requests) if requests else None


worker_log = WorkerLog()


@dataclass
class Holding:
    """Blocks of one request, or of several.

    Attributes:
        tokens: computed tokens, evicted ones included.
        blocks: what their rows hold; a block that several requests share counts for each.
        kept: blocks of kept pages.
        dense: blocks of dense tokens and of the requests' state; shared sinks count once.
        window: blocks of window layers.
        window_tokens: tokens that window layers see.
    """

    tokens: int = 0
    blocks: int = 0
    kept: int = 0
    dense: int = 0
    window: int = 0
    window_tokens: int = 0


def held_by(manager: EvictingPageManager, request_ids: Iterable[str], tokens: Iterable[int]) -> Holding:
    """What requests with so many computed tokens hold now."""
    total, layout = Holding(), manager.layout
    sinks: set[int] = set()
    first = layout.tile_row(0)
    for request_id, count in zip(request_ids, tokens, strict=True):
        row = manager.req_to_blocks.get(request_id)
        if not row:
            continue
        kept = sum(len(entry.blocks) for entry in manager.kept.get(request_id, ()))
        window = manager.window_blocks(request_id)
        total.tokens += count
        total.window_tokens += min(count, manager.window) if manager.window else 0
        total.blocks += len(row) - manager.given_back.get(request_id, 0) + kept + window
        total.kept += kept
        total.window += window
        total.dense += min(len(row), layout.private_blocks)
        sinks.update(block.block_id for block in row[first + 1 : first + 1 + layout.sink_blocks])
    total.dense += len(sinks)
    return total


@dataclass
class CacheStats(KVConnectorStats):
    """What a step, or several, did to the cache.

    `data`: evicted_head_tokens and demoted_head_tokens, ints; kept_tokens, [layer][any order] tokens held by a KV head
    after an eviction; holding, the running requests' `Holding` in the last step; users, the same without kvserve's own
    requests. All heads of all ranks, but blocks of one rank.
    """

    data: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, evictions: list[Evicted], holding: Holding, users: Holding) -> CacheStats:
        """The stats of one step; `evictions` of users' requests."""
        layers: list[list[int]] = [[] for _ in evictions[0].kept] if evictions else []
        for eviction in evictions:
            for layer, kept in zip(layers, eviction.kept, strict=True):
                layer += kept
        evicted = sum(eviction.evicted for eviction in evictions)
        held = {"holding": asdict(holding), "users": asdict(users)}
        demoted = sum(eviction.demoted for eviction in evictions)
        return cls({"evicted_head_tokens": evicted, "demoted_head_tokens": demoted, "kept_tokens": layers, **held})

    def reset(self) -> None:
        self.data = self.of([], Holding(), Holding()).data

    def is_empty(self) -> bool:
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> CacheStats:
        """Counts add up; of holdings the later one stays."""
        if self.is_empty() or other.is_empty():
            return CacheStats(self.data or other.data)
        mine, theirs = self.data["kept_tokens"], other.data["kept_tokens"]
        layers = [a + b for a, b in zip(mine, theirs, strict=True)] if mine and theirs else mine or theirs
        names = "evicted_head_tokens", "demoted_head_tokens"
        sums = {name: self.data[name] + other.data[name] for name in names}
        return CacheStats({**other.data, **sums, "kept_tokens": layers})

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's periodic log line."""
        heads = sum(map(len, self.data["kept_tokens"]))
        kept = sum(map(sum, self.data["kept_tokens"])) / heads if heads else 0.0
        return {
            "evicted head tokens": self.data["evicted_head_tokens"],
            **({"demoted head tokens": demoted} if (demoted := self.data["demoted_head_tokens"]) else {}),
            "mean tokens kept per KV head at an eviction": round(kept, 1),
            "blocks held": self.data["holding"]["blocks"],
        }


@dataclass
class _Tracked:
    request: Request
    limit: Limit | None
    last: Evicted | None = None


class Accounting:
    """The scheduler's side: evictions of this step, the last one of each request, and what requests hold.

    Args:
        block_bytes: of one block, all layers, KV heads and ranks.
    """

    def __init__(self, manager: EvictingPageManager, block_bytes: int) -> None:
        self.manager, self.block_bytes = manager, block_bytes
        self.requests: dict[str, _Tracked] = {}
        self._of_step: list[Evicted] = []

    def start(self, request: Request, limit: Limit | None) -> None:
        """A request arrived; it asks for `limit`, None: keep everything."""
        self.requests[request.request_id] = _Tracked(request, limit)

    def finish(self, request_id: str) -> dict[str, Any]:
        """The report of a request that is over and still has its blocks.

        More evictions of it may arrive, of steps that are under way.
        """
        tracked = self.requests.pop(request_id)
        request = tracked.request
        tokens_cached = max(request.num_computed_tokens - request.num_in_flight_tokens, 0)
        blocks = held_by(self.manager, [request_id], [tokens_cached]).blocks
        last = tracked.last
        if last and self.manager.cut_at(request_id, tokens_cached).point != last.num_tokens:
            last = None  # a preemption undid it: the request was computed again, or read again from the prefix cache
        return request_report(tokens_cached, blocks * self.block_bytes, tracked.limit, last)

    def add(self, evictions: StepEvictions) -> None:
        """The evictions of a step that is over, before any request that ends with it is finished."""
        self._of_step += [eviction for name, eviction in evictions.requests.items() if not is_own(name)]
        for request_id, eviction in evictions.requests.items():
            if request_id in self.requests:
                self.requests[request_id].last = eviction

    def take(self) -> CacheStats:
        """Stats of this step; the next call has none of its evictions."""
        evictions, self._of_step = self._of_step, []
        holding_ids = [name for name in self.manager.req_to_blocks if name in self.requests]
        users_ids = [name for name in holding_ids if not is_own(name)]
        holding = self._held_by(holding_ids)
        return CacheStats.of(evictions, holding, holding if users_ids == holding_ids else self._held_by(users_ids))

    def _held_by(self, request_ids: list[str]) -> Holding:
        tokens = [self.requests[name].request.num_computed_tokens for name in request_ids]
        return held_by(self.manager, request_ids, tokens)
