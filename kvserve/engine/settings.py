"""What `additional_config={"kvserve": {...}}` asks for, checked against the rest of vLLM's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvserve.checks import UnsupportedError, check_model
from kvserve.compat import check_vllm_version
from kvserve.pages.layout import PageLayout
from kvserve.policies.base import Policy
from kvserve.policies.loading import policy_from_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CONFIG_KEY = "kvserve"


@dataclass(frozen=True)
class EngineSettings:
    """The policy in effect and the numbers of the engine that its pages depend on."""

    policy: Policy
    block_size: int
    model_dtype: torch.dtype

    @classmethod
    def from_vllm_config(cls, vllm_config: VllmConfig) -> EngineSettings | None:
        """Settings of this engine, or None where no policy is set.

        Raises:
            PolicyError: the policy does not exist or does not validate.
            UnsupportedError: another setting or the model rules the policy out; the message names the fix.
        """
        additional: Any = vllm_config.additional_config
        section = additional.get(CONFIG_KEY) if isinstance(additional, dict) else None
        if section is None:
            return None
        check_vllm_version()
        policy = policy_from_config(section)
        _check_engine(vllm_config)
        check_model(vllm_config.model_config.hf_config.to_dict(), policy)
        return cls(policy, vllm_config.cache_config.block_size, vllm_config.model_config.dtype)

    def layout(self, head_dim: int) -> PageLayout:
        """The pages of attention layers with this head_dim."""
        return PageLayout.build(self.policy, head_dim, self.block_size, self.model_dtype)


def _check_engine(config: VllmConfig) -> None:
    cache, parallel = config.cache_config, config.parallel_config
    refused = (
        (cache.cache_dtype not in ("auto", None), "--kv-cache-dtype", "the policy decides how the cache is written"),
        (config.speculative_config is not None, "--speculative-config", "speculative decoding is not proven with it"),
        (config.kv_transfer_config is not None, "--kv-transfer-config", "KV connectors do not know its pages"),
        (parallel.decode_context_parallel_size > 1, "--decode-context-parallel-size", "its pages are not sharded"),
        (bool(cache.kv_cache_dtype_skip_layers), "--kv-cache-dtype-skip-layers", "the policy covers every layer"),
    )
    for wrong, flag, why in refused:
        if wrong:
            raise UnsupportedError(f"remove {flag}: a kvserve policy is set and {why}")
