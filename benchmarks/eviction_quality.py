"""What evicting policies cost: needles found, and perplexity of what follows a prompt, at several rates.

    python -m benchmarks.eviction_quality --text wikitext2-test.txt --prompts-out prompts.json --out ours.json

Attention alone, in float32 (see evicted_model.py): the codec of a policy is not part of it. With `--prompts-out` the
prompts and the numbers of tokens to keep go to a file, so that other implementations can be measured on them
(benchmarks/kvpress_parity.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.evicted_model import EvictedModel, Prompt
from benchmarks.eviction_prompts import PromptSet
from kvserve.accounting.plan import policy_plan
from kvserve.arguments.parser import public_argv
from kvserve.measuring.machine import machine, versions
from kvserve.measuring.results import SCHEMA_VERSION, write_json
from kvserve.pages.layout import PageLayout
from kvserve.policies.base import Policy
from kvserve.policies.loading import load_policy
from kvserve.policies.registry import policy_names

DENSE, DENSE_RATE = "none", "1"
MAX_ANSWER_TOKENS = 16
Step = tuple[Callable[[PromptSet, int], None], int, str]
Table = dict[str, dict[str, list[Any]]]  # policy, rate: one entry a prompt


class Measurement:
    """One run over a set of prompts.

    Args:
        policies: (name, rate, policy) of each variant.
    """

    def __init__(self, model: EvictedModel, policies: Sequence[tuple[str, str, Policy]], decode: Any) -> None:
        self.model, self.policies, self.decode = model, policies, decode
        self.answers: Table = {}
        self.log_likelihoods: Table = {}
        self.kept: Table = {}

    def ask(self, prompts: PromptSet, index: int) -> None:
        """The greedy answers of all variants to one question."""
        prompt = self.model.prefill(prompts.questions[index].tokens)
        kept = self._kept(prompt, f"question-{index}")
        outputs = self.model.generate(prompt, kept, MAX_ANSWER_TOKENS, set(prompts.end_tokens))
        self._add(self.answers, [self.decode(output) for output in outputs])
        self._add(self.kept, (kept.sum((1, 2, 3)) / kept[0, ..., 0].numel()).tolist())

    def read(self, prompts: PromptSet, index: int) -> None:
        """The log-likelihood of one text's continuation under all variants."""
        text = prompts.texts[index]
        prompt = self.model.prefill(text.tokens)
        kept = self._kept(prompt, f"text-{index}")
        self._add(self.log_likelihoods, self.model.log_likelihoods(prompt, kept, text.continuation))

    def resume(self, content: dict[str, Any], out: Path) -> None:
        """Take over what a run of the same kind has left in the file `out`.

        Raises:
            ValueError: the file is of other prompts, policies or rates.
        """
        if not out.exists():
            return
        before = json.loads(out.read_text(encoding="utf-8"))
        for key in ("prompts_sha256", "policies", "rates", "model"):
            if before.get(key) != content[key]:
                raise ValueError(f"{out} has another {key}: remove it or choose another --out")
        self.answers, self.kept = before["answers"], before["kept_tokens"]
        self.log_likelihoods = before["log_likelihoods_nats"]

    def _kept(self, prompt: Prompt, request_id: str) -> torch.Tensor:
        """The dense variant first."""
        kept = [self.model.kept_tokens(prompt, policy, request_id) for _, _, policy in self.policies]
        return torch.stack([torch.ones_like(kept[0]), *kept])

    def _add(self, table: Table, values: Sequence[Any]) -> None:
        names = [(DENSE, DENSE_RATE), *((name, rate) for name, rate, _ in self.policies)]
        for (name, rate), value in zip(names, values, strict=True):
            table.setdefault(name, {}).setdefault(rate, []).append(value)


def done(table: Table) -> int:
    """Prompts in a table."""
    return len(table[DENSE][DENSE_RATE]) if table else 0


def kept_counts(prompts: PromptSet, rates: Sequence[str], head_dim: int) -> dict[str, dict[str, list[int]]]:
    """Tokens that a KV head keeps on average, for each rate and prompt, whatever the policy."""
    return {
        kind: {rate: [kept_count(len(prompt.tokens), rate, head_dim) for prompt in found] for rate in rates}
        for kind, found in (("questions", prompts.questions), ("texts", prompts.texts))
    }


def kept_count(num_tokens: int, rate: str, head_dim: int) -> int:
    policy = load_policy(f"random@{rate}")
    plan = policy_plan(PageLayout.build(policy, head_dim, policy.tile_tokens, torch.float32), num_tokens)
    if plan is None:
        return num_tokens
    cut = plan.last_cut(num_tokens)
    return num_tokens - cut.end + cut.kept_blocks * policy.tile_tokens


def evicting_policies() -> list[str]:
    """Shipped policies that evict, one of each scorer and budget: nothing else matters at the end of a prompt.

    Those that make rows of what is gone are not among them: `EvictedModel` leaves tokens out.
    """
    found: dict[str, str] = {}
    for name in policy_names():
        policy = load_policy(name)
        if policy.eviction and not policy.eviction.retention.reads_evicted:
            found.setdefault(json.dumps(_eviction_content(policy)), name)
    return list(found.values())


def build_parser() -> argparse.ArgumentParser:
    """The options with their help."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eviction_quality", description="Cost of eviction.")
    parser.add_argument("--model", help="Hugging Face folder; default: the small model that needs no download")
    parser.add_argument(
        "--policies", default=",".join(evicting_policies()), help="names or paths; default: %(default)s"
    )
    parser.add_argument("--rates", default="1.33,2,4,8", help="default: %(default)s")
    parser.add_argument("--context", type=int, default=1536, help="tokens of the longest prompt; default: %(default)s")
    parser.add_argument("--needles", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--windows", type=int, default=6, help="texts to continue; default: %(default)s")
    parser.add_argument("--continuation", type=int, default=256, help="tokens of each; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, required=True, help="prose for the prompts (WikiText-2 test)")
    parser.add_argument("--part", choices=("all", "needles", "texts"), default="all", help="of the same prompts")
    parser.add_argument("--prompts-out", type=Path, help="file for the prompts")
    parser.add_argument("--out", type=Path, required=True, help="result file")
    return parser


def main(argv: list[str]) -> int:
    """Measure and write the result file, after each prompt; goes on with the file of a run that was stopped."""
    from transformers import AutoTokenizer

    options = build_parser().parse_args(argv)
    rates = options.rates.split(",")
    names = options.policies.split(",")
    policies = [
        (Path(name).stem, rate, load_policy(name, [f"eviction.rate={rate}"])) for name in names for rate in rates
    ]
    folder = options.model or str(_default_model())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = options.text.read_text(encoding="utf-8")
    prompts = PromptSet.draw(
        tokenizer, text, options.seed, options.context, options.needles, options.windows, options.continuation
    )
    model = EvictedModel(folder)
    content: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "command": ["python", "-m", "benchmarks.eviction_quality", *public_argv(argv)],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {"name": Path(folder).name},
        "text": {"name": options.text.name, "sha256": hashlib.sha256(text.encode()).hexdigest()},
        "machine": machine(),
        "versions": versions(),
        "seed": options.seed,
        "rates": rates,
        "continuation_tokens": options.continuation,
        "prompt_tokens": [len(question.tokens) for question in prompts.questions],
        "text_tokens": [len(found.tokens) for found in prompts.texts],
        "expected": [question.answer for question in prompts.questions],
        "policies": {name: _eviction_content(policy) for name, _, policy in policies},
    }
    if options.prompts_out:
        _write_prompts(prompts, rates, model.head_dim, options.prompts_out)
    content["prompts_sha256"] = prompts.digests()
    measurement = Measurement(model, policies, tokenizer.decode)
    measurement.resume(content, options.out)
    steps: list[Step] = [
        (measurement.ask, index, "needle")
        for index in range(done(measurement.answers), options.needles)
        if options.part != "texts"
    ]
    steps += [
        (measurement.read, index, "text")
        for index in range(done(measurement.log_likelihoods), options.windows)
        if options.part != "needles"
    ]
    _measure(measurement, steps, prompts, content, options.out)
    return 0


def _measure(
    measurement: Measurement, steps: Sequence[Step], prompts: PromptSet, content: dict[str, Any], out: Path
) -> None:
    for number, (run, index, kind) in enumerate(steps):
        run(prompts, index)
        print(f"{datetime.now():%H:%M:%S} {number + 1}/{len(steps)} {kind}", file=sys.stderr, flush=True)
        content["answers"], content["kept_tokens"] = measurement.answers, measurement.kept
        content["log_likelihoods_nats"] = measurement.log_likelihoods
        write_json(out, content)


def _write_prompts(prompts: PromptSet, rates: list[str], head_dim: int, path: Path) -> None:
    """Write the file for other implementations."""
    kept = kept_counts(prompts, rates, head_dim)
    record = {
        "sha256": prompts.digests(), "max_tokens": MAX_ANSWER_TOKENS, "kept_tokens": kept, "prompts": prompts.to_json()
    }  # fmt: skip
    path.write_text(json.dumps(record), encoding="utf-8")


def _eviction_content(policy: Policy) -> dict[str, Any]:
    assert policy.eviction is not None
    return policy.eviction.model_dump(mode="json", include={"scorer", "budget"})


def _default_model() -> Path:
    from kvserve.default_model import prepare_default_model

    return prepare_default_model()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
