"""What operators see of evictions: every one counts once, and what requests hold is what their rows hold."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import SimpleNamespace

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from kvserve.engine.metrics import ENGINE_LABELS
from kvserve.engine.own_requests import own_request_id
from kvserve.engine.report import EngineReport
from kvserve.engine.request_report import request_report
from kvserve.engine.stats import Accounting, CacheStats, Evicted, Holding, StepEvictions, WorkerLog, held_by
from kvserve.schedules.base import Limit
from tests.accounting.test_eviction_manager import SCHEDULES, EvictingSimulation, evicting, make_request
from tests.cases.dashboard import dashboard_queries, filters_of, rules

STATE_AND_TAIL = "tail"


@dataclass
class HoldingSimulation(EvictingSimulation):
    """Compares after every step with the rows and with what the simulated worker wrote into their blocks."""

    num_kept: int = 0
    num_shared_sinks: int = 0

    def check(self) -> None:
        super().check()
        rows = [self.held(request) for request in self.running]
        written = [[self.contents[block] for block in row] for row in rows]
        kept = sum(content[0] == "kept" for row in written for content in row)
        private = sum(content[0] == STATE_AND_TAIL for row in written for content in row)
        sinks = [block for row in rows for block in row if self.contents.get(block, ("",))[0] == "sinks"]
        expected = Holding(
            tokens=sum(request.num_computed_tokens for request in self.running),
            blocks=sum(map(len, written)),
            kept=kept,
            dense=private + len(set(sinks)),
        )
        names = [request.request_id for request in self.running]
        assert held_by(self.pages, names, [request.num_computed_tokens for request in self.running]) == expected
        self.num_kept += kept
        self.num_shared_sinks += len(sinks) - len(set(sinks))


@given(seed=st.integers(0, 2**32), sinks=st.sampled_from([0, 4, 32]), schedule=st.sampled_from(SCHEDULES))
@settings(max_examples=10, deadline=None)
def test_holdings_are_what_requests_hold(seed: int, sinks: int, schedule: dict) -> None:
    HoldingSimulation(evicting(schedule, sinks=sinks), 100, seed).run(20)


def test_holdings_of_many_requests_include_kept_blocks_and_shared_sinks() -> None:
    simulation = HoldingSimulation(evicting(), 100, seed=1)
    simulation.run(100)
    assert simulation.num_kept > 0 and simulation.num_shared_sinks > 0


def log_of(*evictions: tuple[str, int, list[list[int]], list[list[int]]]) -> WorkerLog:
    log = WorkerLog()
    for request_id, num_tokens, evicted, kept in evictions:
        log.evicted(request_id, num_tokens, torch.tensor(evicted), torch.tensor(kept), torch.zeros(2, 1).long())
    return log


def test_a_workers_log_is_taken_once() -> None:
    log = log_of(("a", 10, [[4], [6]], [[6], [4]]))
    taken = log.take()
    assert taken is not None and taken.requests == {"a": Evicted(10, 10, [[6], [4]])}
    assert log.take() is None


def test_ranks_bring_their_own_heads() -> None:
    """Through the class with which vLLM's executor merges the outputs of all workers."""
    ranks = [log_of(("a", 10, [[4], [6]], [[6], [4]])), log_of(("a", 10, [[0], [5]], [[10], [5]]))]
    outputs = []
    for rank in ranks:
        output = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
        output.kv_connector_output = KVConnectorOutput(kv_connector_worker_meta=rank.take())
        outputs.append(output)
    merged = KVOutputAggregator(2).aggregate(outputs).kv_connector_output.kv_connector_worker_meta
    assert merged.requests == {"a": Evicted(10, 15, [[6, 10], [4, 5]])}
    assert merged.requests["a"].mean_kept == 25 / 4


def test_outputs_of_an_earlier_step_neither_lose_evictions_nor_undo_later_ones() -> None:
    """vLLM 0.33 hands them over again where it recovers from a step that failed."""
    now = StepEvictions({"a": Evicted(20, 5, [[15]]), "b": Evicted(8, 4, [[4]])})
    replayed = StepEvictions({"a": Evicted(10, 3, [[7]]), "c": Evicted(6, 2, [[4]])})
    expected = {"a": Evicted(20, 5, [[15]]), "b": Evicted(8, 4, [[4]]), "c": Evicted(6, 2, [[4]])}
    assert now.aggregate(replayed).requests == replayed.aggregate(now).requests == expected
    assert now.aggregate(StepEvictions()).requests == now.requests


def test_demoted_tokens_are_no_evicted_ones() -> None:
    """Of two ranks with one head each, 8 of 10 tokens are in another codec, and 7."""
    nothing, all_held = torch.zeros(1, 1).long(), torch.full((1, 1), 10)
    logs = WorkerLog(), WorkerLog()
    for log, demoted in zip(logs, (8, 7), strict=True):
        log.evicted("a", 10, nothing, all_held, torch.full((1, 1), demoted))
    mine, theirs = (log.take().requests["a"] for log in logs)
    both = mine.beside(theirs)
    assert (both.evicted, both.demoted, both.mean_kept, both.mean_demoted) == (0, 15, 10, 7.5)
    stats = CacheStats.of([both], Holding(), Holding())
    assert stats.aggregate(stats).reduce()["demoted head tokens"] == 30
    report = request_report(12, 1000, Limit(5.0), both)
    assert (report["tokens_kept"], report["tokens_demoted"], report["rate_effective"]) == (12, 7.5, 1)


def test_ranks_of_a_stage_share_its_layers_and_stages_follow_each_other() -> None:
    """Two stages of one and two layers, each of two ranks with one head, in the order in which vLLM adds them up."""
    ranks = [(0, [[5]]), (0, [[6]]), (1, [[7], [8]]), (1, [[9], [10]])]
    parts = [StepEvictions({"a": Evicted(20, 1, kept, first_layer=first)}) for first, kept in ranks]
    for order in ((0, 1, 2, 3), (2, 3, 0, 1)):
        total = parts[order[0]]
        for index in order[1:]:
            total = total.aggregate(parts[index])
        assert total.requests["a"] == Evicted(20, 4, [[5, 6], [7, 9], [8, 10]])
        assert total.requests["a"].mean_kept == 7.5


@pytest.fixture
def accounting() -> Accounting:
    simulation = EvictingSimulation(evicting(sinks=0), 60, seed=0)
    return Accounting(simulation.pages, block_bytes=1000)


def request_of(name: str, num_computed_tokens: int, num_in_flight_tokens: int = 0) -> SimpleNamespace:
    return SimpleNamespace(
        request_id=name, num_computed_tokens=num_computed_tokens, num_in_flight_tokens=num_in_flight_tokens
    )


def test_a_step_counts_once(accounting: Accounting) -> None:
    accounting.add(StepEvictions({"a": Evicted(10, 15, [[6, 10], [4, 5]])}))
    accounting.add(StepEvictions({"b": Evicted(20, 3, [[20, 20], [18, 19]])}))
    first, second = accounting.take().data, accounting.take().data
    assert (first["evicted_head_tokens"], first["kept_tokens"]) == (18, [[6, 10, 20, 20], [4, 5, 18, 19]])
    assert (second["evicted_head_tokens"], second["kept_tokens"]) == (0, [])


def test_kvserves_own_requests_are_no_users() -> None:
    """Their evictions count nowhere, their pages count as held, and the ratio is of the others."""
    life = Life()
    life.run(330)
    users = life.accounting.take().data["users"]
    own = request_of(own_request_id("test"), 200)
    simulation = life.simulation
    other = Request(
        own.request_id, list(range(200)), SamplingParams(max_tokens=9), None, block_hasher=simulation.hasher
    )
    assert simulation.admit(other)
    life.accounting.start(own, Limit(4.0))
    life.accounting.add(StepEvictions({own.request_id: Evicted(200, 70, [[130]])}))
    found = life.accounting.take().data
    assert (found["evicted_head_tokens"], found["kept_tokens"]) == (0, [])
    assert found["users"] == users and found["holding"]["tokens"] == users["tokens"] + 200
    assert found["holding"]["blocks"] > users["blocks"]
    assert life.accounting.finish(own.request_id)["tokens_cached"] == 200


def test_stats_add_up_over_steps_and_survive_the_way_to_the_api_server() -> None:
    steps = [
        CacheStats.of([Evicted(10, 15, [[6, 10], [4, 5]])], Holding(100, 9, 2, 3), Holding(100, 9, 2, 3)),
        CacheStats.of([], Holding(101, 8, 2, 3), Holding()),
        CacheStats.of([Evicted(20, 3, [[20, 20], [18, 19]])], Holding(102, 7, 1, 1), Holding(90, 5, 1, 0)),
    ]
    total = CacheStats()
    assert total.is_empty()
    for step in steps:
        total = total.aggregate(CacheStats(msgspec.msgpack.decode(msgspec.msgpack.encode(step.to_dict()))))
    assert total.data == {
        "evicted_head_tokens": 18,
        "demoted_head_tokens": 0,
        "kept_tokens": [[6, 10, 20, 20], [4, 5, 18, 19]],
        "holding": {"tokens": 102, "blocks": 7, "kept": 1, "dense": 1, "window": 0, "window_tokens": 0},
        "users": {"tokens": 90, "blocks": 5, "kept": 1, "dense": 0, "window": 0, "window_tokens": 0},
    }
    assert total.reduce()["mean tokens kept per KV head at an eviction"] == 12.8


def test_the_report_of_an_evicted_request() -> None:
    evicted = Evicted(1000, 3000, [[300, 200], [250, 250]])
    assert request_report(1040, 5000, Limit(4.0), evicted) == {
        "tokens_cached": 1040, "tokens_kept": 290.0, "bytes_held": 5000, "rate_requested": 4.0, "rate_effective": 4.0,
    }  # fmt: skip


def test_the_report_of_a_request_that_keeps_everything() -> None:
    whole = {"tokens_cached": 40, "tokens_kept": 40.0, "bytes_held": 7, "rate_effective": 1.0}
    assert request_report(40, 7, None, None) == whole | {"rate_requested": 1.0}
    assert request_report(40, 7, Limit(max_tokens=512), None) == whole | {"max_tokens_requested": 512}


@dataclass
class Life:
    """A request of 322 tokens with an eviction plan, and the accounting that hears of what happens to it."""

    def __post_init__(self) -> None:
        self.simulation = EvictingSimulation(evicting(sinks=0), 60, seed=0)
        self.accounting = Accounting(self.simulation.pages, block_bytes=1000)
        self.request = make_request(self.simulation, 322, max_tokens=1000)
        self.request.num_in_flight_tokens = 0
        self.accounting.start(self.request, Limit(4.0))

    def run(self, num_tokens: int) -> None:
        """Compute until `num_tokens` are there; a cut on the way is reported."""
        if self.request not in self.simulation.running:
            assert self.simulation.admit(self.request)
        while self.request.num_computed_tokens < num_tokens:
            self.simulation.advance(self.request)
        if self.kept_blocks:
            self.hear_of_the_cut()

    @property
    def kept_blocks(self) -> int:
        return len(self.simulation.pages.kept_at("a", self.request.num_computed_tokens).blocks)

    def hear_of_the_cut(self) -> None:
        self.accounting.add(StepEvictions({"a": Evicted(322, 192, [[130]])}))

    def preempt(self) -> None:
        self.simulation.running.remove(self.request)
        self.simulation.manager.free(self.request)
        self.request.status, self.request.num_computed_tokens = RequestStatus.PREEMPTED, 0

    def share_the_prompt(self) -> None:
        """Another request that keeps everything leaves all tiles of the prompt in the prefix cache."""
        params = SamplingParams(max_tokens=1)
        other = Request("b", self.request.all_token_ids[:], params, None, block_hasher=self.simulation.hasher)
        assert self.simulation.admit(other)
        while other in self.simulation.running:
            self.simulation.advance(other)

    def report(self) -> tuple[float, float]:
        """Effective rate and tokens kept, at the end."""
        report = self.accounting.finish("a")
        return report["rate_effective"], report["tokens_kept"]


def test_a_request_that_was_cut_reports_its_cut() -> None:
    life = Life()
    life.run(330)
    assert life.report() == (round(322 / 130, 3), 138)


def test_a_preempted_request_that_comes_back_through_a_prefix_hit_uncut_reports_that_it_keeps_everything() -> None:
    life = Life()
    life.run(330)
    life.preempt()
    life.share_the_prompt()
    life.run(331)
    assert life.kept_blocks == 0, "the hit covers the queries that its tokens are scored by"
    assert life.report() == (1.0, life.request.num_computed_tokens)


def test_a_cut_that_is_heard_of_after_the_preemption_that_undid_it_does_not_count() -> None:
    """With asynchronous scheduling a request may be preempted before the step that cut it is over."""
    life = Life()
    life.run(330)
    life.preempt()
    life.share_the_prompt()
    life.run(340)
    life.hear_of_the_cut()
    assert life.report() == (1.0, life.request.num_computed_tokens)


def test_a_preempted_request_that_is_cut_again_reports_its_cut() -> None:
    life = Life()
    life.run(330)
    life.preempt()
    life.run(340)
    assert life.kept_blocks and life.report() == (round(322 / 130, 3), 148)


@pytest.mark.parametrize("computed_again", [0, 100])
def test_a_preempted_request_that_ends_before_it_is_cut_again_keeps_everything(computed_again: int) -> None:
    life = Life()
    life.run(330)
    life.preempt()
    if computed_again:
        assert life.simulation.manager.allocate_slots(life.request, computed_again) is not None
        life.request.num_computed_tokens = computed_again
    assert life.report() == (1.0, computed_again)


def test_requests_that_never_ran_or_ended_before_their_eviction_are_reported(accounting: Accounting) -> None:
    accounting.start(request_of("never ran", 0), Limit(4.0))
    assert accounting.finish("never ran")["bytes_held"] == 0
    accounting.start(request_of("aborted", 96, num_in_flight_tokens=64), Limit(4.0))
    assert accounting.finish("aborted")["tokens_cached"] == 32
    accounting.add(StepEvictions({"aborted": Evicted(96, 4, [[92]])}))
    assert not accounting.requests
    assert accounting.take().data["evicted_head_tokens"] == 4, "it was evicted, whether or not anybody waited for it"


def test_the_dashboard_and_the_alerts_tell_engines_apart() -> None:
    for query in dashboard_queries():
        assert all(filters >= {"instance", *ENGINE_LABELS} for filters in filters_of(query)), query
    for rule in rules():
        grouped = re.findall(r"\b(?:on|by) ?\(([^)]*)\)", rule["expr"])
        assert all({"instance", *ENGINE_LABELS} <= set(labels.split(", ")) for labels in grouped), rule["expr"]
        assert "annotations" not in rule or "{{ $labels.engine }}" in rule["annotations"]["summary"]


def test_pages_of_all_states_make_up_the_pool() -> None:
    layout = evicting(block_size=128)
    report = EngineReport(layout, num_layers=3, num_kv_heads=2, num_blocks=101, max_model_len=1024)
    holding = Holding(tokens=4000, blocks=45, kept=10, dense=12)
    pages = report.pages(free_blocks=60, num_running=3, holding=holding)
    per_block = 3 * 2 * 2
    assert pages == {"free": 60 * per_block, "kept": 10 * per_block, "dense": 12 * per_block, "sealed": 18 * per_block}


def test_the_effective_ratio_is_that_of_the_blocks_held() -> None:
    layout = evicting()
    report = EngineReport(layout, num_layers=3, num_kv_heads=2, num_blocks=101, max_model_len=1024)
    ratio = report.held_ratio(Holding(tokens=4000, blocks=20, kept=10, dense=6))
    sixteen_bit_bytes = 4000 * 3 * 2 * (64 + 64) * 2
    assert ratio == pytest.approx(sixteen_bit_bytes / (20 * 3 * 2 * layout.cell_bytes))
    assert report.held_ratio(Holding()) is None
