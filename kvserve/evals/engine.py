"""The engine of one policy in a child process, as the benchmark starts it, with teacher forcing.

Seams: those of kvserve/measuring/engines.py, and `LLM(logits_processors=[...])`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvserve.measuring.engines import EngineConfig, EngineHost

HOST = "kvserve.evals.engine:EvalHost"


@dataclass(frozen=True)
class Request:
    """One prompt and what follows it.

    Attributes:
        prompt: token ids; what a policy cuts at the prompt's end is these.
        forced: output tokens that are given, one decode step each.
        free: at most so many tokens are generated greedily behind them, until the model ends its answer.
        record: file for the distributions before each forced token, see kvserve/evals/forcing.py.
        ends: whether an end token ends the answer.
    """

    prompt: list[int]
    forced: list[int]
    free: int = 0
    record: Path | None = None
    ends: bool = True


class EvalHost(EngineHost):
    """The child's side."""

    def __init__(self, name: str, config: EngineConfig, **options: Any) -> None:
        from kvserve.evals.forcing import PROCESSOR

        super().__init__(name, config, logits_processors=[PROCESSOR], **options)

    def complete(self, requests: list[Request]) -> list[list[int]]:
        """The freely generated tokens of each request, all submitted together; nothing is read from the prefix cache,
        so that equal calls compute equal numbers."""
        inputs: Any = [{"prompt_token_ids": request.prompt} for request in requests]
        outputs = self.llm.generate(inputs, [sampling(request) for request in requests], use_tqdm=False)
        results = []
        for request, output in zip(requests, outputs, strict=True):
            found = list(output.outputs[0].token_ids)
            if found[: len(request.forced)] != request.forced:
                raise RuntimeError("the engine did not follow the forced tokens")
            free = found[len(request.forced) :]
            results.append(until_end(free, self._end_tokens()) if request.ends else free)
        return results

    def _end_tokens(self) -> set[int]:
        """Ids that end an answer, as the model's generation_config.json and its tokenizer name them."""
        config = self.llm.llm_engine.vllm_config.model_config
        named = config.try_get_generation_config().get("eos_token_id") or []
        ids = {named} if isinstance(named, int) else set(named)
        return ids if config.skip_tokenizer_init else ids | {self.llm.get_tokenizer().eos_token_id}


def until_end(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens before the first that ends the answer."""
    return tokens[: next((index for index, token in enumerate(tokens) if token in ends), len(tokens))]


def sampling(request: Request) -> Any:
    """Greedy SamplingParams with the request's forced tokens."""
    from vllm import SamplingParams

    from kvserve.evals.forcing import FORCED, RECORD

    extra: dict[str, Any] = {FORCED: request.forced} if request.forced else {}
    if request.record is not None:
        extra[RECORD] = str(request.record)
    return SamplingParams(
        temperature=0.0,
        max_tokens=len(request.forced) + request.free,
        # vLLM would also stop at a forced end token, such as the one that a chat template puts behind the question.
        ignore_eos=bool(request.forced) or not request.ends,
        detokenize=False,
        skip_reading_prefix_cache=True,
        extra_args=extra or None,
    )
