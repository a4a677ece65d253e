"""Tensor parallel: three CPU workers, each with one of the default model's three KV heads."""

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
        model, workers, text = sys.argv[1], int(sys.argv[2]), sys.argv[3]
        llm = LLM(
            model, dtype="float32", enforce_eager=True, max_model_len=1024, kv_cache_memory_bytes=32 << 20,
            tensor_parallel_size=workers, max_num_batched_tokens=128, block_size=64,
            additional_config={"kvserve": {"policy": "kivi-2bit"}},
        )
        prompts = [f"{name} told this story. {text} And {name} said:" for name in ("Anna", "Boris", "Chen", "Dalia")]
        sampling = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, logprobs=2)
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        texts = []
        for output in outputs:
            top = [{str(t): e.logprob for t, e in step.items()} for step in output.outputs[0].logprobs]
            texts.append([[str(t) for t in output.outputs[0].token_ids], top])
        capacity = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
        print("RESULT " + json.dumps({"texts": texts, "capacity": capacity}))
    """
)


def run(workers: int, script: str) -> dict:
    # More workers than cores: name the core of each, since vLLM's own choice wants one core more than workers.
    cores = sorted(os.sched_getaffinity(0))
    binding = "|".join(str(cores[rank % len(cores)]) for rank in range(workers))
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": binding, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [sys.executable, script, str(prepare_default_model()), str(workers), STORY * 3]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(lines[0].removeprefix("RESULT "))


@pytest.mark.slow
def test_three_workers_give_the_text_of_one(tmp_path: os.PathLike[str]) -> None:
    script = os.path.join(tmp_path, "serve.py")
    with open(script, "w") as file:
        file.write(SCRIPT)
    one, three = run(1, script), run(3, script)
    assert_same_texts([steps_of(*text) for text in one["texts"]], [steps_of(*text) for text in three["texts"]])
    # Every worker has the same bytes for a third of the heads.
    assert three["capacity"] == pytest.approx(3 * one["capacity"], rel=0.05)
