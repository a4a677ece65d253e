"""kvserve's own options, taken out of a command line that is otherwise vLLM's or another command's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvserve.checks import KERNELS
from kvserve.errors import UsageError


@dataclass
class ServeRequest:
    """A command line, split into kvserve's part and vLLM's."""

    policy: str | None = None
    overrides: list[str] = field(default_factory=list)
    kernels: str | None = None
    self_test: bool = True
    verbose: bool = False
    vllm_arguments: list[str] = field(default_factory=list)
    wants_help: bool = False


def split_arguments(arguments: Sequence[str], policy_only: bool = False) -> ServeRequest:
    """Take kvserve's options out of a command line and leave the others in order.

    Args:
        policy_only: take the options that make up a policy; those of the server are left to the command's own parser.

    Raises:
        UsageError: an option without its value, or two different policies.
    """
    request, own = ServeRequest(), _POLICY_OPTIONS if policy_only else _EXAMPLES
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        name = name.replace("_", "-")
        if name in own:
            if not equals:
                value = next(rest, "")
            if not value or value.startswith("--"):
                raise UsageError(f"{name} needs a value, for example {_EXAMPLES[name]}")
            _take(request, name, value)
        elif name in ("--self-test", "--no-self-test", "--verbose") and not policy_only:
            if equals:
                raise UsageError(f"{name} takes no value")
            request.verbose |= name == "--verbose"
            request.self_test = request.self_test if name == "--verbose" else name == "--self-test"
        elif argument in ("-h", "--help"):
            request.wants_help = True
        elif name == "--config" and equals:  # vLLM reads the two-word form only and would ignore this one
            request.vllm_arguments += ["--config", value]
        else:
            request.vllm_arguments.append(argument)
    return request


def _take(request: ServeRequest, name: str, value: str) -> None:
    """One of kvserve's options that have a value."""
    if name == "--policy-set":
        request.overrides.append(value)
    elif name == "--compression-rate":
        request.overrides += [f"eviction.rate={value}", "eviction.max_tokens=null"]
    elif name == "--max-cache-tokens":
        request.overrides += ["eviction.rate=null", f"eviction.max_tokens={value}"]
    elif name == "--kernels":
        if value not in ("auto", *KERNELS):
            raise UsageError(f"--kernels must be one of auto, {', '.join(KERNELS)}, got {value!r:.60}")
        request.kernels = value
    elif request.policy not in (None, value):
        raise UsageError(f"--policy was given twice, as {request.policy:.60} and as {value:.60}; keep one")
    else:
        request.policy = value


_EXAMPLES = {
    "--policy": "--policy kivi-2bit",
    "--policy-set": "--policy-set sink_tokens=0",
    "--compression-rate": "--compression-rate 4",
    "--max-cache-tokens": "--max-cache-tokens 1024",
    "--kernels": "--kernels triton",
}


_POLICY_OPTIONS = frozenset(_EXAMPLES) - {"--kernels"}
