"""`kvserve serve`: take out kvserve's own options, refuse what cannot work, hand the rest to vLLM."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kvserve.arguments.model_folder import check_model_files, read_model_config
from kvserve.arguments.own_options import split_arguments
from kvserve.checks import (
    ServeOptions,
    check_hybrid,
    check_model,
    check_options,
    check_sharing,
    check_windows,
    head_dim_of,
    text_config,
)
from kvserve.cli.address import check_address
from kvserve.cli.main import print_help
from kvserve.compat import check_vllm_version
from kvserve.default_model import check_default_model
from kvserve.errors import UnsupportedError, UsageError
from kvserve.layer_kinds import hybrid_of, num_layers_of
from kvserve.policies.base import Policy
from kvserve.policies.limits import request_limit
from kvserve.policies.loading import load_policy
from kvserve.policies.registry import policy_names
from kvserve.policies.yaml_text import parse as parse_yaml
from kvserve.policies.yaml_text import problem_of
from kvserve.text_files import UnreadableError, read_text

MAX_CONFIG_BYTES = 2**20  # of --config

POLICY_VARIABLE = "KVSERVE_POLICY"  # for command lines without --policy, as of containers
_SHORT_NAMES = {
    "-tp": "tensor_parallel_size",
    "-pp": "pipeline_parallel_size",
    "-dp": "data_parallel_size",
    "-sc": "speculative_config",
    "-dcp": "decode_context_parallel_size",
    "-pcp": "prefill_context_parallel_size",
}
# Numbers that are refused before vLLM is loaded, and the least that each takes. Other options are vLLM's to judge.
_LEAST = {
    **dict.fromkeys(("port", "kv_offloading_size"), 0),
    **dict.fromkeys(("block_size", "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes"), 1),
    **dict.fromkeys(("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "max_model_len"), 1),
    **dict.fromkeys(("decode_context_parallel_size", "prefill_context_parallel_size"), 1),
}
_MOST = {"port": 65535}
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}  # vLLM's


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
            f"--policy is missing{_meant(request.vllm_arguments)}; choose one of {', '.join(policy_names())}, or the "
            "path of a YAML file (--policy none keeps the cache uncompressed)"
        )
    policy = load_policy(request.policy, request.overrides)
    check_vllm_version()
    options = scan_options(request.vllm_arguments)
    check_arguments(options, policy)
    check_address(options)
    if not options.get("model"):
        check_default_model()

    from kvserve.cli.launch import launch

    return launch(
        policy, request.overrides, request.vllm_arguments, request.kernels or "auto", request.self_test, request.verbose
    )


def _meant(arguments: Sequence[str]) -> str:
    """A guess which of vLLM's supposed options was meant to be --policy."""
    names = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    close = difflib.get_close_matches("--policy", names, n=1)
    return f", did you mean it instead of {close[0]}" if close else ""


def scan_options(arguments: Sequence[str]) -> dict[str, Any]:
    """What vLLM's parser would very likely read, without importing it.

    It only serves to refuse early: launch() repeats the checks on what vLLM really parsed.

    Raises:
        UsageError: the file of --config cannot be used, or a number is out of range.
    """
    options: dict[str, Any] = {}
    if arguments and not arguments[0].startswith("-"):
        options["model"] = arguments[0]
    for index, argument in enumerate(arguments):
        if not re.match(r"-[^0-9]", argument):
            continue
        name, equals, value = argument.partition("=")
        if not equals:
            following = arguments[index + 1] if index + 1 < len(arguments) else ""
            value = following if re.match(r"[^-]|-[0-9]", following) else "true"
        dest, _, entry = name.removeprefix("--").replace("-", "_").partition(".")
        dest = _SHORT_NAMES.get(name) or dest
        if entry:  # --option.entry value is one entry of a mapping
            known = options.get(dest)
            options[dest] = {**(known if isinstance(known, dict) else {}), entry: value}
        elif not (value == "true" and dest == "model"):
            options[dest] = value
    if "config" in options:
        options = {**_config_file(str(options["config"])), **options}
    return {dest: _number(dest, value) if dest in _LEAST else value for dest, value in options.items()}


def _config_file(name: str) -> dict[str, Any]:
    """The options of a --config file.

    Raises:
        UsageError: vLLM could not read it.
    """
    if not name.endswith((".yaml", ".yml")):
        raise UsageError(f"--config takes a file that ends in .yaml or .yml, got {name!r:.200}")
    try:
        content = parse_yaml(read_text(Path(name), MAX_CONFIG_BYTES))
    except UnreadableError as error:
        raise UsageError(f"cannot read --config {name}: {error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"--config {name}{problem_of(error)}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(f"--config {name} must be a list of `option: value` lines")
    return {key.replace("-", "_"): value for key, value in content.items() if isinstance(value, str | int | float)}


def _number(dest: str, value: Any) -> float | None:
    """A number as vLLM writes it (4096, 4k); None where vLLM chooses (auto, -1).

    Raises:
        UsageError: it is none, or out of range.
    """
    text = str(value).strip()
    found = re.fullmatch(r"(-?[0-9]{1,18}(?:\.[0-9]{1,18})?)([kmgtKMGT]?)", text)
    if dest == "max_model_len" and text in ("auto", "-1"):
        return None
    if text == "true":
        raise UsageError(f"--{dest.replace('_', '-')} needs a value")
    number = float(found[1]) * _UNITS.get(found[2], 1) if found else -1.0
    most = _MOST.get(dest)
    if number < _LEAST[dest] or (most is not None and number > most):
        limit = f"from {_LEAST[dest]} to {most}" if most else f"of at least {_LEAST[dest]}"
        raise UsageError(f"--{dest.replace('_', '-')} must be a number {limit}, got {text!r:.60}")
    return int(number) if number.is_integer() else number


def check_arguments(options: Mapping[str, Any], policy: Policy) -> None:
    """All checks that need only the arguments and the model's config.json.

    Args:
        options: vLLM's options by their names in its parsed arguments.

    Raises:
        UsageError: the model folder does not exist, or holds no model.
        UnsupportedError: see kvserve.checks.
    """
    check_options(ServeOptions.from_mapping(options), policy)
    model = options.get("model")
    # With these two, config.json is not what vLLM will use; the plugin checks the final one.
    if model and not options.get("hf_overrides") and not options.get("hf_config_path"):
        config = read_model_config(str(model))
        if config is not None:
            check_model(config, policy, str(model))
            check_sharing(config, options.get("pipeline_parallel_size") or 1, str(model))
            longest = options.get("max_model_len") or -1
            if longest > 0 and not options.get("disable_sliding_window"):
                check_windows(config, policy, longest, str(model))
                _check_hybrid(config, policy, longest, options)
            _check_maximum(config, policy, options)
    if model:
        check_model_files(str(model), options)


def _check_hybrid(config: Mapping[str, Any], policy: Policy, longest: int, options: Mapping[str, Any]) -> None:
    hybrid = hybrid_of(text_config(config), longest) if policy.has_pages else None
    is_off = options.get("disable_hybrid_kv_cache_manager") not in (None, False, "false")
    check_hybrid(hybrid, policy, options.get("block_size"), options.get("pipeline_parallel_size") or 1, is_off)


def _check_maximum(config: Mapping[str, Any], policy: Policy, options: Mapping[str, Any]) -> None:
    """Refuse a maximum of tokens that spared layers would break in the longest request, where its length is given."""
    config, eviction, max_len = text_config(config), policy.eviction, options.get("max_model_len")
    head_dim, num_layers = head_dim_of(config), num_layers_of(config)
    if eviction is None or not eviction.spare_layers or not max_len or max_len < 0 or not head_dim or not num_layers:
        return
    import torch

    from kvserve.accounting.plan import check_limit
    from kvserve.pages.layout import PageLayout

    block_size, limit = options.get("block_size") or policy.tile_tokens, request_limit(eviction, policy, {})
    assert limit is not None
    try:
        layout = PageLayout.build(policy, head_dim, block_size, torch.float32, state_blocks=1, num_layers=num_layers)
        check_limit(layout, limit, max_len)
    except ValueError as error:
        raise UnsupportedError(str(error)) from None
