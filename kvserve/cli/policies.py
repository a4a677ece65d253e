"""`kvserve policies`: the table of policies, and everything about one of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from kvserve.arguments.own_options import split_arguments
from kvserve.arguments.parser import Parser, whole
from kvserve.codecs.format import MASS_BYTES
from kvserve.errors import UsageError
from kvserve.policies.base import Policy
from kvserve.policies.loading import load_policy
from kvserve.policies.registry import configs_dir, policy_names

DESCRIPTION = """\
List the policies, or explain one.

policy options: --policy-set KEY=VALUE, --compression-rate RATE, --max-cache-tokens N
"""
CONTEXT = 4096
HEAD_DIMS = (64, 128)
PIPED_WIDTH = 110


def run(arguments: Sequence[str]) -> int:
    """Print the table, or explain the policy named in `arguments`.

    Raises:
        UsageError, PolicyError, UnsupportedError: it cannot be explained.
    """
    request = split_arguments(arguments, policy_only=True)
    args = _parser().parse_args([*request.vllm_arguments, *(["--help"] if request.wants_help else [])])
    name = args.policy or request.policy
    if args.policy and request.policy not in (None, args.policy):
        raise UsageError(f"two policies were named, {args.policy:.60} and {request.policy:.60}; keep one")
    if name is None and request.overrides:
        raise UsageError("--policy-set needs the policy it changes: kvserve policies NAME --policy-set KEY=VALUE")
    if name is not None:
        if args.json or args.wide:
            raise UsageError("--json and --wide are for the table; leave out the policy's name")
        _explain(_console(), load_policy(name, request.overrides), args.head_dim, args.num_layers)
    elif args.json:
        print(json.dumps([_figures(policy) for policy in _sorted_policies()], indent=1))
    else:
        _print_table(_console(), args.wide)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="kvserve policies", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("policy", nargs="?", help="a name, NAME@RATE, or the path of a YAML file")
    parser.add_argument("--head-dim", type=whole(1, 4096), default=128, help="of the model (default: %(default)s)")
    parser.add_argument("--num-layers", type=whole(1, 10_000), default=32, help="of the model (default: %(default)s)")
    parser.add_argument("--wide", action="store_true", help="the table with both head_dims and the papers")
    parser.add_argument("--json", action="store_true", help="the table for programs")
    return parser


def context_ratio(layout: Any, num_tokens: int = CONTEXT) -> float:
    """How many times more requests of `num_tokens` tokens fit, against a 16-bit cache; tail and sinks included."""
    from kvserve.accounting.plan import held_blocks

    sixteen_bit = num_tokens * 2 * layout.head_dim * 2
    return float(sixteen_bit / (held_blocks(layout, num_tokens) * layout.cell_bytes))


def _console(width: int = PIPED_WIDTH) -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=width)  # piped: the same lines whatever $COLUMNS says
    return console


def _layout(policy: Policy, head_dim: int, num_layers: int = 1) -> Any:
    import torch

    from kvserve.pages.layout import PageLayout

    return PageLayout.build(policy, head_dim, policy.tile_tokens, torch.bfloat16, num_layers=num_layers)


def _sorted_policies() -> list[Policy]:
    """The shipped policies, those of most bits first."""
    policies = [load_policy(name) for name in policy_names()]
    return sorted(policies, key=lambda policy: (-_layout(policy, 128).bits_per_element(), policy.name))


def _figures(policy: Policy) -> dict[str, Any]:
    """One row of the table; numbers by head_dim."""
    layouts = {head_dim: _layout(policy, head_dim) for head_dim in HEAD_DIMS}
    return {
        "policy": policy.name,
        "bits_per_element": {str(head_dim): layout.bits_per_element() for head_dim, layout in layouts.items()},
        "capacity": {str(head_dim): context_ratio(layout) for head_dim, layout in layouts.items()},
        "evicts": policy.eviction is not None,
        "summary": policy.summary,
        "paper": policy.paper or None,
    }


def _print_table(console: Console, wide: bool) -> None:
    """One line per policy; `wide` has every column, however long its lines get."""
    head_dims = HEAD_DIMS if wide else HEAD_DIMS[-1:]
    rows = []
    for figures in map(_figures, _sorted_policies()):
        bits = [f"{figures['bits_per_element'][str(head_dim)]:.2f}" for head_dim in head_dims]
        ratios = [f"{figures['capacity'][str(head_dim)]:.2f}x" for head_dim in head_dims]
        rows.append([figures["policy"], *bits, *ratios, figures["summary"], *([figures["paper"] or "-"] * wide)])
    of = [f" at {head_dim}" if wide else "" for head_dim in head_dims]
    names = ["policy", *(f"bits{text}" for text in of), *(f"capacity{text}" for text in of), "what it keeps"]
    for line in _aligned([[*names, *(["paper"] * wide)], *rows], numbers=2 * len(head_dims)):
        console.print(line if wide else _cut(line, console.width), soft_wrap=True, markup=False)
    console.print(
        f"\nbits: of one sealed K or V element, scales included{'' if wide else f', at head_dim {HEAD_DIMS[-1]}'}.\n"
        f"capacity: requests of {CONTEXT} tokens that fit, relative to a 16-bit cache; dense tail and sinks counted,\n"
        "prompts evicted where the policy evicts. `kvserve policies NAME` explains one; --wide and --json print more.\n"
        f"Files: {configs_dir()}",
        soft_wrap=True,
    )


def _aligned(rows: list[list[str]], numbers: int) -> list[str]:
    """Rows as lines; the columns 1 to `numbers` end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if 1 <= place <= numbers else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: max(width - 1, 1)] + "…"


def _explain(console: Console, policy: Policy, head_dim: int, num_layers: int) -> None:
    try:
        layout = _layout(policy, head_dim, num_layers)
    except ValueError as error:
        from kvserve.errors import UnsupportedError

        raise UnsupportedError(str(error)) from None
    console.print(f"{policy.name}: {policy.summary}", soft_wrap=True)
    console.print(f"from: {policy.paper or 'no paper'}\n", soft_wrap=True)
    _print_rows(console, "parameters (change one with --policy-set key=value)", _parameters(policy))
    dense_token_bytes = 2 * head_dim * 2
    if not layout.has_pages:
        rows = [("dense token", f"{layout.slot_bytes} bytes per KV head and layer (K and V, 16 bits)")]
        _print_rows(console, f"memory at head_dim {head_dim}", rows)
        return
    _print_rows(console, f"one sealed page of {layout.tile_tokens} tokens at head_dim {head_dim}", _sections(layout))
    sealed = layout.tile_format.tile_bytes / layout.tile_tokens
    rows = [
        ("sealed token", f"{sealed:.1f} bytes, against {dense_token_bytes} at 16 bits"),
        ("bits per element", f"{layout.bits_per_element():.2f}"),
        ("dense tail", f"{layout.tail_blocks} blocks of {layout.cell_bytes} bytes (up to {layout.tile_tokens} tokens)"),
        ("dense sinks", f"{layout.sink_blocks} blocks ({policy.sink_tokens} tokens)"),
    ]
    from kvserve.accounting.plan import held_blocks

    for context in (1024, CONTEXT, 32768):
        total = held_blocks(layout, context) * layout.cell_bytes
        ratio = context_ratio(layout, context)
        rows.append((f"{context} tokens", f"{total} bytes, {ratio:.2f} times fewer than 16-bit"))
    if layout.spared_layers:
        kept_whole = ", ".join(map(str, layout.spared_layers))
        rows.append(("kept whole", f"layers {kept_whole} of {num_layers} (--num-layers); the sizes above are averages"))
    if policy.layers:
        rows.append(
            ("average", f"over {num_layers} layers (--num-layers), of which {len(policy.layers)} have other pages")
        )
    _print_rows(console, "memory per KV head and layer", rows)


def _parameters(policy: Policy) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in policy.model_dump(mode="json").items():
        if key in ("name", "summary", "paper"):
            continue
        if key in ("key", "value") and value:
            value = {name: setting for name, setting in value.items() if setting is not None}
        rows += _flat(key, "none" if value is None and key == "eviction" else "dense" if value is None else value)
    return rows


def _flat(key: str, value: Any) -> list[tuple[str, str]]:
    if value == {}:
        return [(key, "dense" if "." in key else "none")]
    if isinstance(value, dict):
        return [row for inner, setting in value.items() for row in _flat(f"{key}.{inner}", setting)]
    return [(key, "none" if value == [] else str(value).lower())]


def _sections(layout: Any) -> list[tuple[str, str]]:
    page = ("page", f"{layout.tile_format.tile_bytes} bytes")
    if layout.policy.dense_pages:
        return [("dense token", f"{layout.slot_bytes} bytes (K and V, 16 bits; 32 in a float32 model)"), page]
    places = [("key", *place) for place in layout.tile_format.keys]
    places += [("value", *place) for place in layout.tile_format.values]
    places.sort(key=lambda place: place[2])
    rows = [
        (f"{half} {section.name.replace('_', ' ')}", f"{section.size_bytes} bytes at {offset}")
        for half, section, offset in places
    ]
    if (mass := layout.tile_format.mass) is not None:
        rows.append(("log-mass", f"{MASS_BYTES * layout.tile_tokens} bytes at {mass}"))
    return [*rows, page]


def _print_rows(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    console.print(f"[bold]{title}[/bold]", soft_wrap=True)
    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()
