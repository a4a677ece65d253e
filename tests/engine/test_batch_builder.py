"""What the metadata builder hands to the kernels: fixed addresses, padding, kept pages, CUDA graph support."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.utils import AttentionGroup

from kvserve.accounting.plan import RowStep, policy_plan
from kvserve.attention.base import Answers, Batch, NewRows
from kvserve.attention.reference import ReferenceAttention
from kvserve.engine import connector
from kvserve.engine.backend import KvserveBackend
from kvserve.engine.builder import BatchBuilder, StepMetadata, graph_support
from kvserve.engine.connector import KvserveConnector, StepPlans
from kvserve.engine.kept_tables import KeptTables
from kvserve.engine.settings import EngineSettings
from kvserve.pages.kept import Kept
from kvserve.policies.loading import load_policy
from tests.cases.attention_cases import make_policy
from tests.cases.kept_cases import Ask, KeptCase, build_kept_case
from tests.cases.second_device import SecondDevice, back, moved

CPU = torch.device("cpu")
LAYER = 2
# One token each: cut with a tile behind the cut, cut at the last token, never cut.
DECODES = [Ask(128, 200, 1, (70, 3, 0, 124)), Ask(64, 64, 1, (60, 17, 1, 40)), Ask(0, 70, 1)]
ROWS = 4  # requests of the captured graph


@pytest.fixture(autouse=True)
def no_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connector, "_current", StepPlans())


def settings(policy: str, kernels: str = "triton", *changes: str) -> EngineSettings:
    return EngineSettings(load_policy(policy, changes), 64, torch.float16, kernels=kernels)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a builder for a policy."""

    def make(policy: str = "kv-compress", kernels: str = "triton") -> BatchBuilder:
        monkeypatch.setattr(EngineSettings, "from_vllm_config", lambda config: settings(policy, kernels))
        model, scheduler = SimpleNamespace(max_model_len=1024), SimpleNamespace(max_num_seqs=ROWS)
        layers = dict.fromkeys(["layers.4", "layers.5"])
        context = SimpleNamespace(static_forward_context=layers)
        config = SimpleNamespace(model_config=model, scheduler_config=scheduler, compilation_config=context)
        return BatchBuilder(SimpleNamespace(block_size=64), list(layers), config, CPU)

    return make


def receive(rows: dict[int, RowStep]) -> None:
    """The worker hears of a step's plans."""
    KvserveConnector.handle_preemptions(object.__new__(KvserveConnector), StepPlans(rows))


class Runner:
    """The tables of Model Runner V1, and how it has metadata built; steps of one token per request, padded to ROWS.

    Rows without a request have no tokens and vLLM's null block.
    """

    def __init__(self, width: int) -> None:
        self.starts = torch.zeros(ROWS + 1, dtype=torch.int32)
        self.lengths = torch.zeros(ROWS, dtype=torch.int32)
        self.table = torch.zeros(ROWS, width, dtype=torch.int32)

    def write(self, lengths: list[int], rows: torch.Tensor) -> None:
        n = len(lengths)
        self.starts[:] = torch.arange(ROWS + 1).clamp(max=n)
        self.lengths[:n], self.lengths[n:] = torch.tensor(lengths), 0
        self.table[:n], self.table[n:] = rows, 0

    def step(self, builder: BatchBuilder, lengths: list[int], rows: torch.Tensor) -> StepMetadata:
        """A real step."""
        self.write(lengths, rows)
        return builder.build(0, self._common())

    def capture(self, builder: BatchBuilder) -> StepMetadata:
        """The dummy step that a graph is captured with."""
        self.write([1] * ROWS, torch.zeros_like(self.table))
        return builder.build_for_cudagraph_capture(self._common())

    def _common(self) -> CommonAttentionMetadata:
        return CommonAttentionMetadata(
            query_start_loc=self.starts, query_start_loc_cpu=self.starts.clone(), seq_lens=self.lengths, num_reqs=ROWS,
            num_actual_tokens=ROWS, max_query_len=1, max_seq_len=1024, block_table_tensor=self.table,
            slot_mapping=torch.zeros(0, dtype=torch.int64),
        )  # fmt: skip


class RunnerV2(Runner):
    """The same by Model Runner V2's own functions."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.buffers = InputBuffers(ROWS, ROWS, CPU)
        self.starts, self.lengths = self.buffers.query_start_loc, self.buffers.seq_lens

    def step(self, builder: BatchBuilder, lengths: list[int], rows: torch.Tensor) -> StepMetadata:
        batch = InputBatch.make_dummy(ROWS, ROWS, self.buffers, max_query_len=1)
        self.write(lengths, rows)
        return self._prepare(builder, batch, CUDAGraphMode.FULL, for_capture=False)

    def capture(self, builder: BatchBuilder) -> StepMetadata:
        self.table.zero_()
        batch = InputBatch.make_dummy(ROWS, ROWS, self.buffers, max_query_len=1)
        return self._prepare(builder, batch, CUDAGraphMode.NONE, for_capture=True)

    def _prepare(self, builder: BatchBuilder, batch: InputBatch, mode: CUDAGraphMode, for_capture: bool) -> Any:
        state: Any = SimpleNamespace(supports_mm_inputs=False, encoder_cache=None, max_model_len=1024)
        group = AttentionGroup(
            KvserveBackend, builder.layer_names, builder.kv_cache_spec, 0, metadata_builders=[builder]
        )
        cache: Any = SimpleNamespace(kv_cache_groups=[None])
        slots = torch.zeros(1, ROWS, dtype=torch.int64)
        tables = DefaultModelState.prepare_attn(
            state, batch, mode, (self.table,), slots, [[group]], cache, for_capture=for_capture
        )
        assert tables["layers.4"] is tables["layers.5"]
        return tables["layers.4"]


RUNNERS = pytest.mark.parametrize("make_runner", [Runner, RunnerV2], ids=["V1", "V2"])


def plans_of(case: KeptCase) -> dict[int, RowStep]:
    kept = {int(case.batch.block_table[r, 0]): case.kept_of(r) for r in range(len(case.asks))}
    return {block: RowStep(f"r{block}", entry) for block, entry in kept.items() if entry.end}


class Launches:
    """Records the launches of kernels, which are all that a CUDA graph would replay."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from kvserve.kernels import decode, extend, store

        self.calls: list[tuple[Any, Any, tuple[Any, ...], dict[str, Any]]] = []
        for module in (decode, extend, store):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                monkeypatch.setattr(module, name, self._recording(getattr(module, name)))

    def _recording(self, kernel: Any) -> Any:
        def at(grid: Any) -> Any:
            def launch(*arguments: Any, **options: Any) -> None:
                self.calls.append((kernel, grid, arguments, options))
                kernel[grid](*arguments, **options)

            return launch

        return type("Recording", (), {"__getitem__": lambda _, grid: at(grid)})()

    def replay(self) -> None:
        for kernel, grid, arguments, options in list(self.calls):
            kernel[grid](*arguments, **options)

    def host_values(self) -> list[Any]:
        """Everything about the launches but the contents of tensors and the addresses of temporary ones."""
        return [
            (grid, [(a.shape, a.stride(), a.dtype) if isinstance(a, torch.Tensor) else a for a in arguments], options)
            for _, grid, arguments, options in self.calls
        ]


def addresses(metadata: StepMetadata) -> list[int]:
    batch = metadata.batch
    tables = (batch.query_start_loc, batch.seq_lens, batch.block_table, *(batch.kept or ()))
    return [table.data_ptr() for table in tables]


@RUNNERS
def test_tables_keep_their_addresses_from_step_to_step(make_runner: type[Runner], build: Any) -> None:
    builder, runner = build(), make_runner(8)
    captured = runner.capture(builder)
    receive({5: RowStep("a", Kept(128, (7, 9)))})
    step = runner.step(builder, [130, 3], torch.tensor([[5] * 8, [6] * 8]))
    assert len(addresses(captured)) == 6 and addresses(step) == addresses(captured)
    assert step.batch.max_query_len == captured.batch.max_query_len == 1


def test_native_kernels_get_a_kept_table_only_where_a_row_is_cut(build: Any) -> None:
    builder, runner = build("kv-compress", "native"), Runner(8)
    assert runner.step(builder, [3], torch.tensor([[5] * 8])).batch.kept is None
    receive({5: RowStep("a", Kept(128, (7, 9)))})
    kept = runner.step(builder, [130], torch.tensor([[5] * 8])).batch.kept
    assert kept.ends.tolist() == [128, 0, 0, 0]


@RUNNERS
def test_a_replayed_graph_follows_lengths_tables_and_kept_pages(
    make_runner: type[Runner], build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launches of a capture on vLLM's dummy step, run again, give what the reference gives on the real step."""
    pytest.importorskip("triton")
    from kvserve.attention.triton import TritonAttention

    launches = Launches(monkeypatch)
    case = build_kept_case(make_policy("kivi-2"), DECODES, group=2)
    builder, runner, arena = build(), make_runner(case.full_table.shape[1]), case.arena.clone()
    query, key, value = (torch.zeros(ROWS, *rows[0].shape[1:]) for rows in (case.query[LAYER], *[case.key[LAYER]] * 2))
    output = torch.zeros_like(query)
    attention = TritonAttention(case.layout, case.spec)
    captured = runner.capture(builder)
    attention.forward(NewRows(query, key, value), arena[:, :, LAYER], captured.batch, Answers(output))

    arena.copy_(case.arena)
    query[:3] = torch.cat(case.query[LAYER])
    key[:3], value[:3] = case.new_rows(case.key[LAYER]), case.new_rows(case.value[LAYER])
    real_step = [ask.computed + 1 for ask in case.asks], case.batch.block_table
    if make_runner is Runner:
        receive(plans_of(case))
        runner.step(builder, *real_step)
    else:
        runner.step(builder, *real_step)
        receive(plans_of(case))
    launches.replay()

    expected_arena = case.arena.clone()
    expected, _ = case.run(ReferenceAttention(case.layout, case.spec), LAYER, expected_arena)
    assert (output[:3] - expected).abs().max() <= 5e-6
    assert torch.equal(arena, expected_arena), "a row without tokens writes nothing"


def test_launches_of_a_decode_step_do_not_depend_on_lengths(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from kvserve.attention.triton import TritonAttention

    case = build_kept_case(make_policy("kivi-2"), DECODES, group=2)
    builder, runner = build(), Runner(case.full_table.shape[1])
    found = []
    for lengths in ([201, 65, 71], [1, 1, 1]):
        table = case.batch.block_table if lengths[0] > 1 else torch.zeros_like(case.batch.block_table)
        receive(plans_of(case) if lengths[0] > 1 else {})
        metadata = runner.step(builder, lengths, table)
        rows = [torch.zeros(ROWS, heads, 64) for heads in (4, 2, 2)]
        attention = TritonAttention(case.layout, case.spec)
        with monkeypatch.context() as patch:
            launches = Launches(patch)
            cells, output = case.arena.clone()[:, :, LAYER], torch.zeros(ROWS, 4, 64)
            attention.forward(NewRows(*rows), cells, metadata.batch, Answers(output))
        found.append(launches.host_values())
    assert len(found[0]) == 5 and found[0] == found[1]


def test_kept_tables_are_found_by_their_state_block() -> None:
    rows = KeptTables(4, 8, CPU)
    kept = {30: Kept(192, (4, 5, 6)), 10: Kept(64, (3,)), 99: Kept(128, (8, 8))}
    table = rows.table(torch.tensor([[10, 1], [20, 2], [30, 3]], dtype=torch.int32), kept)
    assert table.ends.tolist() == [64, 0, 192] and table.starts.tolist() == [0, 8, 16, 24]
    assert table.blocks[:1].tolist() == [3] and table.blocks[16:19].tolist() == [4, 5, 6]
    rows.fill({})
    assert table.ends.tolist() == [0, 0, 0]
    rows.fill(kept | {20: Kept(320, (7,))})
    assert table.ends.tolist() == [64, 320, 192] and table.blocks[8] == 7


def test_kept_tables_are_filled_where_the_rows_are() -> None:
    with SecondDevice():
        rows = KeptTables(2, 4, torch.device("meta"))
        table = rows.table(moved(torch.tensor([[10], [20]], dtype=torch.int32)), {20: Kept(64, (3,))})
    assert back(table.ends).tolist() == [0, 64] and back(table.blocks)[4] == 3


def test_more_kept_blocks_than_a_row_has_are_an_error() -> None:
    rows = KeptTables(2, 1, CPU)
    with pytest.raises(ValueError, match="keeps 2 blocks, more than the 1"):
        rows.table(torch.zeros(1, 1, dtype=torch.int32), {3: Kept(128, (1, 2))})


@pytest.mark.parametrize(
    ("policy", "kernels", "support"),
    [
        ("none", "native", "NEVER"),
        ("none", "triton", "UNIFORM_SINGLE_TOKEN_DECODE"),
        ("boost-2bit", "triton", "UNIFORM_SINGLE_TOKEN_DECODE"),
        ("kv-compress", "triton", "UNIFORM_SINGLE_TOKEN_DECODE"),
        ("kv-compress-live", "triton", "NEVER"),  # cuts while it generates
        ("knorm", "triton", "NEVER"),  # its cut may come in a step of one token
        ("h2o", "triton", "NEVER"),  # notes every query
    ],
)
def test_full_graphs_are_claimed_where_no_step_of_single_tokens_evicts(policy: str, kernels: str, support: str) -> None:
    assert graph_support(settings(policy, kernels)) is AttentionCGSupport[support]


@pytest.mark.parametrize("policy", ["kv-compress", "snapkv", "pyramidkv"])
def test_a_step_that_cuts_has_two_tokens_at_least(policy: str) -> None:
    """What the claim of full graphs for these policies rests on."""
    layout = settings(policy).layout(64)
    for prompt_len, room in itertools.product((129, 200, 201), (1, 2, 31, 128)):
        plan = policy_plan(layout, prompt_len)
        assert plan is not None and plan.next_cut(0).point == prompt_len
        computed = 0
        while computed < prompt_len:
            before = computed
            # A clip to nothing waits for a step with more room.
            computed += plan.clip_step(computed, min(room, prompt_len - computed)) or prompt_len - computed
        assert computed - before >= 2


def test_the_evictor_is_made_when_the_first_layer_runs(build: Any) -> None:
    """Model Runner V2 builds the metadata before the worker hears of the step's plans."""
    builder, runner = build(), Runner(8)
    metadata = runner.step(builder, [130], torch.tensor([[5] * 8]))
    receive({5: RowStep("a", Kept(), Kept(128, (7,)))})
    assert metadata.evictor is not None and metadata.evictor is metadata.evictor
    assert runner.step(builder, [130], torch.tensor([[6] * 8])).evictor is not None
    receive({})
    assert runner.step(builder, [130], torch.tensor([[5] * 8])).evictor is None


def test_padding_does_not_change_what_the_tables_say(build: Any) -> None:
    builder, runner = build("kivi-2bit"), Runner(8)
    batch: Batch = runner.step(builder, [3, 9], torch.tensor([[5] * 8, [6] * 8])).batch
    assert batch.num_reqs == ROWS and batch.kept is None
    assert batch.query_start_loc.diff().tolist() == [1, 1, 0, 0] and batch.seq_lens.tolist() == [3, 9, 0, 0]
