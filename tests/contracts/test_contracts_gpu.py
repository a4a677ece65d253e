"""One test per vLLM symbol that kvserve relies on for GPUs. They read vLLM's source: nothing here runs on a GPU."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.attention.backends.registry import AttentionBackendEnum


def source_of(module: str, name: str) -> str:
    """Source of a class or function of a module that only imports on a GPU machine."""
    from importlib.util import find_spec

    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    with open(spec.origin) as file:
        lines = file.read().splitlines()
    start = next(i for i, line in enumerate(lines) if line.lstrip().startswith((f"def {name}(", f"class {name}")))
    indent = len(lines[start]) - len(lines[start].lstrip())
    closing = (")", "]", "}")
    ends = (
        i for i, line in enumerate(lines[start + 1 :], start + 1)
        if line.strip() and len(line) - len(line.lstrip()) <= indent and not line.lstrip().startswith(closing)
    )  # fmt: skip
    return "\n".join(lines[start : next(ends, len(lines))])


def position(source: str, *parts: str) -> list[int]:
    return [source.index(part) for part in parts]


def in_order(source: str, *parts: str) -> bool:
    places = position(source, *parts)
    return places == sorted(places)


RUNNER_V2 = "vllm.v1.worker.gpu.model_runner"


def test_a_cuda_platform_takes_the_backend_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the platform's own choice; only its compiled library is missing here."""
    monkeypatch.setitem(sys.modules, "vllm._C_stable_libtorch", ModuleType("vllm._C_stable_libtorch"))
    from vllm.platforms import cuda
    from vllm.platforms.interface import DeviceCapability
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention.selector import AttentionSelectorConfig

    from kvserve.engine import plugin, selector
    from kvserve.engine.backend import backend_for
    from kvserve.engine.settings import EngineSettings
    from kvserve.policies.loading import load_policy

    plugin.register()
    bound = backend_for(EngineSettings(load_policy("kivi-2bit"), 64, torch.bfloat16, kernels="triton"))
    monkeypatch.setitem(vars(selector), "backend", bound)

    def choose(major: int) -> str:
        monkeypatch.setattr(
            cuda.NonNvmlCudaPlatform, "get_device_capability", classmethod(lambda cls: DeviceCapability(major, 0))
        )
        asked = AttentionSelectorConfig(
            head_size=64, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=64, has_sliding_window=True,
            use_kv_connector=True,
        )  # fmt: skip
        return cuda.NonNvmlCudaPlatform.get_attn_backend_cls(AttentionBackendEnum.CUSTOM, asked)

    assert resolve_obj_by_qualname(choose(8)) is bound
    with pytest.raises(ValueError, match="compute capability not supported"):
        choose(7)


def test_custom_is_a_backend_name_that_survives_pickling() -> None:
    import pickle

    assert pickle.loads(pickle.dumps(AttentionBackendEnum.CUSTOM)) is AttentionBackendEnum.CUSTOM


def test_the_engines_arguments_have_an_attention_backend() -> None:
    from vllm.engine.arg_utils import EngineArgs

    assert "attention_backend" in EngineArgs.__dataclass_fields__


def test_full_graphs_are_asked_of_the_builder() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    call = ".get_cudagraph_support("
    assert call in inspect.getsource(GPUModelRunner._check_and_update_cudagraph_mode)
    assert call in source_of("vllm.v1.worker.gpu.attn_utils", "get_attn_cg_support")


def test_a_builder_without_full_graphs_leaves_piecewise_ones() -> None:
    from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
    from vllm.v1.attention.backend import AttentionCGSupport

    def resolve(support: AttentionCGSupport) -> Any:
        config = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE)
        with set_current_vllm_config(VllmConfig()):
            config.set_splitting_ops_for_v1(all2all_backend="naive", data_parallel_size=1)
            return config.resolve_cudagraph_mode_and_sizes(support, "kvserve")

    assert resolve(AttentionCGSupport.NEVER) is CUDAGraphMode.PIECEWISE
    assert resolve(AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE) is CUDAGraphMode.FULL_AND_PIECEWISE


def test_model_runner_v1_pads_a_graphs_rows_with_no_tokens_and_the_null_block() -> None:
    from vllm.v1.attention.backends.utils import NULL_BLOCK_ID
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    inputs = inspect.getsource(GPUModelRunner._prepare_inputs)
    assert "self.query_start_loc.np[num_reqs + 1 :].fill(cu_num_tokens[-1])" in inputs
    assert "self.seq_lens[num_reqs:].fill_(0)" in inputs
    metadata = inspect.getsource(GPUModelRunner._build_attention_metadata)
    assert "blk_table_tensor[num_reqs:num_reqs_padded].fill_(NULL_BLOCK_ID)" in metadata and NULL_BLOCK_ID == 0


def test_model_runner_v1_hands_out_slices_of_persistent_tables() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    metadata = inspect.getsource(GPUModelRunner._build_attention_metadata)
    for table in ("self.query_start_loc.gpu[: num_reqs_padded + 1]", "self.seq_lens[:num_reqs_padded]",
                  "blk_table.get_device_tensor(num_reqs_padded)"):  # fmt: skip
        assert table in metadata


def test_model_runner_v2_pads_a_graphs_rows_with_no_tokens_and_the_null_block() -> None:
    inputs = source_of(RUNNER_V2, "prepare_inputs")
    assert "query_start_loc_np[num_reqs + 1 :] = num_tokens" in inputs
    assert "seq_lens = self.input_buffers.seq_lens[:num_reqs_padded]" in inputs
    assert "pad unused seq_lens as 0" in source_of("vllm.v1.worker.gpu.input_batch", "prepare_pos_seq_lens")
    gather = source_of("vllm.v1.worker.gpu.block_table", "_gather_block_tables_kernel")
    assert in_order(gather, "if batch_idx >= num_reqs:", "tl.store(dst_row_ptr + offset, 0", "return")


def test_model_runner_v2_captures_on_the_tables_that_it_replays_with() -> None:
    tables = "vllm.v1.worker.gpu.block_table"
    assert "out = tuple(self.input_block_tables)" in source_of(tables, "gather_block_tables")
    dummies = source_of(tables, "get_dummy_block_tables")
    assert ".zero_()" in dummies and "block_table[:num_reqs]" in dummies and "self.input_block_tables" in dummies


def test_model_runner_v2_builds_the_metadata_before_the_worker_hears_of_the_plans() -> None:
    source = source_of(RUNNER_V2, "execute_model")
    assert in_order(
        source, "self.model_state.prepare_attn(", "self.kv_connector.pre_forward(", "run_fullgraph(batch_desc)"
    )
    assert source.rindex("self.kv_connector.pre_forward(") < source.index("self.model(**model_inputs)")
    connector = source_of("vllm.v1.worker.gpu.kv_connector", "ActiveKVConnector")
    assert "self.kv_connector.handle_preemptions(kv_connector_metadata)" in connector


def test_both_runners_decide_for_a_full_graph_without_asking_the_backend() -> None:
    """Why a policy that may evict in a step of single tokens claims none."""
    source = source_of(RUNNER_V2, "execute_model")
    assert in_order(source, "dispatch_cg_and_sync_dp(", "self.model_state.prepare_attn(")
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    source = inspect.getsource(GPUModelRunner.execute_model)
    assert in_order(source, "_determine_batch_execution_and_padding(", "_build_attention_metadata(")


def test_both_runners_have_int32_lengths_and_starts() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def squeezed(source: str) -> str:
        return "".join(source.split())

    first = squeezed(inspect.getsource(GPUModelRunner.__init__))
    assert "self.query_start_loc=self._make_buffer(self.max_num_reqs+1,dtype=torch.int32)" in first
    assert "self.seq_lens=torch.zeros(self.max_num_reqs,dtype=torch.int32," in first
    second = squeezed(source_of("vllm.v1.worker.gpu.input_batch", "InputBuffers"))
    assert "self.query_start_loc=torch.zeros(max_num_reqs+1,dtype=torch.int32," in second
    assert "self.seq_lens=torch.zeros(max_num_reqs,dtype=torch.int32," in second


def test_on_a_cpu_the_runners_device_tables_are_the_hosts() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    assert "v.gpu = v.cpu" in inspect.getsource(CPUModelRunner._postprocess_tensors)


def test_a_cuda_arena_is_one_allocation_in_the_backends_layout() -> None:
    from vllm.v1.worker.utils import allocate_kv_cache

    source = inspect.getsource(allocate_kv_cache)
    assert "buf = torch.zeros(buf_size, dtype=torch.int8, device=device)" in source
    assert "get_resolved_kv_cache_layout()" in source_of("vllm.v1.worker.gpu.attn_utils", "init_kv_cache")
