"""vLLM's scheduler with kvserve's connector and block manager, and a worker that computes nothing."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # read by vLLM when it is imported

import torch
from transformers import LlamaConfig
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from kvserve.engine.scheduler import make_scheduler
from kvserve.engine.settings import EngineSettings, scheduler_options
from kvserve.engine.spec import EvictingPageSpec

init_none_hash(sha256)
BLOCK_SIZE = 64
NUM_LAYERS = 12


def make_config(
    folder: Path, policy: str, changes: dict[str, Any] | None = None, max_model_len: int = 1100, **options: Any
) -> VllmConfig:
    """The configuration of an engine for a model whose weights nobody needs."""
    LlamaConfig(
        vocab_size=512, hidden_size=192, intermediate_size=256, num_hidden_layers=NUM_LAYERS, num_attention_heads=3,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=8192, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    defaults: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 256}
    arguments = EngineArgs(
        str(folder), dtype="float32", enforce_eager=True, block_size=BLOCK_SIZE, max_model_len=max_model_len,
        skip_tokenizer_init=True, additional_config={"kvserve": {"policy": policy, "set": changes or {}}},
        **scheduler_options(), **(defaults | options),
    )  # fmt: skip
    return arguments.create_engine_config()


class Engine:
    """An engine core without a model: it schedules, and every request that is due gets a token.

    Args:
        num_blocks: blocks that requests can have; vLLM's null block comes on top.
        steps_ahead: steps that are scheduled before the output of the first is there; 1 as in asynchronous scheduling.

    Attributes:
        ended: the last outputs of requests.
        least_free: the fewest blocks that were free once a step was scheduled.
    """

    def __init__(self, config: VllmConfig, num_blocks: int, steps_ahead: int = 0) -> None:
        settings = EngineSettings.from_vllm_config(config)
        assert settings is not None
        self.layout = settings.layout(64)
        dense = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=64, dtype=torch.float32)
        group = KVCacheGroupSpec(["layer"], EvictingPageSpec.from_attention(dense, self.layout))
        config.cache_config.num_gpu_blocks = num_blocks + 1
        config.scheduler_config.async_scheduling = steps_ahead > 0
        self.scheduler: Any = make_scheduler(
            config, kv_cache_config=KVCacheConfig(num_blocks + 1, kv_cache_tensors=[], kv_cache_groups=[group]),
            structured_output_manager=StructuredOutputManager(config), block_size=BLOCK_SIZE, log_stats=False,
        )  # fmt: skip
        self.steps_ahead, self.under_way = steps_ahead, deque[Any]()
        self.hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        self.ended: dict[str, EngineCoreOutput] = {}
        self.least_free = num_blocks

    @property
    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def add(
        self, request_id: str, prompt: list[int], max_tokens: int, arguments: dict[str, Any] | None = None
    ) -> Request:
        """A request that generates `max_tokens` tokens; `arguments`: its vllm_xargs."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, extra_args=arguments)
        params.update_from_generation_config({}, eos_token_id=0)
        request = Request(request_id, prompt, params, None, block_hasher=self.hasher)
        self.scheduler.add_request(request)
        return request

    def step(self) -> int:
        """Schedule a step, take the output of the oldest; returns how many tokens the new step computes."""
        output = self.scheduler.schedule()
        self.least_free = min(self.least_free, self.free_blocks)
        live = [(name, self.scheduler.requests.get(name)) for name in output.num_scheduled_tokens]
        due = {name for name, request in live if request and not request.is_prefill_chunk}
        self.under_way.append((output, due))
        if len(self.under_way) > self.steps_ahead or not output.total_num_scheduled_tokens:
            self._finish_step()
        return output.total_num_scheduled_tokens

    def _finish_step(self) -> None:
        output, due = self.under_way.popleft()
        names = list(output.num_scheduled_tokens)
        tokens = [[7] if name in due else [] for name in names]
        result = ModelRunnerOutput(names, {name: index for index, name in enumerate(names)}, sampled_token_ids=tokens)
        for outputs in self.scheduler.update_from_output(output, result).values():
            self.ended |= {last.request_id: last for last in outputs.outputs if last.finish_reason is not None}

    def run(self, most_steps: int = 100_000) -> None:
        """Until every request ended.

        Raises:
            AssertionError: nothing is computed any more, or it takes more steps than `most_steps`.
        """
        idle = 0
        for _ in range(most_steps):
            if not self.scheduler.has_requests():
                return
            idle = 0 if self.step() else idle + 1
            assert idle <= 2 + self.steps_ahead, f"nothing is scheduled of {sorted(self.scheduler.requests)}"
        raise AssertionError(f"{sorted(self.scheduler.requests)} do not end")
