"""Dispatch of the `kvserve` command and its exit codes.

0 done, 1 failed, 2 refused before anything was started, 130 interrupted.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from kvserve.errors import ConversionError, PolicyError, UnsupportedError, UsageError
from kvserve.text_files import one_line

HELP = """\
usage: kvserve [serve] --policy POLICY [options] [MODEL] [any vLLM serve option]
       kvserve COMMAND [options]

Serve a model with vLLM's OpenAI-compatible server and a compressed KV cache.

  kvserve --policy boost-2bit                             # the model that comes with kvserve, on port 8000
  kvserve --policy kv-compress-2bit@4 --model /path/to/model --host 127.0.0.1 --port 9000
  curl http://localhost:8000/v1/models

options of serve:
  --policy POLICY          how the KV cache is kept: a name (below), NAME@RATE for one that evicts at that rate, or the
                           path of a YAML file; `none` keeps it uncompressed
  --compression-rate RATE  of a policy that evicts: keep one token in RATE of each prompt
  --max-cache-tokens N     of a policy that evicts: hold N tokens of each request, instead of a rate
  --policy-set KEY=VALUE   change one value of the policy, for example sink_tokens=0 or key.bits=4
  --model MODEL            a Hugging Face folder or name; without it, a small model that needs no download
  --kernels NAME           attention kernels: auto, native or reference (CPU), triton or cuda (GPU)
  --no-self-test           serve without testing the cache before; such a test takes seconds
  --verbose                show all of vLLM's log lines
Every other option goes to vLLM unchanged: `kvserve serve --help=all` lists them.

commands (`kvserve COMMAND --help` explains each):
  serve                    the default
  policies                 list the policies, or explain one
  inspect                  draw which tokens of a prompt stay in the cache
  eval                     measure what policies cost in quality
  doctor                   compare a policy with a dense cache on your model and text
  bench                    measure speed and memory beside stock vLLM
  calibrate                fit the tables that some policies need to a model
  prepare-model            convert the model that comes with kvserve, once
  --version                versions of kvserve and vLLM

policies: {names}

exit codes: 0 done, or stopped by a signal; 1 failed; 2 refused before anything was started; 130 interrupted
"""
COMMANDS = {
    "serve": "kvserve.cli.serve:run",
    "policies": "kvserve.cli.policies:run",
    "inspect": "kvserve.inspect.command:run",
    "eval": "kvserve.evals.command:run",
    "doctor": "kvserve.doctor.command:run",
    "bench": "kvserve.bench.command:main",
    "calibrate": "kvserve.calibrate.command:run",
    "prepare-model": "kvserve.cli.prepare_model:run",
}
# What commands need beyond kvserve's own dependencies, by the name that is imported, and the extra that brings it.
_EXTRAS = {
    **dict.fromkeys(("httpx", "numpy", "openai", "scipy"), "bench"), "matplotlib": "plot",
    **dict.fromkeys(("accelerate", "gguf"), "model"),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except (UsageError, PolicyError, UnsupportedError) as error:
        return _end(error, 2)
    except ConversionError as error:
        return _end(error, 1)
    except ModuleNotFoundError as error:
        return _end(_missing(error), 2)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `kvserve policies | head`
        sys.stderr.close()
        return 1


def _end(error: Exception, code: int) -> int:
    print(f"kvserve: error: {one_line(str(error))}", file=sys.stderr, flush=True)
    return code


def _missing(error: ModuleNotFoundError) -> UsageError:
    """What to install for a module that a command imports.

    Raises:
        ModuleNotFoundError: it is one of kvserve's own.
    """
    name = (error.name or "").partition(".")[0]
    if name in ("", "kvserve"):
        raise error
    extra = _EXTRAS.get(name)
    if extra is None:
        return UsageError(f"the Python package {name} is missing; it comes with vLLM: `make setup`, or kvserve[cpu]")
    return UsageError(f'this needs the Python package {name}; install it with `pip install "kvserve[{extra}]"`')


def _dispatch(arguments: list[str]) -> int:
    command = arguments[0] if arguments else ""
    if command in ("-h", "--help", "help"):
        print_help()
        return 0
    if command in ("-V", "--version"):
        return _print_version()
    if command not in COMMANDS:
        if command and not command.startswith("-"):
            _check_is_a_model(command, arguments[1:])
        command, arguments = "serve", ["serve", *arguments]
    module, _, function = COMMANDS[command].partition(":")
    return int(getattr(import_module(module), function)(arguments[1:]))


def _check_is_a_model(word: str, rest: Sequence[str]) -> None:
    """Refuse a first word that is no command and hardly a model.

    Raises:
        UsageError: naming the commands, and how a model is served.
    """
    from kvserve.arguments.model_folder import is_local_model
    from kvserve.cli.serve import POLICY_VARIABLE

    close = difflib.get_close_matches(word, COMMANDS, n=1, cutoff=0.7)
    names_policy = any(argument.partition("=")[0] == "--policy" for argument in rest) or POLICY_VARIABLE in os.environ
    if is_local_model(word) or (names_policy and not close):
        return
    raise UsageError(
        f"there is no command {word!r:.60}{f', did you mean {close[0]!r}' if close else ''}; the commands are "
        f"{', '.join(COMMANDS)}; a model is served with `kvserve serve MODEL --policy POLICY`"
    )


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
