#!/usr/bin/env python3
"""docs/models.md from benchmarks/models.yaml: what each family gains, by arithmetic, or why it is refused.

python -m benchmarks.reports.models
"""

import sys
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.reports.documents import fill
from kvserve.accounting.plan import held_blocks
from kvserve.checks import check_model, check_windows
from kvserve.errors import UnsupportedError
from kvserve.measuring.shape import ModelShape
from kvserve.pages.layout import PageLayout
from kvserve.pages.windows import WindowGroups
from kvserve.policies.base import Policy
from kvserve.policies.loading import load_policy

ROOT = Path(__file__).resolve().parents[2]
FAMILIES, DOCUMENT = ROOT / "benchmarks" / "models.yaml", ROOT / "docs" / "models.md"
CODEC, EVICTING = "kivi-2bit", "kv-compress-2bit@4"
CONTEXTS = {"4k": 4096, "32k": 32768}
BLOCK_SIZE, DTYPE = 64, torch.bfloat16


def families() -> dict[str, list[dict[str, Any]]]:
    """The content of models.yaml."""
    content: dict[str, list[dict[str, Any]]] = yaml.safe_load(FAMILIES.read_text(encoding="utf-8"))
    return content


def config_of(model: dict[str, Any]) -> dict[str, Any]:
    """What a config.json says of a served model's layers."""
    num_layers, heads, kv_heads, head_dim = model["sizes"]
    config = {"num_hidden_layers": num_layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    config["head_dim"] = head_dim
    if "window" in model:
        kinds = {"w": "sliding_attention", "f": "full_attention"}
        layers = [kinds[kind] for kind in islice(cycle(model["pattern"]), num_layers)]
        config |= {"sliding_window": model["window"], "layer_types": layers}
    config["num_kv_shared_layers"] = model.get("shared", 0)
    return config


def request_bytes(config: dict[str, Any], policy: Policy, num_tokens: int) -> int:
    """What a request of a prompt of `num_tokens` holds between two steps; a window that it does not exceed is none."""
    shape = ModelShape.from_hf(config)
    hybrid = shape.hybrid if shape.hybrid and shape.hybrid.window < num_tokens else None
    num_layers = hybrid.num_full if hybrid else shape.num_layers
    layout = PageLayout.build(
        policy, shape.head_dim, BLOCK_SIZE, DTYPE, query_group=shape.query_group, num_layers=num_layers
    )
    blocks = held_blocks(layout, num_tokens)
    if hybrid is None:
        return blocks * layout.cell_bytes * num_layers * shape.num_kv_heads
    slot_bytes = 2 * shape.head_dim * DTYPE.itemsize
    groups = WindowGroups.choose(hybrid, layout.cell_bytes, slot_bytes, BLOCK_SIZE, num_tokens)
    return (blocks + groups.held_blocks(num_tokens)) * groups.block_bytes * shape.num_kv_heads


def stock_bytes(config: dict[str, Any], num_tokens: int) -> int:
    """What stock vLLM's hybrid cache holds of it in 16 bits, to the token."""
    kinds = cached_kinds(config) or ["full_attention"] * config["num_hidden_layers"]
    seen = {
        "full_attention": num_tokens,
        "sliding_attention": min(num_tokens, config.get("sliding_window", num_tokens)),
    }
    slots = sum(seen[kind] for kind in kinds) * config["num_key_value_heads"]
    return int(slots * 2 * config["head_dim"] * DTYPE.itemsize)


def gain(config: dict[str, Any], name: str, num_tokens: int) -> str:
    """How many times fewer bytes a request holds; 'refused' where the policy cannot serve the model at this length."""
    policy = load_policy(name)
    try:
        check_model(config, policy)
        check_windows(config, policy, num_tokens, "it")
    except UnsupportedError:
        return "refused"
    return f"{stock_bytes(config, num_tokens) / request_bytes(config, policy, num_tokens):.2f}x"


def cached_kinds(config: dict[str, Any]) -> list[str]:
    """Kinds of the layers that have a KV cache of their own, where a model has several."""
    kinds: list[str] = config.get("layer_types", [])
    return kinds[: len(kinds) - config.get("num_kv_shared_layers", 0)]


def layers_of(model: dict[str, Any]) -> tuple[str, str]:
    """What is compressed, and what stays dense."""
    kinds = cached_kinds(config_of(model))
    if "full_attention" not in kinds:
        return ("all layers", f"nothing; tokens outside the window of {model['window']:,} stay" if kinds else "nothing")
    full = kinds.count("full_attention")
    more = f"; {model['shared']} more read their caches" if "shared" in model else ""
    return (
        f"{full} full layers of {len(kinds)}{more}",
        f"{len(kinds) - full} layers, the last {model['window']:,} tokens",
    )


def served_table() -> str:
    """Markdown, a row for each served model."""
    policies = [(name, context) for name in (CODEC, EVICTING) for context in CONTEXTS]
    head = [f"`{name}`, {context}" for name, context in policies]
    lines = [
        f"| family | sizes of | compressed | dense | {' | '.join(head)} | tested with | |",
        f"|{'---|' * (7 + len(head) - 1)}",
    ]
    for model in families()["served"]:
        config = config_of(model)
        gains = [gain(config, name, CONTEXTS[context]) for name, context in policies]
        tested = ", ".join(f"`{name}`" for name in model["tested"])
        cells = (model["family"], model["model"], *layers_of(model), *gains, tested, model.get("note", ""))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def refusal(config: dict[str, Any]) -> str:
    """The sentence that names the reason.

    Raises:
        SystemExit: the model is served.
    """
    try:
        check_model(config, load_policy(CODEC), "it")
    except UnsupportedError as error:
        return str(error)
    raise SystemExit(f"{FAMILIES.name}: a model of {config} is not refused")


def refused_table() -> str:
    """Markdown, a row for each refused family."""
    rows = [f"| {model['family']} | {refusal(model['config'])} |" for model in families()["refused"]]
    return "\n".join(["| family | what the command line says |", "|---|---|", *rows])


def document() -> str:
    """The page with its tables made anew."""
    text = DOCUMENT.read_text(encoding="utf-8")
    return fill(fill(text, "served", served_table()), "refused", refused_table())


def main() -> int:
    """Write the page."""
    DOCUMENT.write_text(document(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
