"""`kvserve serve`: take out kvserve's own options, refuse what cannot work, hand the rest to vLLM."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvserve.checks import (
    KERNELS,
    ServeOptions,
    UnsupportedError,
    check_model,
    check_options,
    check_windows,
    head_dim_of,
    num_layers_of,
    text_config,
)
from kvserve.cli.main import UsageError, print_help
from kvserve.compat import check_vllm_version
from kvserve.policies.base import Policy
from kvserve.policies.limits import request_limit
from kvserve.policies.loading import load_policy
from kvserve.policies.registry import policy_names

POLICY_VARIABLE = "KVSERVE_POLICY"  # for command lines without --policy, as of containers
_SHORT_NAMES = {
    "-sc": "speculative_config",
    "-dcp": "decode_context_parallel_size",
    "-pcp": "prefill_context_parallel_size",
}
_NUMBERS = {
    *("block_size", "kv_offloading_size", "decode_context_parallel_size", "prefill_context_parallel_size"),
    "max_model_len",
}


@dataclass
class ServeRequest:
    """A command line, split into kvserve's part and vLLM's."""

    policy: str | None = None
    overrides: list[str] = field(default_factory=list)
    kernels: str | None = None
    self_test: bool = True
    vllm_arguments: list[str] = field(default_factory=list)
    wants_help: bool = False


def run(arguments: Sequence[str]) -> int:
    """Check everything that needs no vLLM, then serve until stopped."""
    request = split_arguments(arguments)
    if request.wants_help:
        print_help()
        return 0
    if any(argument.startswith("--help=") for argument in request.vllm_arguments):
        from kvserve.cli.launch import print_vllm_help

        return print_vllm_help(request.vllm_arguments)
    request.policy = request.policy or os.environ.get(POLICY_VARIABLE) or None
    if request.policy is None:
        raise UsageError(
            f"--policy is missing; choose one of {', '.join(policy_names())}, or the path of a YAML file "
            "(--policy none keeps the cache uncompressed)"
        )
    policy = load_policy(request.policy, request.overrides)
    check_vllm_version()
    check_arguments(scan_options(request.vllm_arguments), policy)

    from kvserve.cli.launch import launch

    return launch(policy, request.overrides, request.vllm_arguments, request.kernels or "auto", request.self_test)


def split_arguments(arguments: Sequence[str]) -> ServeRequest:
    """Take kvserve's options out of a command line and leave the others in order.

    Raises:
        UsageError: an option without its value, or two different policies.
    """
    request = ServeRequest()
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        name = name.replace("_", "-")
        if name in _EXAMPLES:
            if not equals:
                value = next(rest, "")
            if not value or value.startswith("--"):
                raise UsageError(f"{name} needs a value, for example {_EXAMPLES[name]}")
            if name == "--policy-set":
                request.overrides.append(value)
            elif name == "--compression-rate":
                request.overrides += [f"eviction.rate={value}", "eviction.max_tokens=null"]
            elif name == "--max-cache-tokens":
                request.overrides += ["eviction.rate=null", f"eviction.max_tokens={value}"]
            elif name == "--kernels":
                if value not in ("auto", *KERNELS):
                    raise UsageError(f"--kernels must be one of auto, {', '.join(KERNELS)}, got {value!r}")
                request.kernels = value
            elif request.policy not in (None, value):
                raise UsageError(f"--policy was given twice, as {request.policy} and as {value}; keep one")
            else:
                request.policy = value
        elif name in ("--self-test", "--no-self-test"):
            if equals:
                raise UsageError(f"{name} takes no value")
            request.self_test = name == "--self-test"
        elif argument in ("-h", "--help"):
            request.wants_help = True
        elif name == "--config" and equals:  # vLLM reads the two-word form only and would ignore this one
            request.vllm_arguments += ["--config", value]
        else:
            request.vllm_arguments.append(argument)
    return request


_EXAMPLES = {
    "--policy": "--policy kivi-2bit",
    "--policy-set": "--policy-set sink_tokens=0",
    "--compression-rate": "--compression-rate 4",
    "--max-cache-tokens": "--max-cache-tokens 1024",
    "--kernels": "--kernels triton",
}


def scan_options(arguments: Sequence[str]) -> dict[str, Any]:
    """What vLLM's parser would very likely read, without importing it.

    It only serves to refuse early: launch() repeats the checks on what vLLM really parsed.
    """
    options: dict[str, Any] = {}
    if arguments and not arguments[0].startswith("-"):
        options["model"] = arguments[0]
    for index, argument in enumerate(arguments):
        if not argument.startswith("-"):
            continue
        name, equals, value = argument.partition("=")
        if not equals:
            following = arguments[index + 1] if index + 1 < len(arguments) else ""
            value = following if following and not following.startswith("-") else "true"
        dest = _SHORT_NAMES.get(name) or name.removeprefix("--").split(".")[0].replace("-", "_")
        if dest in _NUMBERS:
            try:
                options[dest] = float(value) if dest == "kv_offloading_size" else int(value)
            except ValueError:
                options.pop(dest, None)  # vLLM's parser will say what is wrong with it
        elif not (value == "true" and dest == "model"):
            options[dest] = value
    return options


def check_arguments(options: Mapping[str, Any], policy: Policy) -> None:
    """All checks that need only the arguments and the model's config.json.

    Args:
        options: vLLM's options by their names in its parsed arguments.

    Raises:
        UsageError: the model folder does not exist.
        UnsupportedError: see kvserve.checks.
    """
    check_options(ServeOptions.from_mapping(options), policy)
    model = options.get("model")
    # With these two, config.json is not what vLLM will use; the plugin checks the final one.
    if model and not options.get("hf_overrides") and not options.get("hf_config_path"):
        config = read_model_config(str(model))
        if config is not None:
            check_model(config, policy, str(model))
            longest = options.get("max_model_len") or -1
            if longest > 0 and not options.get("disable_sliding_window"):
                check_windows(config, policy, longest, str(model))
            _check_maximum(config, policy, options)


def _check_maximum(config: Mapping[str, Any], policy: Policy, options: Mapping[str, Any]) -> None:
    """Refuse a maximum of tokens that spared layers would break in the longest request, where its length is given."""
    config, eviction, max_len = text_config(config), policy.eviction, options.get("max_model_len")
    head_dim, num_layers = head_dim_of(config), num_layers_of(config)
    if eviction is None or not eviction.spare_layers or not max_len or max_len < 0 or not head_dim or not num_layers:
        return
    import torch

    from kvserve.pages.layout import PageLayout
    from kvserve.pages.plan import check_limit

    block_size, limit = options.get("block_size") or policy.tile_tokens, request_limit(eviction, policy, {})
    assert limit is not None
    try:
        layout = PageLayout.build(policy, head_dim, block_size, torch.float32, state_blocks=1, num_layers=num_layers)
        check_limit(layout, limit, max_len)
    except ValueError as error:
        raise UnsupportedError(str(error)) from None


def read_model_config(model: str) -> dict[str, Any] | None:
    """config.json of a local folder, or of a Hugging Face model that is already cached; None where there is none.

    Raises:
        UsageError: `model` is a path and nothing is there.
    """
    folder = Path(model).expanduser()
    if re.match(r"^(/|\.{1,2}/|~)", model) and not folder.exists():
        raise UsageError(f"the model folder {model} does not exist; give a Hugging Face folder or name with --model")
    path = folder / "config.json" if folder.is_dir() else _cached_config(model)
    if path is None or not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    return config if isinstance(config, dict) else None


def _cached_config(model: str) -> Path | None:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    repo = hub / f"models--{model.replace('/', '--')}"
    try:
        revision = (repo / "refs" / "main").read_text().strip()
    except OSError:
        return None
    return repo / "snapshots" / revision / "config.json"
