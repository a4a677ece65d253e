"""Run one prompt through a vLLM engine in this process and note what is kept of it.

Seams: `vllm.LLM`, with `VLLM_ENABLE_V1_MULTIPROCESSING=0` so that its worker, and kvserve's log in it, are in reach.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvserve.checks import check_model, text_config
from kvserve.engine.environment import allowed_plugins, cpu_has_bfloat16
from kvserve.errors import UsageError
from kvserve.inspect.result import Inspection, KeptTokens
from kvserve.measuring.shape import ModelShape
from kvserve.policies.base import Policy
from kvserve.policies.loading import policy_content

_MAX_BATCHED_TOKENS = 2048


def inspect_prompt(policy: Policy, model: str, text: str, dtype: str | None = None) -> Inspection:
    """What `policy` keeps of `text`.

    Args:
        model: a Hugging Face folder or name.
        dtype: of the model; None: its own, or float32 on a CPU without bfloat16 arithmetic.

    Raises:
        UsageError: the prompt is empty, longer than the model takes, or so short that everything is kept.
        UnsupportedError: a model that kvserve refuses.
    """
    _prepare_environment()
    from transformers import AutoConfig, AutoTokenizer

    assert policy.eviction is not None
    try:
        config, tokenizer = AutoConfig.from_pretrained(model).to_dict(), AutoTokenizer.from_pretrained(model)
    except OSError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UsageError(f"cannot load {model}: {reason}; give a Hugging Face folder or name with --model") from None
    check_model(config, policy, model)
    token_ids = tokenizer.encode(text)
    longest = text_config(config).get("max_position_embeddings")
    if not token_ids:
        raise UsageError("the prompt is empty; give some text, or a file with --prompt-file")
    if longest and len(token_ids) >= longest:
        raise UsageError(f"the prompt has {len(token_ids)} tokens and the model takes {longest}; shorten it")
    options = _engine_options(policy, ModelShape.from_hf(dict(text_config(config))), len(token_ids), dtype)
    kept, report = _run(model, token_ids, options)
    if not kept.num_tokens:
        raise UsageError(
            f"policy {policy.name} keeps all {len(token_ids)} tokens of this prompt: "
            "give a longer one, or a higher --compression-rate"
        )
    limit = f"1 of {policy.eviction.rate:g}" if policy.eviction.rate else f"{policy.eviction.max_tokens} tokens"
    words = [tokenizer.decode([token_id]) for token_id in token_ids]
    return Inspection(policy.name, Path(model).name, limit, words, kept.positions, report)


def _prepare_environment() -> None:
    """Read by vLLM when it is imported; its log would hide the drawing."""
    from importlib.metadata import entry_points

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    discovered = {entry.name for entry in entry_points(group="vllm.general_plugins")}
    os.environ["VLLM_PLUGINS"] = allowed_plugins(os.environ.get("VLLM_PLUGINS"), discovered)


def _engine_options(policy: Policy, shape: ModelShape, num_tokens: int, dtype: str | None) -> dict[str, Any]:
    """Arguments of vllm.LLM for one prompt, with a pool that holds it whole and evicted."""
    import torch

    from kvserve.engine.device import backend_options
    from kvserve.engine.settings import scheduler_options

    assert policy.eviction is not None
    num_blocks, block_bytes = shape.longest_request(policy, policy.tile_tokens, torch.float32, num_tokens + 1)
    return scheduler_options() | {
        "dtype": dtype or ("auto" if cpu_has_bfloat16() else "float32"),
        "max_model_len": num_tokens + 1,
        "max_num_seqs": 1,
        "max_num_batched_tokens": max(_MAX_BATCHED_TOKENS, policy.eviction.window),
        "kv_cache_memory_bytes": (num_blocks + 8) * block_bytes,
        "block_size": policy.tile_tokens,
        **backend_options(),
        "additional_config": {"kvserve": {"policy": policy_content(policy)}},
        "enforce_eager": True,
        "use_tqdm_on_load": False,
    }


def _run(model: str, token_ids: list[int], options: dict[str, Any]) -> tuple[KeptTokens, dict[str, Any]]:
    """One prompt, one generated token: the step that makes it evicts."""
    with _stdout_to_stderr():
        from vllm import LLM, SamplingParams

        from kvserve.engine.stats import worker_log

        llm = LLM(model=model, **options)
        recorder = worker_log.recorder = KeptTokens()
        try:
            sampling = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
            (output,) = llm.generate([{"prompt_token_ids": token_ids}], sampling, use_tqdm=False)
        finally:
            worker_log.recorder = None
            llm.llm_engine.engine_core.shutdown()
    return recorder, dict(output.kv_transfer_params or {})["kvserve"]


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """vLLM's libraries write to file descriptor 1, which is for the drawing."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
