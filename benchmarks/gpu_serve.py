"""Serving end to end on a GPU: greedy texts against those of the CPU, and output tokens/s with CUDA graphs.

    python -m benchmarks.gpu_serve [--policies none kivi-4bit ...] [--model-runner 2] [--out FILE.json]
    python -m benchmarks.gpu_serve --write-reference      # on a CPU: the texts that a GPU is compared with

Texts are compared in float32, token by token: two devices round differently, so a text may go another way where the two
best tokens of the CPU were nearly equal, and nowhere else. Throughput is measured in bfloat16, one run after a warm-up.
Exit code 1: a text differs. Runs on a CPU, too, which checks this script and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = Path(__file__).with_name("gpu_reference_texts.json")
POLICIES = ("none", "kivi-4bit", "kivi-2bit", "kv-compress-2bit")
STOCK = "stock"
NEAR_TIE_NATS = 0.05
PROMPT_SENTENCES = (3, 12, 30, 45)  # about 70 to 1100 tokens
MAX_MODEL_LEN, NEW_TOKENS = 2048, 80  # every text goes over the border of a tile
LOAD_REQUESTS, LOAD_PROMPT, LOAD_TOKENS = 32, 512, 256


# -- one engine, in a process of its own -------------------------------------------------------------------------------


def make_engine(policy: str, dtype: str) -> Any:
    """vLLM with the policy, or stock vLLM; CUDA graphs on a GPU."""
    from vllm import LLM

    from kvserve.default_model import prepare_default_model
    from kvserve.engine.device import backend_options, device_type
    from kvserve.engine.settings import scheduler_options
    from kvserve.policies.loading import load_policy

    on_cpu = device_type() == "cpu"
    options: dict[str, Any] = {"dtype": dtype, "max_model_len": MAX_MODEL_LEN, "enforce_eager": on_cpu}
    if on_cpu:
        options["kv_cache_memory_bytes"] = 1 << 29
    if policy != STOCK:
        section = {"policy": policy}
        options |= {**backend_options(), "block_size": 64, "additional_config": {"kvserve": section}}
        if load_policy(policy).eviction:
            options |= scheduler_options()
    return LLM(model=str(prepare_default_model()), max_num_seqs=LOAD_REQUESTS, **options)


def texts(llm: Any, prompts: list[list[int]]) -> list[list[tuple[int, float]]]:
    """Greedy (token, nats by which it beat the second best) of each prompt, one request after the other."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=2, detokenize=False)
    found = []
    for prompt in prompts:
        (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        steps = []
        for token, top in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True):
            best, second = sorted((entry.logprob for entry in top.values()), reverse=True)[:2]
            steps.append((token, round(best - second, 4)))
        found.append(steps)
    return found


def tokens_per_second(llm: Any) -> float:
    """Output tokens/s of LOAD_REQUESTS requests at once."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=LOAD_TOKENS, ignore_eos=True, detokenize=False)
    for seed in (1, 2):  # the first run is the warm-up
        draw = random.Random(seed)
        prompts = [[draw.randrange(100, 40000) for _ in range(LOAD_PROMPT)] for _ in range(LOAD_REQUESTS)]
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
    return LOAD_REQUESTS * LOAD_TOKENS / seconds


def run_child(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    llm = make_engine(job["policy"], job["dtype"])
    config = llm.llm_engine.vllm_config
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "model_runner": "V2" if config.use_v2_model_runner else "V1",
        "cuda_graphs": str(config.compilation_config.cudagraph_mode),
    }
    if job["prompts"]:
        result["texts"] = texts(llm, job["prompts"])
    else:
        result["tokens_per_second"] = round(tokens_per_second(llm), 1)
    llm.llm_engine.engine_core.shutdown()
    return result


# -- all of them -------------------------------------------------------------------------------------------------------


def run(policy: str, dtype: str, prompts: list[list[int]] | None, model_runner: int) -> dict[str, Any]:
    """An engine in a child process: its texts, or without prompts its throughput."""
    environment = {
        **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_USE_V2_MODEL_RUNNER": str(int(model_runner == 2)),
    }  # fmt: skip
    if _is_cpu():
        del environment["VLLM_USE_V2_MODEL_RUNNER"]
    job = json.dumps({"policy": policy, "dtype": dtype, "prompts": prompts})
    command = [sys.executable, "-m", "benchmarks.gpu_serve", "--child", job]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{policy}: the engine did not answer (exit code {done.returncode}); its log is above")
    return json.loads(lines[0].removeprefix("RESULT "))


def _is_cpu() -> bool:
    import torch

    return not torch.cuda.is_available()


def make_prompts() -> list[list[int]]:
    from transformers import AutoTokenizer

    from kvserve.default_model import prepare_default_model
    from kvserve.prose import shuffled_prose

    tokenizer = AutoTokenizer.from_pretrained(str(prepare_default_model()))
    return [tokenizer.encode(shuffled_prose(seed, count)) for seed, count in enumerate(PROMPT_SENTENCES)]


def write_reference(policies: list[str]) -> None:
    """The texts of the CPU kernels, in float32."""
    prompts = make_prompts()
    found = {policy: run(policy, "float32", prompts, 1)["texts"] for policy in policies}
    REFERENCE.write_text(json.dumps({"prompts": prompts, "texts": found}, separators=(",", ":")) + "\n")
    print(f"wrote {REFERENCE}")


def first_difference(expected: list[list[Any]], actual: list[list[Any]]) -> int | None:
    """Index of the first token that differs."""
    pairs = enumerate(zip(expected, actual, strict=True))
    return next((i for i, (want, got) in pairs if want[0] != got[0]), None)


def compare(policy: str, expected: list[list[list[Any]]], actual: list[list[list[Any]]]) -> bool:
    """Whether all texts agree but for near ties; prints where they do not."""
    fine, identical = True, 0
    for number, (want, got) in enumerate(zip(expected, actual, strict=True)):
        at = first_difference(want, got)
        identical += at is None
        if at is not None:
            near_tie = want[at][1] < NEAR_TIE_NATS
            fine &= near_tie
            print(f"  {policy}, prompt {number}: token {at} differs, won by {want[at][1]} nats"
                  f"{', a near tie' if near_tie else ''}")  # fmt: skip
    print(f"  {policy}: {identical} of {len(expected)} texts identical{'' if fine else ', NOT the same'}")
    return fine


def save(path: Path | None, record: dict[str, Any]) -> None:
    """What there is so far: a run that is cut off leaves it."""
    if path is not None:
        path.write_text(json.dumps(record, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--model-runner", type=int, choices=(1, 2), default=2)
    parser.add_argument("--no-throughput", action="store_true")
    parser.add_argument("--write-reference", action="store_true")
    parser.add_argument("--out", "--result", type=Path, help="JSON file, written after every engine")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("RESULT " + json.dumps(run_child(json.loads(args.child))))
        return 0
    if args.write_reference:
        write_reference(args.policies)
        return 0
    reference, record, fine = json.loads(REFERENCE.read_text()), {}, True
    for policy in args.policies:
        found = run(policy, "float32", reference["prompts"], args.model_runner)
        print(f"{policy} on {found['device']}, model runner {found['model_runner']}, graphs {found['cuda_graphs']}")
        same = compare(policy, reference["texts"][policy], found.pop("texts"))
        record[policy], fine = {**found, "same_texts": same}, fine and same
        save(args.out, record)
    for policy in () if args.no_throughput else (STOCK, *args.policies):
        found = run(policy, "bfloat16", None, args.model_runner)
        print(f"{policy}: {found['tokens_per_second']:,} output tokens/s, graphs {found['cuda_graphs']}")
        record[policy] = {**record.get(policy, {}), **found}
        save(args.out, record)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
