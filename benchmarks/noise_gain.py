#!/usr/bin/env python3
"""What a cache makes of rounding noise in its rows, as matrix products in batches of another shape leave it.

    python -m benchmarks.noise_gain --out benchmarks/results/cpu-zen4-noise.json

One layer, 1,024 random tokens, 64 queries: every key and value changes by a random share of itself, and the answers
change by the share printed, per size of the noise. In float32: 16-bit rows swallow noise below their own rounding.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from kvserve.attention.base import Answers, Batch, LayerSpec, NewRows
from kvserve.attention.native import NativeAttention
from kvserve.pages.layout import PageLayout
from kvserve.policies.loading import load_policy

POLICIES = ("none", "int8", "kivi-4bit", "kivi-2bit", "boost-2bit")
NOISE = (1e-7, 1e-6, 1e-5, 1e-4)
HEAD_DIM, HEADS, GROUP, TOKENS, QUERIES = 64, 2, 3, 1024, 64


def answers(policy: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Of the last QUERIES rows, each in a step of its own."""
    loaded = load_policy(policy)
    layout = PageLayout.build(loaded, HEAD_DIM, 64 if loaded.has_pages else 16, torch.float32)
    attention = NativeAttention(layout, LayerSpec(HEADS * GROUP, HEADS, HEAD_DIM**-0.5))
    row = torch.arange(layout.blocks_for(TOKENS + QUERIES), dtype=torch.int32)[None]
    cells = torch.zeros(row.shape[1], HEADS, layout.cell_bytes, dtype=torch.uint8)
    found = torch.empty(QUERIES, HEADS * GROUP, HEAD_DIM)
    attention.store(key[:TOKENS], value[:TOKENS], cells, step(0, TOKENS, row))
    for i in range(QUERIES):
        own = slice(TOKENS + i, TOKENS + i + 1)
        batch = step(TOKENS + i, 1, row)
        attention.forward(NewRows(query[i : i + 1], key[own], value[own]), cells, batch, Answers(found[i : i + 1]))
    return found


def step(computed: int, new: int, row: torch.Tensor) -> Batch:
    lengths = torch.tensor([computed + new], dtype=torch.int32)
    return Batch(torch.tensor([0, new], dtype=torch.int32), lengths, row)


def gains(policy: str) -> dict[str, float]:
    """Size of the noise: change of the answers, over their size."""
    generator = torch.Generator().manual_seed(0)

    def normal(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, HEAD_DIM, generator=generator)

    query, key, value = normal(QUERIES, HEADS * GROUP), normal(TOKENS + QUERIES, HEADS), normal(TOKENS + QUERIES, HEADS)
    key = key + normal(1, HEADS)
    exact = answers(policy, query, key, value)
    found = {}
    for size in NOISE:
        noisy = [rows * (1 + size * normal(TOKENS + QUERIES, HEADS)) for rows in (key, value)]
        change = answers(policy, query, *noisy) - exact
        found[f"{size:.0e}"] = float(f"{change.norm() / exact.norm():.2g}")
    return found


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="result file")
    options = parser.parse_args()
    record = {
        "schema": 1,
        "command": ["python", "-m", "benchmarks.noise_gain", *(Path(word).name for word in sys.argv[1:])],
        "change_of_answers": {policy: gains(policy) for policy in POLICIES},
    }
    print(json.dumps(record["change_of_answers"], indent=1))
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
