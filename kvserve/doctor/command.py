"""`kvserve doctor`: a policy on the user's own weights and text, layer by layer, and what would help."""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from kvserve.arguments.model_folder import check_model_files, path_of, read_model_config
from kvserve.arguments.own_options import split_arguments
from kvserve.arguments.parser import MAX_SEED, Parser, given_text, output_file, whole
from kvserve.checks import check_model, text_config
from kvserve.compat import check_vllm_version
from kvserve.doctor.engine import HOST
from kvserve.doctor.examination import Examination, Examiner
from kvserve.doctor.proposal import Proposal, propose, write_policy
from kvserve.doctor.report import draw
from kvserve.errors import ChildError, TextError, UsageError
from kvserve.evals.text import Window, default_text, windows
from kvserve.measuring.engines import Engine, EngineConfig
from kvserve.measuring.shape import ModelShape
from kvserve.measuring.tokenizer import load_tokenizer
from kvserve.policies.base import Policy
from kvserve.policies.loading import load_policy
from kvserve.policies.registry import policy_names
from kvserve.probe.request import OUTPUT_TOKENS, TILES

DESCRIPTION = """\
Compare a policy's cache with a dense one on your own weights: every layer's kernels and losses, and the next token.
Exit code 1: not fit to serve.

policy options: --policy POLICY or NAME@RATE, --policy-set KEY=VALUE, --compression-rate RATE, --max-cache-tokens N
"""
CONTEXT, CONTINUATION, WINDOWS = 448, 24, 2
LAYERS_ALONE = 6
LONGEST_INTERVAL = 64  # of a policy that cuts while it generates
SCHEDULING = {"max_num_seqs": 2, "max_num_batched_tokens": 256}  # prompts come in chunks


def run(arguments: Sequence[str]) -> int:
    """Examine one policy.

    Returns:
        0: fit to serve; 1: not, or the engine failed.

    Raises:
        UsageError, PolicyError, UnsupportedError: refused before an engine is started.
    """
    request = split_arguments(arguments, policy_only=True)
    args = _parser().parse_args([*request.vllm_arguments, *(["--help"] if request.wants_help else [])])
    if request.policy is None:
        raise UsageError(f"--policy is missing; choose one of {', '.join(policy_names())}, or the path of a YAML file")
    policy = load_policy(request.policy, request.overrides)
    check_vllm_version()
    case = Case.load(args, policy)
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are closed
    try:
        return _examine(args, policy, case)
    except ChildError as error:
        print(f"kvserve doctor: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)


def _examine(args: argparse.Namespace, policy: Policy, case: Case) -> int:
    examiner = Examiner(case.windows, case.prompt, _say)
    found = case.examine(examiner, policy, args.layers)
    draw(Console(highlight=False), found)
    content: dict[str, Any] = {"examination": found.to_dict(), "proposal": None}
    proposal = propose(policy, found)
    if proposal is None:
        print("nothing to propose: this policy loses nothing but rounding")
    elif args.write_policy is None:
        print(f"proposal, not tried: {proposal.change}; --write-policy FILE tries it and writes it")
    else:
        content["proposal"] = _try(proposal, found, case, examiner, args.write_policy)
    if args.json:
        args.json.write_text(json.dumps(content) + "\n", encoding="utf-8")
    return 0 if found.is_fit else 1


def _try(proposal: Proposal, found: Examination, case: Case, examiner: Examiner, path: Path) -> dict[str, Any]:
    """Run the proposal, and write it where it is fit and nearer to the dense cache."""
    tried = case.examine(examiner, proposal.policy)
    before, after = found.end_to_end, tried.end_to_end
    figures = f"mean KL {after.kl:.4g} nats instead of {before.kl:.4g}, same token {after.agreement:.0%}"
    is_better = tried.is_fit and after.kl < before.kl
    if is_better:
        write_policy(path, proposal)
        print(f"proposal: {proposal.change}: {figures}; written to {path}")
    else:
        print(f"proposal: {proposal.change}: {figures}; not better, so nothing is written")
    return {"change": proposal.change, "examination": tried.to_dict(), "written": is_better}


@dataclass(frozen=True)
class Case:
    """A model and a text to examine policies with."""

    model: str
    shape: ModelShape
    dtype: str
    seed: int
    windows: list[Window]
    prompt: list[int]
    max_model_len: int

    @classmethod
    def load(cls, args: argparse.Namespace, policy: Policy) -> Case:
        """Check everything that needs no engine.

        Raises:
            UsageError, UnsupportedError: the model, the text and the policy do not fit together.
        """
        model = _model(args.model)
        config = read_model_config(model)
        if config is None:
            raise UsageError(f"--model {model} is neither a Hugging Face folder nor a downloaded model")
        check_model(config, policy, model)
        check_model_files(model, {})
        text = given_text(args.text)
        tokens = load_tokenizer(model)(text if text is not None else default_text()[1], verbose=False).input_ids
        test_len = TILES * policy.tile_tokens + OUTPUT_TOKENS + LONGEST_INTERVAL + 1
        limit = text_config(config).get("max_position_embeddings") or test_len + CONTEXT
        longest = max(CONTEXT + CONTINUATION + 1, test_len)
        if longest > limit:
            raise UsageError(f"the doctor's requests have {longest} tokens and the model takes {limit}")
        try:
            first = random.Random(args.seed).randrange(max(len(tokens) - 2 * WINDOWS * longest, 1))
            parts = windows(tokens[first : first + 2 * WINDOWS * longest], WINDOWS, CONTEXT, CONTINUATION)
        except TextError as error:
            raise UsageError(str(error)) from None
        prompt = (tokens[first:] * (longest // len(tokens[first:]) + 1))[:longest]
        shape = ModelShape.from_hf(dict(text_config(config)))
        if policy.calibration:
            from kvserve.calibrate.prepare import prepare

            prepare([policy], model)
        return cls(model, shape, args.dtype, args.seed, parts, prompt, longest)

    def examine(self, examiner: Examiner, policy: Policy, num_alone: int = 0) -> Examination:
        """One policy in an engine of its own."""
        config = EngineConfig(
            self.model, self.shape, self.dtype, self.max_model_len, self.seed, num_requests=2,
            scheduler_options=SCHEDULING,
        )  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="kvserve-doctor-") as folder:
            path = Path(folder) / f"{policy.name}.yaml"
            write_policy(path, Proposal(policy, "what is examined"))
            _say(f"{policy.name}: starting the engine")
            with Engine(str(path), config, HOST) as engine:
                return examiner.examine(engine, policy.name, num_alone)


def _model(name: str | None) -> str:
    if name is None:
        from kvserve.default_model import prepare_default_model

        return str(prepare_default_model())
    folder = path_of(name)
    return str(folder) if folder.is_dir() else name


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="kvserve doctor", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="a Hugging Face folder or downloaded model (default: the model that needs no download)")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    add("--text", type=Path, metavar="FILE", help="your own text (default: Python's language reference)")
    add("--seed", type=whole(0, MAX_SEED), default=0, help="chooses the part of the text")
    add(
        "--layers", type=whole(0, 10_000), default=LAYERS_ALONE, metavar="N",
        help="try the N layers that are off most, the first and the last each alone; 0: none (default: %(default)s)",
    )  # fmt: skip
    add("--json", type=output_file, metavar="FILE", help="write every number")
    add("--write-policy", type=output_file, metavar="FILE", help="try the proposal, and write it if it is better")
    return parser
