"""Tensor parallel: three CPU workers, each with one of the default model's three KV heads.

Their matrix products sum in another order: stock vLLM's log-probabilities move by 1e-5. A compressed cache turns such
noise into other codes where a key or value lies on the border of two, so what may move grows with the step of the
codes: measured means are 0.001 nats at 8 bits, 0.008 at 4 and 0.03 at 2, no more than what two instruction sets of one
worker differ by.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
from engine_cases import STORY
from greedy import assert_same_texts, steps_of

from kvserve.default_model import prepare_default_model

SCRIPT = textwrap.dedent(
    """
    import json, sys
    from vllm import LLM, SamplingParams

    if __name__ == "__main__":
        model, workers, policy, text = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
        llm = LLM(
            model, dtype="float32", enforce_eager=True, max_model_len=1024, kv_cache_memory_bytes=32 << 20,
            tensor_parallel_size=workers, max_num_batched_tokens=128, block_size=64,
            additional_config={"kvserve": {"policy": policy}},
        )
        prompts = [f"{name} told this story. {text} And {name} said:" for name in ("Anna", "Boris", "Chen", "Dalia")]
        sampling = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, logprobs=2, prompt_logprobs=0)
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        texts, prompt_logprobs = [], []
        for output in outputs:
            top = [{str(t): e.logprob for t, e in step.items()} for step in output.outputs[0].logprobs]
            texts.append([[str(t) for t in output.outputs[0].token_ids], top])
            prompt_logprobs += [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]]
        capacity = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
        print("RESULT " + json.dumps({"texts": texts, "prompt_logprobs": prompt_logprobs, "capacity": capacity}))
    """
)


def run(workers: int, policy: str, script: str) -> dict:
    # More workers than cores: name the core of each, since vLLM's own choice wants one core more than workers.
    cores = sorted(os.sched_getaffinity(0))
    binding = "|".join(str(cores[rank % len(cores)]) for rank in range(workers))
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": binding, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [sys.executable, script, str(prepare_default_model()), str(workers), policy, STORY * 3]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(lines[0].removeprefix("RESULT "))


def mean_distance(one: dict, three: dict) -> float:
    """Mean difference of the prompt tokens' log-probabilities, in nats."""
    pairs = list(zip(one["prompt_logprobs"], three["prompt_logprobs"], strict=True))
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "nats"), [("int8", 0.005), ("kivi-2bit", 0.1)])
def test_three_workers_answer_as_one_does(policy: str, nats: float, tmp_path: os.PathLike[str]) -> None:
    script = os.path.join(tmp_path, "serve.py")
    with open(script, "w") as file:
        file.write(SCRIPT)
    one, three = run(1, policy, script), run(3, policy, script)
    assert mean_distance(one, three) < nats
    if policy == "int8":
        assert_same_texts([steps_of(*text) for text in one["texts"]], [steps_of(*text) for text in three["texts"]])
    # Every worker has the same bytes for a third of the heads.
    assert three["capacity"] == pytest.approx(3 * one["capacity"], rel=0.05)
