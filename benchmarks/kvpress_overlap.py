#!/usr/bin/env python3
"""Which share of the tokens that a policy keeps the press of the same method keeps too, on two prompts.

    kvpress/bin/python -m benchmarks.kvpress_overlap --model FOLDER --prompts prompts.json --out out.json

In the environment of kvpress_parity.py. The policies of benchmarks/as-kvpress have the parameters of kvpress, so that
only the implementations differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.kvpress_parity import Presses, make_press
from kvserve.policies.loading import load_policy

FOLDER = Path(__file__).parent / "as-kvpress"
AS_KVPRESS = {"snapkv": "snapkv", "ada-snapkv": "ada-snapkv", "pyramidkv": "pyramidkv", "h2o": "observed-attention"}
SHIPPED = {**AS_KVPRESS, **{name: name for name in ("expected-attention", "knorm", "keydiff", "tova", "streaming-llm")}}


def pairs() -> dict[str, tuple[str, str]]:
    """Policy: what to load, and the press."""
    found = {f"{name}-as-kvpress": press for name, press in AS_KVPRESS.items()}
    same_parameters = {name: (str(FOLDER / f"{name}.yaml"), press) for name, press in found.items()}
    return same_parameters | {name: (name, press) for name, press in SHIPPED.items()}


def shares(presses: Presses, content: dict[str, Any], kind: str) -> dict[str, dict[str, float]]:
    """Policy, rate: the share on the first prompt of the kind, all layers and KV heads together."""
    tokens, counts = content["prompts"][kind][0]["tokens"], content["kept_tokens"][kind]
    names = {press for _, press in pairs().values()}
    made = {name: [make_press(name, len(tokens), counts[rate][0]) for rate in counts] for name in names}
    prompt, kept = presses.prefill(tokens, made)
    of_press = dict(zip([(name, rate) for name in made for rate in counts], kept, strict=True))
    found: dict[str, dict[str, float]] = {}
    for label, (policy, press) in pairs().items():
        for rate in counts:
            ours = presses.evicted.kept_tokens(prompt, load_policy(policy, [f"eviction.rate={rate}"]))
            both = int((ours & of_press[press, rate]).sum())
            found.setdefault(label, {})[rate] = round(both / int(ours.sum()), 5)
    return found


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--prompts", type=Path, required=True, help="from benchmarks.eviction_quality --prompts-out")
    parser.add_argument("--out", type=Path, required=True, help="result file")
    options = parser.parse_args()
    presses, content = Presses(options.model), json.loads(options.prompts.read_text(encoding="utf-8"))
    record = {
        "schema": 1,
        "command": ["python", "-m", "benchmarks.kvpress_overlap", *(Path(word).name for word in sys.argv[1:])],
        "seed": content["prompts"]["seed"],
        "presses": {label: press for label, (_, press) in pairs().items()},
        "shared": {kind: shares(presses, content, kind) for kind in ("questions", "texts")},
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
