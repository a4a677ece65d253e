"""The command line of `kvserve eval`, checked before anything is started."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kvserve.arguments.parser import MAX_SEED, Parser, given_text, result_file, whole
from kvserve.errors import UsageError
from kvserve.evals.tasks.registry import TASKS
from kvserve.policies.base import Policy
from kvserve.policies.loading import load_policy

DENSE = "none"
TEXT = "text"
QUESTIONS = ("inside", "after")
DEFAULT_POLICIES = "none,kivi-4bit,kivi-2bit,boost-2bit,kv-compress@4,attended-spans@4"
DESCRIPTION = """\
Measure what policies cost in quality, through the serving engine: perplexity and distance to the dense cache on a text,
and tasks with known answers. Writes tables and, with --out, every number.
"""


@dataclass(frozen=True)
class Sizes:
    """How much is measured. Lengths are in tokens.

    Attributes:
        lengths: of prompts, question included.
        depths: of what is asked for, in turn over the examples.
        examples: of each task, length and place of the question.
        windows: of text: `context` tokens, then `continuation` forced ones (the first one still comes from the whole
            prompt and is not measured), and `greedy` generated ones.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    examples: int
    windows: int
    context: int
    continuation: int
    greedy: int

    @property
    def longest(self) -> int:
        """Tokens of the longest request, answers counted."""
        answer = max(task.answer_tokens for task in TASKS.values())
        return max(max(self.lengths) + answer, self.context + max(self.continuation, self.greedy))


SUITES = {
    "quick": Sizes((384,), (0.1, 0.5, 0.9), 3, windows=8, context=512, continuation=128, greedy=32),
    "full": Sizes((1024, 2048, 4096), (0.0, 0.25, 0.5, 0.75, 1.0), 20, windows=32, context=2048, continuation=256,
                  greedy=128),
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """A checked command line.

    Attributes:
        policies: by label, the dense one first; a label is a name, or a file's without its folder.
        sources: the same labels: what `load_policy` takes.
        items: "text" and names of tasks.
        questions: "inside" (the prompt ends with the question), "after" (it follows when the context is compressed).
    """

    policies: dict[str, Policy]
    sources: dict[str, str]
    items: list[str]
    questions: list[str]
    sizes: Sizes
    suite: str
    model: str | None
    dtype: str
    seed: int
    text: str | None
    text_name: str | None
    out: Path | None

    def settings(self) -> dict[str, Any]:
        """What must be equal for two runs to go into one file."""
        return {"dtype": self.dtype, "seed": self.seed, "questions": self.questions, **asdict(self.sizes)}


def build_parser() -> argparse.ArgumentParser:
    """The options with their help."""
    parser = Parser(prog="kvserve eval", description=DESCRIPTION)
    add = parser.add_argument
    add("--model", help="Hugging Face folder or downloaded model; default: the small model that needs no download")
    add(
        "--policies",
        default=DEFAULT_POLICIES,
        help="names, NAME@RATE or YAML files, comma separated; `none` is always measured; default: %(default)s",
    )
    add("--suite", default="quick", help="sizes: quick (default) or full; the options below change single ones")
    add("--tasks", default="all", help=f"all, or some of {','.join((TEXT, *TASKS))}")
    add(
        "--questions",
        default=",".join(QUESTIONS),
        help="inside: the prompt ends with the question; after: the question follows when the context has been "
        "compressed; default: both",
    )
    add("--lengths", help="tokens of prompts, comma separated")
    add("--depths", help="0 (start) to 1 (end of the context), comma separated; examples take them in turn")
    add("--examples", type=int, help="of each task, length and place of the question")
    add("--windows", type=int, help="of the text")
    add("--context", type=int, help="tokens of a window before what is measured")
    add("--continuation", type=int, help="measured tokens of a window")
    add("--greedy", type=int, help="tokens generated behind each context, 0: none")
    add("--text", type=Path, help="text file; default: Python's language reference, and packaged prose in prompts")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    add("--seed", type=whole(0, MAX_SEED), default=0)
    add("--out", type=result_file, help="result file; finished parts found in it are not run again")
    return parser  # fmt: skip


def parse(argv: Sequence[str]) -> Options:
    """Check the command line.

    Raises:
        UsageError, PolicyError: it cannot be followed.
    """
    given = build_parser().parse_args(argv)
    if given.suite not in SUITES:
        raise UsageError(f"there is no suite {given.suite!r}; --suite takes {' or '.join(SUITES)}")
    policies, sources = _policies(given.policies)
    return Options(
        policies=policies, sources=sources,
        items=_chosen("--tasks", given.tasks, (TEXT, *TASKS)),
        questions=_chosen("--questions", given.questions, QUESTIONS),
        sizes=_sizes(SUITES[given.suite], given), suite=given.suite, model=given.model, dtype=given.dtype,
        seed=given.seed, text=given_text(given.text), text_name=given.text.name if given.text else None, out=given.out,
    )  # fmt: skip


def _policies(names: str) -> tuple[dict[str, Policy], dict[str, str]]:
    policies, sources = {DENSE: load_policy(DENSE)}, {DENSE: DENSE}
    for name in filter(None, names.split(",")):
        label = Path(name).stem if name.endswith((".yaml", ".yml")) else name
        if sources.get(label, name) != name:
            raise UsageError(f"{sources[label]} and {name} would both be called {label}; rename the file")
        policies[label], sources[label] = load_policy(name), name
    return policies, sources


def _chosen(flag: str, given: str, known: Sequence[str]) -> list[str]:
    if given == "all":
        return list(known)
    wanted = given.split(",")
    for name in wanted:
        if name not in known:
            raise UsageError(f"{flag} takes all, or some of {', '.join(known)}; got {name!r}")
    return [name for name in known if name in wanted]


def _sizes(sizes: Sizes, given: argparse.Namespace) -> Sizes:
    changes: dict[str, Any] = {}
    least_of = {"examples": 1, "windows": 1, "context": 1, "continuation": 2, "greedy": 0}
    for name, least in least_of.items():
        value = getattr(given, name)
        if value is not None:
            if value < least:
                raise UsageError(f"--{name} must be a whole number of at least {least}, got {value}")
            changes[name] = value
    if given.lengths is not None:
        changes["lengths"] = tuple(int(n) for n in _numbers("--lengths", given.lengths, 64, 2**20, whole=True))
    if given.depths is not None:
        changes["depths"] = tuple(_numbers("--depths", given.depths, 0, 1))
    return replace(sizes, **changes)


def _numbers(flag: str, given: str, low: float, high: float, whole: bool = False) -> list[float]:
    numbers = []
    for word in given.split(","):
        try:
            number = float(int(word) if whole else word)
        except ValueError:
            number = float("nan")
        if not low <= number <= high:
            kind = "whole numbers" if whole else "numbers"
            raise UsageError(f"{flag} takes {kind} from {low} to {high}, comma separated; got {word!r}")
        numbers.append(number)
    return numbers
