"""Dispatch of the `kvserve` command and its exit codes: 0 done, 1 failed, 2 refused before anything was started."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from kvserve.checks import UnsupportedError
from kvserve.policies.loading import PolicyError

HELP = """\
usage: kvserve [serve] --policy POLICY [--policy-set KEY=VALUE]... [--model MODEL | MODEL] [any vLLM serve option]
       kvserve policies [NAME | FILE] [--policy-set KEY=VALUE]... [--head-dim N]
       kvserve inspect --policy POLICY (TEXT | --prompt-file FILE) [options]
       kvserve eval [--policies NAME,NAME@RATE,...] [options]
       kvserve doctor --policy POLICY [--model MODEL] [options]
       kvserve prepare-model
       kvserve bench [options]
       kvserve --version

Serve a model with vLLM's OpenAI-compatible server and a compressed KV cache.

  --policy POLICY          how the KV cache is kept: {names},
                           or the path of a YAML file; `none` keeps it uncompressed
  --policy-set KEY=VALUE   change one value of the policy, for example sink_tokens=0 or key.bits=4
  --kernels NAME           attention kernels: auto, native (CPU), triton or cuda (GPU)
  --no-self-test           serve without testing the cache before; such a test takes seconds
  --model MODEL            a Hugging Face folder or name; without it, a small model that needs no download

Every other option goes to vLLM unchanged: `kvserve serve --help=all` lists them.
"""


class UsageError(ValueError):
    """A command line that cannot be followed; the message says what to write instead."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except (UsageError, PolicyError, UnsupportedError) as error:
        print(f"kvserve: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `kvserve policies | head`
        sys.stderr.close()
        return 1


def _dispatch(arguments: list[str]) -> int:
    command = arguments[0] if arguments else ""
    if command in ("-h", "--help"):
        print_help()
        return 0
    if command in ("-V", "--version"):
        return _print_version()
    if command == "policies":
        from kvserve.cli.policies import run as run_policies

        return run_policies(arguments[1:])
    if command == "inspect":
        from kvserve.inspect.command import run as run_inspect

        return run_inspect(arguments[1:])
    if command == "eval":
        from kvserve.evals.command import run as run_eval

        return run_eval(arguments[1:])
    if command == "doctor":
        from kvserve.doctor.command import run as run_doctor

        return run_doctor(arguments[1:])
    if command == "prepare-model":
        return _prepare_model(arguments[1:])
    if command == "bench":
        from kvserve.bench import main as bench_main  # type: ignore[attr-defined]

        return int(bench_main(arguments[1:]) or 0)
    from kvserve.cli.serve import run as run_serve

    return run_serve(arguments[1:] if command == "serve" else arguments)


def print_help() -> None:
    from kvserve.policies.registry import policy_names

    print(HELP.format(names=", ".join(policy_names())), end="")


def kvserve_version() -> str:
    try:
        return version("kvserve")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"


def _print_version() -> int:
    from kvserve.compat import describe_range, installed_vllm

    found = installed_vllm()
    print(f"kvserve {kvserve_version()}")
    print(f"vLLM {found[1]} ({found[0]})" if found else "vLLM is not installed")
    print(f"tested with vLLM {describe_range()}")
    return 0


def _prepare_model(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: kvserve prepare-model\n\nConvert the default model for vLLM, once; prints its folder.")
        return 0
    if arguments:
        raise UsageError(f"prepare-model takes no arguments, got {' '.join(arguments)!r}")
    from kvserve.default_model import prepare_default_model

    print(prepare_default_model())
    return 0
