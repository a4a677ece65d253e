"""Which device vLLM runs on, and how it finds kvserve's backend there.

Seams: `vllm.platforms.current_platform`; `AttentionConfig.backend`, which a CUDA platform follows where it is set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvserve.engine.plugin import BACKEND_PATH
from kvserve.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

LEAST_CAPABILITY = 8  # major compute capability that the kernels are compiled for


def device_type() -> str:
    """cpu, cuda, rocm (which vLLM calls cuda, too), or another of vLLM's names."""
    from vllm.platforms import current_platform

    return "rocm" if current_platform.is_rocm() else str(current_platform.device_type)


def gpu_capability() -> tuple[int, int]:
    """Compute capability of the GPU."""
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability()
    assert capability is not None
    return capability.major, capability.minor


def backend_name() -> str:
    """The registered name that vLLM looks up again (`AttentionBackendEnum`)."""
    return "CPU_ATTN" if device_type() == "cpu" else "CUSTOM"


def backend_options() -> dict[str, Any]:
    """vLLM's engine arguments that select kvserve's backend."""
    return {} if device_type() == "cpu" else {"attention_backend": backend_name()}


def check_gpu(config: VllmConfig) -> None:
    """Refuse what would take kvserve's backend away on a GPU, or split its batches.

    Raises:
        UnsupportedError: naming the option.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if config.attention_config.backend is not AttentionBackendEnum.CUSTOM:
        raise UnsupportedError(
            "on a GPU a kvserve policy needs --attention-backend CUSTOM (`kvserve serve` sets it); without it vLLM "
            "would serve uncompressed"
        )
    if AttentionBackendEnum.CUSTOM.get_path() != BACKEND_PATH:
        raise UnsupportedError(
            f"the attention backend CUSTOM is {AttentionBackendEnum.CUSTOM.get_path()}, of another plugin; leave that "
            "plugin out of VLLM_PLUGINS to use kvserve"
        )
    if config.attention_config.backend_per_kind:
        raise UnsupportedError("kvserve serves every layer; drop backend_per_kind from --attention-config")
    if config.parallel_config.use_ubatching:
        raise UnsupportedError("kvserve does not split batches in two; drop --enable-dbo and --ubatch-size")
