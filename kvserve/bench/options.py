"""The command line of `kvserve bench`, checked before anything is started."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvserve.arguments.parser import MAX_SEED, Parser, given_text, result_path, whole
from kvserve.bench.server_options import ServerSizes, add_options, server_sizes
from kvserve.errors import PolicyError, UsageError
from kvserve.measuring.engines import STOCK
from kvserve.measuring.machine import this_machine
from kvserve.policies.loading import load_policy
from kvserve.policies.registry import policy_names

SUITES = ("capacity", "operator", "step", "prefill", "identity", "needle", "quality", "throughput", "server")
DEFAULT_POLICIES = "stock,none,kivi-4bit,kivi-2bit,boost-2bit"


class OptionError(UsageError):
    """A command line that cannot be followed, in one sentence."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured. Lengths are in tokens."""

    context: int = 4096
    sequences: int = 8
    decode_steps: int = 64  # one whole tile: sealing happens once in them
    operator_steps: int = 5
    identity_prompts: int = 32
    identity_longest: int = 1500
    identity_outputs: int = 32
    throughput_requests: int = 32
    throughput_prompt: int = 64
    throughput_outputs: int = 1024
    throughput_kv_bytes: int = 128 * 2**20
    window: int = 2048


QUICK = Sizes(
    context=512, sequences=2, decode_steps=4, operator_steps=2, identity_prompts=4, identity_longest=200,
    identity_outputs=8, throughput_requests=4, throughput_outputs=64, throughput_kv_bytes=32 * 2**20, window=512,
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """A checked command line.

    Attributes:
        names: "stock" first, then policies.
        model: None for the default model.
        windows: number of perplexity windows; None: all of them.
    """

    names: list[str]
    suites: list[str]
    left_out: dict[str, str]
    sizes: Sizes
    server: ServerSizes
    repeats: int
    throughput_repeats: int
    windows: int | None
    simulations: int
    needles: int
    quick: bool
    model: str | None
    dtype: str
    compile: bool
    seed: int
    text: str | None
    text_name: str | None
    out: Path | None


def build_parser() -> argparse.ArgumentParser:
    """The options with their help."""
    parser = Parser(prog="kvserve bench", description="Measure stock vLLM and kvserve's policies side by side.")
    parser.add_argument("--model", help="Hugging Face folder; default: the small model that needs no download")
    parser.add_argument(
        "--policies", default=DEFAULT_POLICIES, help="comma separated, NAME@RATE sets a rate; default: %(default)s"
    )
    parser.add_argument(
        "--context", type=whole(1, 2**24), help="tokens of long prompts; default: 4096, with --quick 512"
    )
    parser.add_argument("--sequences", type=whole(1, 2**16), help="decoding together, in operator and step; default: 8")
    parser.add_argument("--suite", default="all", help=f"all, which leaves out server, or some of {','.join(SUITES)}")
    parser.add_argument("--repeats", type=int, help="of every timing; default: 5, with --quick 1")
    parser.add_argument(
        "--throughput-repeats", type=int,
        help="of the suites throughput and server, whose repeats take minutes; default: 2, with --quick 1",
    )  # fmt: skip
    parser.add_argument("--windows", default="", help="perplexity windows, or all; default: 8, with --quick 1")
    parser.add_argument("--simulations", type=int, help="simulated runs of each policy; default: 3, with --quick 1")
    parser.add_argument("--needles", type=int, help="needle prompts; default: 10, with --quick 2")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, measures little")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--compile", action="store_true", help="run all engines with torch.compile; default: eager")
    parser.add_argument("--seed", type=whole(0, MAX_SEED), default=0)
    parser.add_argument("--text", type=Path, help="prose for the prompts; the quality suite needs it (WikiText-2 test)")
    parser.add_argument("--out", type=result_path, help="result file, or a folder: MACHINE-SUITE.json in it")
    add_options(parser)
    return parser


def parse(argv: Sequence[str]) -> Options:
    """Check the command line.

    Raises:
        OptionError: it cannot be followed.
    """
    given = build_parser().parse_args(argv)
    names = _names(given.policies)
    suites, left_out = _suites(given.suite, names, given.text is not None)
    quick = given.quick
    options = Options(
        names=names, suites=suites, left_out=left_out, sizes=_sizes(given),
        server=_server_sizes(given),
        repeats=_count("--repeats", given.repeats, 1 if quick else 5),
        throughput_repeats=_count("--throughput-repeats", given.throughput_repeats, 1 if quick else 2),
        windows=None if given.windows == "all" else _count("--windows", given.windows, 1 if quick else 8),
        simulations=_count("--simulations", given.simulations, 1 if quick else 3),
        needles=_count("--needles", given.needles, 2 if quick else 10),
        quick=quick, model=given.model, dtype=given.dtype, compile=given.compile, seed=given.seed,
        text=given_text(given.text),
        text_name=given.text.name if given.text else None, out=_out(given.out, suites, given.dtype),
    )  # fmt: skip
    return options


def _out(out: Path | None, suites: Sequence[str], dtype: str) -> Path | None:
    """The result file; in a folder it is named after the machine, the suites and, where it is unusual, the dtype."""
    if out is None or not out.is_dir():
        return out
    return out / ("-".join([this_machine(), *suites, *([] if dtype == "float32" else [dtype])]) + ".json")


def _sizes(given: argparse.Namespace) -> Sizes:
    sizes = QUICK if given.quick else Sizes()
    return replace(
        sizes,
        context=_count("--context", given.context, sizes.context),
        sequences=_count("--sequences", given.sequences, sizes.sequences),
    )


def _server_sizes(given: argparse.Namespace) -> ServerSizes:
    try:
        return server_sizes(given, given.quick)
    except ValueError as error:
        raise OptionError(str(error)) from None


def _names(policies: str) -> list[str]:
    names = [name for name in dict.fromkeys(policies.split(",")) if name]
    if STOCK not in names:
        raise OptionError("--policies must contain stock, since every ratio is taken to it")
    names.remove(STOCK)
    for name in names:
        if name.partition("@")[0] not in policy_names():
            known = ", ".join((STOCK, *policy_names()))
            raise OptionError(f"--policies takes stock and shipped policies, got {name!r}; they are {known}")
        try:
            load_policy(name)
        except PolicyError as error:
            raise OptionError(str(error)) from None
    return [STOCK, *names]


def _suites(wanted: str, names: Sequence[str], has_text: bool) -> tuple[list[str], dict[str, str]]:
    impossible = {}
    if not has_text:
        impossible["quality"] = "it needs --text FILE"
    if "none" not in names:
        impossible["identity"] = "it needs none among --policies"
    if wanted == "all":
        left_out = {**impossible, "server": "it takes longest; --suite server runs it"}
        return [suite for suite in SUITES if suite not in left_out], left_out
    chosen = wanted.split(",")
    for suite in chosen:
        if suite not in SUITES:
            raise OptionError(f"there is no suite {suite!r}; the suites are all, {', '.join(SUITES)}")
        if suite in impossible:
            raise OptionError(f"the suite {suite} cannot run: {impossible[suite]}")
    return [suite for suite in SUITES if suite in chosen], {}


def _count(flag: str, given: Any, default: int) -> int:
    if given in (None, ""):
        return default
    try:
        count = int(given)
    except ValueError:
        count = 0
    if count < 1:
        raise OptionError(f"{flag} must be a whole number of at least 1, got {given!r}")
    return count
