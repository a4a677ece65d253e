"""One vLLM engine in a child process. Everything the benchmark asks of vLLM's Python API is here.

Seams: `vllm.LLM`, `LLM.llm_engine.add_request/step`, `SamplingParams.skip_reading_prefix_cache`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from kvserve.measuring.children import Child
from kvserve.measuring.shape import ModelShape
from kvserve.policies.loading import load_policy, policy_content

STOCK = "stock"
STOCK_BLOCK_SIZE = 128  # vLLM's default on CPUs
# The worker of an idle engine spins for a second after its last step, then sleeps (about 1 % of a core is left).
SETTLE_SECONDS = 1.5
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # vLLM's default without a KV connector; with one it takes another core from the workers.
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # lets `info` ask the worker for its thread count
}


@dataclass(frozen=True)
class EngineConfig:
    """What all engines of one comparison have in common.

    Attributes:
        max_model_len: tokens of the longest request.
        enforce_eager: no torch.compile, as `kvserve serve` runs on CPUs unless told otherwise.
        kv_bytes: size of the KV pool; None: what `num_requests` of the longest requests need, each engine in its own
            format, so that several engines fit into memory together.
        scheduler_options: max_num_seqs, max_num_batched_tokens; vLLM's defaults where not given.
    """

    model: str
    shape: ModelShape
    dtype: str
    max_model_len: int
    seed: int
    enforce_eager: bool = True
    kv_bytes: int | None = None
    num_requests: int = 1
    scheduler_options: dict[str, int] = field(default_factory=dict)


class Generated(NamedTuple):
    """Outputs of one `generate` call, in the order of the prompts."""

    tokens: list[list[int]]
    seconds: float


class Engine(Child):
    """The parent's side of an engine.

    Args:
        name: "stock", a policy, or the path of one.
        host: what to create in the child, an EngineHost.
    """

    _last_used: tuple[str, float] = ("", 0.0)

    def __init__(self, name: str, config: EngineConfig, host: str = "kvserve.measuring.engines:EngineHost") -> None:
        kwargs = {"name": name, "config": config}
        # Without its plugins vLLM is what a user without kvserve has.
        env = {**ENVIRONMENT, "VLLM_PLUGINS": "" if name == STOCK else "kvserve"}
        start = time.perf_counter()
        super().__init__(Path(name).name, host, kwargs, env)
        self.start_seconds = time.perf_counter() - start

    def call(self, method: str, **kwargs: Any) -> Any:
        """As Child.call, after the engine used before this one has gone to sleep."""
        name, when = Engine._last_used
        if name != self.name:
            time.sleep(max(0.0, when + SETTLE_SECONDS - time.monotonic()))
        try:
            return super().call(method, **kwargs)
        finally:
            Engine._last_used = (self.name, time.monotonic())


class EngineHost:
    """The child's side: holds a vllm.LLM, with further `options` of it."""

    def __init__(self, name: str, config: EngineConfig, **options: Any) -> None:
        from vllm import LLM

        from kvserve.engine.device import backend_options
        from kvserve.engine.settings import scheduler_options

        self.kv_bytes = config.kv_bytes or pool_bytes(name, config)
        extra: dict[str, Any] = {}
        if name != STOCK:
            policy = load_policy(name)
            _require_plugin()
            extra = {
                **backend_options(),
                "block_size": policy.tile_tokens,
                "additional_config": {"kvserve": {"policy": policy_content(policy)}},
            }
            if policy.eviction:
                extra |= scheduler_options()
        self.llm = LLM(
            config.model,
            dtype=config.dtype,
            max_model_len=config.max_model_len,
            kv_cache_memory_bytes=self.kv_bytes,
            enable_prefix_caching=True,
            seed=config.seed,
            enforce_eager=config.enforce_eager,
            **config.scheduler_options,
            **extra,
            **options,
        )
        self._request_count = 0

    def info(self) -> dict[str, Any]:
        """Resolved settings of the engine."""
        config = self.llm.llm_engine.vllm_config
        return {
            "kv_bytes": self.kv_bytes,
            "block_size": config.cache_config.block_size,
            "num_blocks": config.cache_config.num_gpu_blocks,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "worker_threads": self.llm.collective_rpc(worker_threads)[0],
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
        }

    def generate(
        self, prompts: list[list[int]], max_tokens: int, ignore_eos: bool = True, reuse_prefixes: bool = False
    ) -> Generated:
        """Greedy outputs of all prompts, submitted together."""
        params = self._params(max_tokens, ignore_eos, reuse_prefixes)
        inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        start = time.perf_counter()
        outputs = self.llm.generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        return Generated([list(output.outputs[0].token_ids) for output in outputs], seconds)

    def decode_steps(self, prompts: list[list[int]], num_steps: int) -> list[float]:
        """Seconds of each of `num_steps` steps in which all prompts decode.

        The prompts' full tiles may come from the prefix cache, that is from this engine's earlier call.
        """
        engine = self.llm.llm_engine
        params = self._params(num_steps + 2, ignore_eos=True, reuse_prefixes=True)
        for prompt in prompts:
            self._request_count += 1
            engine.add_request(f"decode-{self._request_count}", {"prompt_token_ids": prompt}, params)
        produced: dict[str, int] = {}
        steps: list[float] = []
        while engine.has_unfinished_requests():
            all_decode = len(produced) == len(prompts) and len(steps) < num_steps
            start = time.perf_counter()
            outputs = engine.step()
            seconds = time.perf_counter() - start
            for output in outputs:
                produced[output.request_id] = len(output.outputs[0].token_ids)
            if all_decode:
                if len(outputs) != len(prompts):
                    raise RuntimeError(f"{len(outputs)} of {len(prompts)} requests advanced: the KV pool is too small")
                steps.append(seconds)
        return steps

    def log_likelihoods(self, windows: list[list[int]]) -> list[float]:
        """Sum of the log probabilities (nats) of tokens 1.. of each window given those before them."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        sums = []
        for window in windows:
            prompt: Any = {"prompt_token_ids": window}
            output = self.llm.generate([prompt], params, use_tqdm=False)[0]
            found = output.prompt_logprobs
            assert found is not None and len(found) == len(window)
            sums.append(sum(found[i][window[i]].logprob for i in range(1, len(window))))  # type: ignore[index]
        return sums

    def _params(self, max_tokens: int, ignore_eos: bool, reuse_prefixes: bool) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,
            ignore_eos=ignore_eos,
            detokenize=False,
            skip_reading_prefix_cache=not reuse_prefixes,
        )

    def close(self) -> None:
        """End the engine core and its worker."""
        self.llm.llm_engine.engine_core.shutdown()


def pool_bytes(name: str, config: EngineConfig) -> int:
    """KV bytes that hold `num_requests` requests of max_model_len tokens and a tenth more, for prefix hits."""
    blocks, block_bytes = _longest_request(name, config)
    return int(1.1 * config.num_requests * (blocks + 1) + 2) * block_bytes


def least_pool_bytes(name: str, config: EngineConfig) -> int:
    """KV bytes that hold one request of max_model_len tokens, and vLLM's null block."""
    blocks, block_bytes = _longest_request(name, config)
    return (blocks + 1) * block_bytes


def _longest_request(name: str, config: EngineConfig) -> tuple[int, int]:
    """Blocks of a request of max_model_len tokens at its widest, and bytes of a block."""
    import torch

    policy = load_policy("none" if name == STOCK else name)
    block_size = STOCK_BLOCK_SIZE if name == STOCK else policy.tile_tokens
    return config.shape.longest_request(policy, block_size, getattr(torch, config.dtype), config.max_model_len)


def worker_threads(worker: Any) -> int:
    """OpenMP threads of a worker; vLLM leaves one core of several to its engine core."""
    import torch

    return torch.get_num_threads()


def _require_plugin() -> None:
    from importlib.metadata import entry_points

    if not any(point.name == "kvserve" for point in entry_points(group="vllm.general_plugins")):
        raise RuntimeError("kvserve is not installed as a vLLM plugin; run `pip install -e .` first")
