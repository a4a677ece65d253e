"""`kvserve policies`: the table of policies, and everything about one of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from rich.console import Console
from rich.table import Table

from kvserve.policies.base import Policy
from kvserve.policies.loading import load_policy
from kvserve.policies.registry import configs_dir, policy_names

CONTEXT = 4096


def run(arguments: Sequence[str]) -> int:
    """Print the table, or explain the policy named in `arguments`."""
    parser = argparse.ArgumentParser(prog="kvserve policies", description="List the policies, or explain one.")
    parser.add_argument("policy", nargs="?", help="a name, or the path of a YAML file")
    parser.add_argument("--policy-set", action="append", default=[], metavar="KEY=VALUE", help="change one value")
    parser.add_argument("--head-dim", type=int, default=128, help="of the model (default: %(default)s)")
    parser.add_argument("--num-layers", type=int, default=32, help="of the model (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.policy is None and args.policy_set:
        parser.error("--policy-set needs the policy it changes: kvserve policies NAME --policy-set KEY=VALUE")
    console = _console()
    if args.policy is None:
        _print_table(console)
    else:
        _explain(console, load_policy(args.policy, args.policy_set), args.head_dim, args.num_layers)
    return 0


def context_ratio(layout: Any, num_tokens: int = CONTEXT) -> float:
    """How many times more requests of `num_tokens` tokens fit, against a 16-bit cache; tail and sinks included."""
    from kvserve.pages.plan import held_blocks

    sixteen_bit = num_tokens * 2 * layout.head_dim * 2
    return float(sixteen_bit / (held_blocks(layout, num_tokens) * layout.cell_bytes))


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)  # piped: one line per row, whatever $COLUMNS says
    return console


def _layout(policy: Policy, head_dim: int, num_layers: int = 1) -> Any:
    import torch

    from kvserve.pages.layout import PageLayout

    return PageLayout.build(policy, head_dim, policy.tile_tokens, torch.bfloat16, num_layers=num_layers)


def _print_table(console: Console) -> None:
    policies = [load_policy(name) for name in policy_names()]
    policies.sort(key=lambda policy: (-_layout(policy, 128).bits_per_element(), policy.name))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("policy", no_wrap=True)
    for head_dim in (64, 128):
        table.add_column(f"bits/element\nhead_dim {head_dim}", justify="right")
    for head_dim in (64, 128):
        table.add_column(f"capacity\nhead_dim {head_dim}", justify="right")
    table.add_column("what it keeps")
    table.add_column("paper")
    for policy in policies:
        layouts = [_layout(policy, head_dim) for head_dim in (64, 128)]
        bits = [f"{layout.bits_per_element():.2f}" for layout in layouts]
        ratios = [f"{context_ratio(layout):.2f}x" for layout in layouts]
        table.add_row(policy.name, *bits, *ratios, policy.summary, policy.paper or "-")
    console.print(table)
    console.print(
        f"\nbits/element: one sealed K or V element, scales included. capacity: requests of {CONTEXT} tokens\n"
        "that fit, relative to a 16-bit cache; dense tail and sinks counted, prompts evicted where the policy evicts.\n"
        "`kvserve policies NAME` explains one.\n"
        f"Files: {configs_dir()}",
        soft_wrap=True,
    )


def _explain(console: Console, policy: Policy, head_dim: int, num_layers: int) -> None:
    try:
        layout = _layout(policy, head_dim, num_layers)
    except ValueError as error:
        from kvserve.checks import UnsupportedError

        raise UnsupportedError(str(error)) from None
    console.print(f"{policy.name}: {policy.summary}", soft_wrap=True)
    console.print(f"from: {policy.paper or 'no paper'}\n", soft_wrap=True)
    _print_rows(console, "parameters (change one with --policy-set key=value)", _parameters(policy))
    dense_token_bytes = 2 * head_dim * 2
    if layout.sections is None:
        rows = [("dense token", f"{layout.slot_bytes} bytes per KV head and layer (K and V, 16 bits)")]
        _print_rows(console, f"memory at head_dim {head_dim}", rows)
        return
    _print_rows(console, f"one sealed page of {layout.tile_tokens} tokens at head_dim {head_dim}", _sections(layout))
    sealed = layout.sections.size_bytes / layout.tile_tokens
    rows = [
        ("sealed token", f"{sealed:.1f} bytes, against {dense_token_bytes} at 16 bits"),
        ("bits per element", f"{layout.bits_per_element():.2f}"),
        ("dense tail", f"{layout.tail_blocks} blocks of {layout.cell_bytes} bytes (up to {layout.tile_tokens} tokens)"),
        ("dense sinks", f"{layout.sink_blocks} blocks ({policy.sink_tokens} tokens)"),
    ]
    from kvserve.pages.plan import held_blocks

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
        rows += _flat(key, "none" if value is None and key == "eviction" else "dense" if value is None else value)
    return rows


def _flat(key: str, value: Any) -> list[tuple[str, str]]:
    if value == {}:
        return [(key, "dense" if "." in key else "none")]
    if isinstance(value, dict):
        return [row for inner, setting in value.items() for row in _flat(f"{key}.{inner}", setting)]
    return [(key, "none" if value == [] else str(value).lower())]


def _sections(layout: Any) -> list[tuple[str, str]]:
    page = ("page", f"{layout.sections.size_bytes} bytes")
    if layout.policy.dense_pages:
        return [("dense token", f"{layout.slot_bytes} bytes (K and V, 16 bits; 32 in a float32 model)"), page]
    starts = [(f.name, getattr(layout.sections, f.name)) for f in fields(layout.sections) if f.name != "size_bytes"]
    ends = [start for _, start in starts[1:]] + [layout.sections.size_bytes]
    rows = [
        (name.replace("_", " "), f"{end - start} bytes at {start}")
        for (name, start), end in zip(starts, ends, strict=True)
        if end > start
    ]
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
