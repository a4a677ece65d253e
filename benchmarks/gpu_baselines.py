"""Other projects' decode attention, which `benchmarks.gpu` times beside kvserve's kernels where it is installed.

Each class calls one of them as its project does: torch, FlashInfer's paged decode, flash-attn, and the kernels that
vLLM 0.32 serves with (v1/attention/backends: flash_attn.py, triton_attn.py, turboquant_attn.py). All read K and V in
pages that lie in random order, but torch, which has none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from math import ceil
from typing import Any, ClassVar, NamedTuple

import torch

from benchmarks.gpu_cases import Workload
from kvserve.pages.reference import hadamard

STORED_AT_ONCE = 1 << 14  # tokens, where a cache is filled by a kernel


class Pages(NamedTuple):
    """K or V rows in pages."""

    key: torch.Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    value: torch.Tensor
    table: torch.Tensor  # int32 [batch, blocks]


@dataclass(frozen=True)
class Rows:
    """One decode step before any layout.

    Attributes:
        query: [batch, num_heads, head_dim].
        key, value: [batch, context, num_kv_heads, head_dim].
    """

    work: Workload
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @classmethod
    def random(cls, work: Workload, dtype: torch.dtype, device: torch.device) -> Rows:
        shape = (work.batch, work.context, work.num_kv_heads, work.head_dim)
        key, value = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        query = torch.randn(work.batch, work.spec.num_heads, work.head_dim, device=device, dtype=dtype)
        return cls(work, query, key, value)

    @property
    def lengths(self) -> torch.Tensor:
        return torch.full((self.work.batch,), self.work.context, dtype=torch.int32, device=self.query.device)

    @property
    def starts(self) -> torch.Tensor:
        """Where each request's query row begins, and the end."""
        return torch.arange(self.work.batch + 1, dtype=torch.int32, device=self.query.device)

    def table(self, block_size: int) -> torch.Tensor:
        """Shuffled block ids, int32 [batch, blocks]."""
        blocks = ceil(self.work.context / block_size)
        ids = torch.randperm(self.work.batch * blocks, generator=torch.Generator().manual_seed(0))
        return ids.int().view(self.work.batch, blocks).to(self.query.device)

    def paged(self, block_size: int) -> Pages:
        table = self.table(block_size)
        places = table.flatten().long()

        def pages(rows: torch.Tensor) -> torch.Tensor:
            made = rows.new_zeros(places.numel(), block_size, *rows.shape[2:])
            padding = -rows.shape[1] % block_size
            padded = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, padding)) if padding else rows
            made[places] = padded.reshape(made.shape)
            return made

        return Pages(pages(self.key), pages(self.value), table)

    def expected(self) -> torch.Tensor:
        """The step's attention in float32, [batch, num_heads, head_dim]."""
        query = self.query.float().unflatten(1, (self.work.num_kv_heads, -1)) * self.work.spec.scale
        weights = torch.einsum("bhgd,bnhd->bhgn", query, self.key.float()).softmax(-1)
        return torch.einsum("bhgn,bnhd->bhgd", weights, self.value.float()).flatten(1, 2)


class Baseline(ABC):
    """One decode kernel over K and V of its own.

    Attributes:
        name: what the table calls it.
        module: what must be importable; None: torch alone.
        is_16_bit: whether its cache has 16 bits; of those the fastest is what speedups are over.
        error_limit: largest root mean square of the error, over that of the answer: rounding for 16 bits, and what
            the format loses of random rows for fewer.
        runs_on_cpu: whether a dry run can call it.
    """

    name: ClassVar[str]
    module: ClassVar[str | None] = None
    is_16_bit: ClassVar[bool] = True
    error_limit: ClassVar[float] = 2e-2
    runs_on_cpu: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, rows: Rows): ...

    @abstractmethod
    def attend(self) -> torch.Tensor:
        """The step's attention, [batch, num_heads, head_dim]; may be captured in a CUDA graph."""

    def moved_bytes(self, work: Workload) -> int:
        """Bytes of K and V that one step reads."""
        return work.dense_bytes

    @classmethod
    def missing(cls, on_cpu: bool) -> str | None:
        """What keeps it from running here; None: nothing."""
        if on_cpu and not cls.runs_on_cpu:
            return "needs a GPU"
        try:
            cls.load()
        except Exception as error:  # of whatever kind another project fails with
            return f"{cls.module}: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        return None

    @classmethod
    def load(cls) -> None:
        """Import what `attend` calls.

        Raises:
            ImportError: it is not installed, or not usable.
        """
        if cls.module is not None:
            import_module(cls.module)

    def error(self, rows: Rows) -> float:
        """Root mean square of the error, over that of the float32 answer."""
        expected = rows.expected()
        return float((self.attend().float() - expected).norm() / expected.norm())


class Sdpa(Baseline):
    """torch's scaled_dot_product_attention over contiguous K and V; the heads of a group are its query rows."""

    name = "sdpa, group as queries"
    runs_on_cpu = True

    def __init__(self, rows: Rows):
        self.query = rows.query.unflatten(1, (rows.work.num_kv_heads, -1))
        self.key, self.value = (side.transpose(1, 2).contiguous() for side in (rows.key, rows.value))

    def attend(self) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(self.query, self.key, self.value).flatten(1, 2)


class SdpaGqa(Sdpa):
    """The same with torch's own grouping."""

    name = "sdpa, enable_gqa"

    def attend(self) -> torch.Tensor:
        query = self.query.flatten(1, 2)[:, :, None]
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, self.key, self.value, enable_gqa=True)[:, :, 0]


class SdpaCudnn(Sdpa):
    """cuDNN's attention behind torch's, which torch does not choose by itself."""

    name = "sdpa, cudnn"
    runs_on_cpu = False

    def attend(self) -> torch.Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return super().attend()


class FlashInfer(Baseline):
    """FlashInfer's BatchDecodeWithPagedKVCacheWrapper, planned for CUDA graphs."""

    name = "flashinfer"
    module = "flashinfer"
    block_size: ClassVar[int] = 16
    tensor_cores: ClassVar[bool] = False

    def __init__(self, rows: Rows):
        import flashinfer

        work, device = rows.work, rows.query.device
        key, value, table = rows.paged(self.block_size)
        self.query, self.pages = rows.query, (key, value)
        per_request = table.shape[1]
        indptr = rows.starts * per_request
        last = torch.full_like(rows.lengths, (work.context - 1) % self.block_size + 1)
        indices = table.flatten()
        self.wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.zeros(128 << 20, dtype=torch.uint8, device=device), "NHD", use_cuda_graph=True,
            use_tensor_cores=self.tensor_cores, paged_kv_indptr_buffer=torch.empty_like(indptr),
            paged_kv_indices_buffer=torch.empty_like(indices), paged_kv_last_page_len_buffer=torch.empty_like(last),
        )  # fmt: skip
        self.wrapper.plan(
            indptr, indices, last, work.spec.num_heads, work.num_kv_heads, work.head_dim, self.block_size,
            q_data_type=rows.query.dtype, kv_data_type=key.dtype, sm_scale=work.spec.scale,
        )  # fmt: skip

    def attend(self) -> torch.Tensor:
        return self.wrapper.run(self.query, self.pages)


class FlashInferTensorCores(FlashInfer):
    """The same on tensor cores, as vLLM uses it."""

    name = "flashinfer, tensor cores"
    tensor_cores = True


class FlashAttention(Baseline):
    """flash-attn's flash_attn_with_kvcache over pages of 256 tokens, its least."""

    name = "flash-attn"
    module = "flash_attn"

    def __init__(self, rows: Rows):
        from flash_attn import flash_attn_with_kvcache

        key, value, table = rows.paged(256)
        self.launch = partial(
            flash_attn_with_kvcache, rows.query[:, None], key, value, cache_seqlens=rows.lengths, block_table=table,
            softmax_scale=rows.work.spec.scale, causal=True,
        )  # fmt: skip

    def attend(self) -> torch.Tensor:
        return self.launch()[:, 0]


class Vllm(Baseline):
    """Base of vLLM's kernels."""

    module = "vllm"
    block_size: ClassVar[int] = 16

    @classmethod
    def load(cls) -> None:
        super().load()
        from vllm.triton_utils import HAS_TRITON

        if not HAS_TRITON:
            raise ImportError("this build of vLLM, or this machine, has Triton switched off")


class VllmFlashAttention(Vllm):
    """vLLM's FlashAttention, what it serves with on most GPUs."""

    name = "vllm, flash attention"

    @classmethod
    def load(cls) -> None:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

        if get_flash_attn_version() is None:
            raise ImportError(f"{flash_attn_varlen_func.__module__} serves no device here")

    def __init__(self, rows: Rows):
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

        key, value, table = rows.paged(self.block_size)
        self.launch = partial(
            flash_attn_varlen_func, q=rows.query, k=key, v=value, max_seqlen_q=1, cu_seqlens_q=rows.starts,
            max_seqlen_k=rows.work.context, seqused_k=rows.lengths, softmax_scale=rows.work.spec.scale, causal=True,
            block_table=table, fa_version=get_flash_attn_version(head_size=rows.work.head_dim),
        )  # fmt: skip

    def attend(self) -> torch.Tensor:
        return self.launch()


class VllmTriton(Vllm):
    """vLLM's unified Triton kernel, split over sequences as its backend splits it."""

    name = "vllm, triton"
    cache_dtype: ClassVar[torch.dtype | None] = None  # None: the model's
    segments: ClassVar[int] = 16

    def __init__(self, rows: Rows):
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention
        from vllm.v1.kv_cache_interface import KVQuantMode

        work, device = rows.work, rows.query.device
        pages = rows.paged(self.block_size)
        key, value = (side.to(self.cache_dtype or side.dtype) for side in (pages.key, pages.value))
        threshold = 128 // work.num_kv_heads  # more sequences are not split
        split = (max(threshold, 1), work.spec.num_heads, self.segments)
        sums = [torch.empty(*split, *dims, device=device) for dims in ((padded(work.head_dim),), (), ())]
        scales = torch.ones(1, device=device).expand(work.batch, work.num_kv_heads)
        self.output = torch.empty_like(rows.query)
        self.launch = partial(
            unified_attention, q=rows.query, k=key, v=value, out=self.output, cu_seqlens_q=rows.starts, max_seqlen_q=1,
            seqused_k=rows.lengths, max_seqlen_k=work.context, softmax_scale=work.spec.scale, causal=True,
            window_size=(-1, -1), block_table=pages.table, softcap=0, q_descale=None, k_descale=scales,
            v_descale=scales, seq_threshold_3D=threshold, num_par_softmax_segments=self.segments,
            softmax_segm_output=sums[0], softmax_segm_max=sums[1], softmax_segm_expsum=sums[2],
            kv_quant_mode=KVQuantMode.FP8_PER_TENSOR if self.cache_dtype else KVQuantMode.NONE,
        )  # fmt: skip

    def attend(self) -> torch.Tensor:
        self.launch()
        return self.output


class VllmTritonFp8(VllmTriton):
    """The same over a cache of fp8, one scale for all."""

    name = "vllm, triton, fp8"
    is_16_bit = False
    error_limit = 0.15
    cache_dtype = torch.float8_e4m3fn

    def moved_bytes(self, work: Workload) -> int:
        return work.dense_bytes // 2


class VllmTurboQuant(Vllm):
    """vLLM's TurboQuant kernels, as its backend launches them on NVIDIA GPUs."""

    is_16_bit = False
    preset: ClassVar[str]
    splits: ClassVar[int] = 32

    def __init__(self, rows: Rows):
        from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
        from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
        from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention

        work, device = rows.work, rows.query.device
        config = TurboQuantConfig.from_cache_dtype(self.preset, work.head_dim)
        rotation = hadamard(work.head_dim).to(device)
        centroids = get_centroids(work.head_dim, config.centroid_bits).to(device).float()
        codes = {
            "mse_bits": config.key_mse_bits, "key_packed_size": config.key_packed_size,
            "value_quant_bits": config.effective_value_quant_bits, "key_fp8": config.key_fp8,
        }  # fmt: skip
        table = rows.table(self.block_size)
        shape = (table.numel(), self.block_size, work.num_kv_heads, config.slot_size_aligned)
        cache = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.fill(rows, cache, table, rotation, centroids, codes)
        self.slot_bytes = config.slot_size_aligned
        self.launch = partial(
            triton_turboquant_decode_attention, rows.query, cache, table, rows.lengths, rotation, centroids,
            work.spec.scale, norm_correction=config.norm_correction, PiT=rotation, max_num_kv_splits=self.splits,
            **codes,
        )  # fmt: skip

    def fill(
        self, rows: Rows, cache: torch.Tensor, table: torch.Tensor, rotation: torch.Tensor, centroids: torch.Tensor,
        codes: dict[str, Any],
    ) -> None:  # fmt: skip
        """Store every token."""
        from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store

        centroids = centroids.sort().values
        midpoints = (centroids[:-1] + centroids[1:]) / 2
        for request, blocks in enumerate(table.long()):
            for tokens in torch.arange(rows.work.context, device=cache.device).split(STORED_AT_ONCE):
                slots = blocks[tokens // self.block_size] * self.block_size + tokens % self.block_size
                key, value = (side[request, tokens[0] : tokens[-1] + 1] for side in (rows.key, rows.value))
                triton_turboquant_store(key, value, cache, slots.int(), rotation, midpoints, **codes)

    def attend(self) -> torch.Tensor:
        return self.launch()

    def moved_bytes(self, work: Workload) -> int:
        return work.batch * work.context * work.num_kv_heads * self.slot_bytes


class VllmTurboQuantK8V4(VllmTurboQuant):
    """Keys of fp8, values of 4 bits."""

    name, preset, error_limit = "vllm, turboquant k8v4", "turboquant_k8v4", 0.2


class VllmTurboQuant4(VllmTurboQuant):
    """Keys and values of 4 bits."""

    name, preset, error_limit = "vllm, turboquant 4bit", "turboquant_4bit_nc", 0.3


class VllmTurboQuant3(VllmTurboQuant):
    """Keys and values of 3 bits."""

    name, preset, error_limit = "vllm, turboquant 3bit", "turboquant_3bit_nc", 0.5


BASELINES: tuple[type[Baseline], ...] = (
    *(Sdpa, SdpaGqa, SdpaCudnn, FlashInfer, FlashInferTensorCores, FlashAttention),
    *(VllmFlashAttention, VllmTriton, VllmTritonFp8, VllmTurboQuantK8V4, VllmTurboQuant4, VllmTurboQuant3),
)


def padded(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def usable(device: torch.device) -> tuple[list[type[Baseline]], list[str]]:
    """The baselines that can run here, and a line for each that cannot."""
    reasons = [(baseline, baseline.missing(device.type == "cpu")) for baseline in BASELINES]
    left_out = [f"baseline {baseline.name}: {reason}" for baseline, reason in reasons if reason]
    return [baseline for baseline, reason in reasons if not reason], left_out
