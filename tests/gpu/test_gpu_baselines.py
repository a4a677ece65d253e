"""Other projects' decode attention in the GPU benchmark: each gets the pages it asks for, and its answer is checked."""

from __future__ import annotations

import ast
import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import gpu, gpu_baselines
from benchmarks.gpu_baselines import BASELINES, FlashAttention, FlashInfer, FlashInferTensorCores, Rows, Sdpa, usable
from benchmarks.gpu_cases import Workload
from benchmarks.gpu_targets import Row, targets
from tests.cases.triton_cases import run_python

CPU = torch.device("cpu")
WORK = Workload(context=300, batch=3, head_dim=64, group=4, num_kv_heads=2)


def rows_of(work: Workload = WORK) -> Rows:
    torch.manual_seed(0)
    return Rows.random(work, torch.float16, CPU)


def softmax_over(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of one request: query [num_heads, head_dim], K and V [tokens, num_kv_heads, head_dim]."""
    group = query.shape[0] // key.shape[1]
    key, value = (side.float().repeat_interleave(group, 1) for side in (key, value))
    weights = torch.einsum("hd,nhd->hn", query.float() * scale, key).softmax(-1)
    return torch.einsum("hn,nhd->hd", weights, value)


def requests_of(
    key: torch.Tensor, value: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor
) -> list[list[torch.Tensor]]:
    """K and V of each request, [tokens, num_kv_heads, head_dim], out of pages [blocks, block_size, ...]."""
    places = zip(table.long(), lengths.tolist(), strict=True)
    return [[side[blocks].flatten(0, 1)[:count] for side in (key, value)] for blocks, count in places]


class PagedDecode:
    """FlashInfer's wrapper as its documentation describes it, in plain torch."""

    def __init__(
        self, workspace: torch.Tensor, layout: str, *, use_cuda_graph: bool, use_tensor_cores: bool, **buffers: Any
    ):
        assert layout == "NHD" and use_cuda_graph and workspace.dtype == torch.uint8
        assert set(buffers) == {f"paged_kv_{part}_buffer" for part in ("indptr", "indices", "last_page_len")}
        self.buffers, self.use_tensor_cores = buffers, use_tensor_cores

    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *, sm_scale, **dtypes
    ):
        assert self.buffers["paged_kv_indices_buffer"].shape == indices.shape and set(dtypes) == {
            "q_data_type",
            "kv_data_type",
        }
        self.requests = [
            (indices[first:last].long(), (last - first - 1) * page_size + tail)
            for first, last, tail in zip(indptr.tolist(), indptr.tolist()[1:], last_page_len.tolist(), strict=False)
        ]
        self.scale = sm_scale

    def run(self, query: torch.Tensor, pages: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        of = [[side[blocks].flatten(0, 1)[:count] for side in pages] for blocks, count in self.requests]
        return torch.stack([softmax_over(row, *kv, self.scale) for row, kv in zip(query, of, strict=True)])


def with_kvcache(query, key, value, *, cache_seqlens, block_table, softmax_scale, causal):
    """flash_attn_with_kvcache over pages, in plain torch."""
    assert causal and key.shape[1] % 256 == 0
    of = requests_of(key, value, block_table, cache_seqlens)
    return torch.stack([softmax_over(row[0], *kv, softmax_scale)[None] for row, kv in zip(query, of, strict=True)])


@pytest.fixture
def projects(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer and flash-attn are installed."""
    for name, content in (
        ("flashinfer", {"BatchDecodeWithPagedKVCacheWrapper": PagedDecode}),
        ("flash_attn", {"flash_attn_with_kvcache": with_kvcache}),
    ):
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("baseline", [FlashInfer, FlashInferTensorCores, FlashAttention, Sdpa, gpu_baselines.SdpaGqa])
@pytest.mark.parametrize("context", [1, 256, 300])
def test_a_baseline_attends_to_the_tokens_of_each_request(baseline: type, context: int, projects: None):
    rows = rows_of(Workload(context, 3, 64, 4, 2))
    assert baseline.missing(on_cpu=False) is None
    assert baseline(rows).error(rows) < 2e-3
    changed = Rows(rows.work, rows.query, rows.key.flip(0), rows.value)
    assert baseline(changed).error(rows) > baseline.error_limit or context == 1


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert FlashInfer.missing(on_cpu=False).startswith("flashinfer: ModuleNotFoundError")
    found, left_out = usable(CPU)
    assert [baseline.name for baseline in found] == ["sdpa, group as queries", "sdpa, enable_gqa"]
    assert "baseline vllm, triton, fp8: needs a GPU" in left_out and len(found) + len(left_out) == len(BASELINES)


def test_a_baseline_with_another_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    class Wrong(Sdpa):
        name = "wrong"

        def attend(self) -> torch.Tensor:
            return super().attend().flip(0)

    class Failing(Sdpa):
        name = "failing"

        def __init__(self, rows: Rows):
            raise NotImplementedError("no such group")

    run = gpu.Run(CPU, dry=True, deadline=float("inf"), output=None, baselines=[Wrong, Failing, Sdpa])
    run.copy_bytes_per_s = 1e9
    for _ in range(2):
        assert gpu.time_baselines(run, WORK, torch.float16) > 0
    assert {row.variant for row in run.rows} == {Sdpa.name}
    assert "group 4: its error" in run.left_out[0] and "NotImplementedError: no such group" in run.left_out[1]
    assert len(run.left_out) == 2, "checked once"


def test_vllms_flash_attention_is_called_as_it_is_declared(monkeypatch: pytest.MonkeyPatch):
    fa_utils = pytest.importorskip("vllm.v1.attention.backends.fa_utils")
    # Importing it takes CUDA extensions; its source does not.
    source = Path(import_module("vllm").__file__).parent / "vllm_flash_attn" / "flash_attn_interface.py"
    functions = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.FunctionDef)]
    (declared,) = (node.args for node in functions if node.name == "flash_attn_varlen_func")
    names = {argument.arg for argument in declared.args}

    def attend(**arguments: Any) -> torch.Tensor:
        assert set(arguments) <= names
        lengths, table = arguments["seqused_k"], arguments["block_table"]
        assert arguments["cu_seqlens_q"].tolist() == [0, 1, 2, 3] and arguments["fa_version"] == 3
        of = requests_of(arguments["k"], arguments["v"], table, lengths)
        scale = arguments["softmax_scale"]
        return torch.stack([softmax_over(row, *kv, scale) for row, kv in zip(arguments["q"], of, strict=True)])

    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", attend, raising=False)
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda head_size=None: 3)
    rows = rows_of()
    assert gpu_baselines.VllmFlashAttention.missing(on_cpu=False) is None
    assert gpu_baselines.VllmFlashAttention(rows).error(rows) < 2e-3


VLLM = """
import sys, types, torch, triton, triton.language as tl
import vllm.envs, vllm.platforms
from triton.language.extra import libdevice
# What vLLM finds where there is a GPU; under TRITON_INTERPRET its kernels then run here.
sys.modules["vllm.triton_utils"] = types.SimpleNamespace(
    triton=triton, tl=tl, tldevice=libdevice, HAS_TRITON=True, LOG2E=1.4426950408889634, LOGE2=0.6931471805599453)
from benchmarks.gpu_baselines import BASELINES, Rows, Vllm, VllmTriton, VllmTurboQuant
from benchmarks.gpu_cases import Workload
torch.manual_seed(0)
def check(baseline, batch, group):
    rows = Rows.random(Workload(40, batch, 64, group, 2), torch.float16, torch.device("cpu"))
    print(baseline.name, batch, baseline(rows).error(rows), baseline.error_limit, sep="|")

VllmTurboQuant.splits = 2
for baseline in BASELINES:
    if issubclass(baseline, Vllm) and "flash" not in baseline.name:
        check(baseline, 2, 2)
check(VllmTriton, 65, 1)  # more sequences than are split
"""


@pytest.mark.slow
def test_vllms_triton_kernels_interpreted_answer_within_their_formats():
    out = run_python("-c", VLLM, TRITON_INTERPRET="1", HOME="/tmp", PATH="/usr/bin:/bin")
    found = {tuple(line.split("|")[:2]): line.split("|")[2:] for line in out.splitlines() if line.count("|") == 3}
    assert len(found) == 6
    for case, (error, limit) in found.items():
        assert 0 < float(error) < float(limit), case


def rows_at(
    what: str, variant: str, time_us: float, sizes: tuple[int, int, int, int] = (32768, 16, 128, 4), **more: Any
) -> Row:
    return Row(what, variant, *sizes, time_us, **more)


def test_targets_take_the_fastest_kernels_of_a_format():
    rows = [
        rows_at("decode", "kivi-2bit", 20.0, copy_share=0.6, speedup=4.0),
        rows_at("decode", "kivi-2bit, cuda", 15.0, copy_share=0.8, speedup=5.3),
        rows_at("decode", "none", 80.0, speedup=0.9),
        rows_at("decode", "vllm, triton", 90.0),
        rows_at("decode", "vllm, flash attention", 72.0),
        rows_at("append, no tile full", "kivi-2bit", 0.2, (32767, 16, 128, 4)),
        rows_at("append, every tile full", "kivi-2bit", 6.6),
        rows_at("decode, kept pages, uniform", "int8", 10.0, (8192, 16, 128, 4), moved_bytes=100),
        rows_at("decode, kept pages, ragged", "int8", 10.5, (8192, 16, 128, 4), moved_bytes=95),
    ]
    found = {target.what: target for target in targets(rows)}
    measured = {what: (target.measured, target.met) for what, target in found.items() if target.measured is not None}
    assert measured == {
        "kivi-2bit, decode at 32k x 16: share of the copy bandwidth": (0.8, True),
        "kivi-2bit, decode at 32k x 16: over the fastest 16-bit decode": (5.3, True),
        "none, decode at 32k x 16: over vLLM's own attention": (0.9, False),
        "kivi-2bit: storing, tiles sealed in turn, over attention at 32k x 16": (pytest.approx(0.02), True),
        "kept pages, ragged over uniform heads: time per byte, worst format": (pytest.approx(1.10526, abs=1e-4), False),
    }
    assert found["boost-2bit, decode at 4k x 1: over the fastest 16-bit decode"].met is None
    assert (
        "not measured" in targets([])[0].line()
        and "MISSED" in found["none, decode at 32k x 16: over vLLM's own attention"].line()
    )


def test_a_dry_run_names_every_baseline_and_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(gpu, "run_checks", lambda run: [])
    monkeypatch.setattr(gpu, "time_launch_parameters", lambda run, work: None)
    monkeypatch.setattr(gpu, "time_others", lambda run: None)
    path = tmp_path / "dry.json"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.main(["--dry-run", "--output", str(path)]) == 0
    out, content = capsys.readouterr().out, json.loads(path.read_text())
    timed = {row["variant"] for row in content["rows"]}
    for baseline in BASELINES:
        assert baseline.name in timed or f"left out: baseline {baseline.name}: needs a GPU" in out
    assert {check["baseline"] for check in content["baseline_checks"]} == {"sdpa, group as queries", "sdpa, enable_gqa"}
    assert [target["what"] for target in content["targets"]] == [target.what for target in targets([])]
    assert out.count("not measured") == len(content["targets"])
