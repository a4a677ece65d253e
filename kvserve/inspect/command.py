"""`kvserve inspect`: the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from kvserve.arguments.model_folder import check_model_files, read_model_config
from kvserve.arguments.own_options import split_arguments
from kvserve.arguments.parser import Parser, output_file, text_of
from kvserve.checks import check_model
from kvserve.errors import UnsupportedError, UsageError
from kvserve.policies.base import Policy
from kvserve.policies.loading import load_policy
from kvserve.policies.registry import policy_names

DESCRIPTION = """\
Run one prompt through the engine and draw which of its tokens each KV head keeps.

policy options: --policy POLICY or NAME@RATE, --policy-set KEY=VALUE, --compression-rate RATE, --max-cache-tokens N
"""
PIPED_WIDTH = 120
DTYPES = ("auto", "float32", "bfloat16", "float16", "half", "float")  # vLLM's


def run(arguments: Sequence[str]) -> int:
    """Inspect one prompt.

    Raises:
        UsageError, PolicyError, UnsupportedError: refused before anything is started, or by the engine's checks.
    """
    request = split_arguments(arguments, policy_only=True)
    args = _parser().parse_args([*request.vllm_arguments, *(["--help"] if request.wants_help else [])])
    policy = _policy(request.policy, request.overrides)
    text = _text(args)
    if args.png:
        from kvserve.inspect.png import load_pyplot

        load_pyplot()
    if args.model is not None:
        config = read_model_config(args.model)
        if config is not None:
            check_model(config, policy, args.model)
        check_model_files(args.model, {})
    from kvserve.compat import check_vllm_version

    check_vllm_version()
    from kvserve.inspect.engine import inspect_prompt
    from kvserve.inspect.terminal import draw

    inspection = inspect_prompt(policy, _prepared(args.model, policy), text, args.dtype)
    if args.json:
        args.json.write_text(json.dumps(inspection.to_dict()) + "\n", encoding="utf-8")
    if args.png:
        from kvserve.inspect.png import write_png

        write_png(args.png, inspection)
    console = Console(highlight=False)
    draw(console if console.is_terminal else Console(highlight=False, width=PIPED_WIDTH), inspection)
    return 0


def _prepared(name: str | None, policy: Policy) -> str:
    """The model, with what the policy needs for it."""
    from kvserve.default_model import prepare_default_model

    model = name or str(prepare_default_model())
    if policy.calibration:
        from kvserve.calibrate.prepare import prepare

        prepare([policy], model)
    return model


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="kvserve inspect", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", nargs="?", help="the prompt; it gets no chat template")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="read the prompt from a file")
    parser.add_argument("--model", help="a Hugging Face folder or name (default: the model that needs no download)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the model (default: its own)")
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="also write every kept position and the shares"
    )
    parser.add_argument("--png", type=output_file, metavar="FILE", help="also write the two maps (needs matplotlib)")
    return parser


def _policy(name: str | None, overrides: Sequence[str]) -> Policy:
    evicting = [policy for policy in policy_names() if load_policy(policy).eviction]
    if name is None:
        raise UsageError(f"--policy is missing; policies that evict: {', '.join(evicting)}")
    policy = load_policy(name, overrides)
    if policy.eviction is None:
        raise UnsupportedError(f"policy {name} keeps every token; policies that evict: {', '.join(evicting)}")
    return policy


def _text(args: argparse.Namespace) -> str:
    if (args.text is None) == (args.prompt_file is None):
        raise UsageError("give the prompt as an argument, or a file with --prompt-file FILE")
    if args.text is not None:
        return str(args.text)
    return text_of(args.prompt_file, "--prompt-file")
