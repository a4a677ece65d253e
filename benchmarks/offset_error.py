#!/usr/bin/env python3
"""Where the error of 8-bit keys comes from when their channels have offsets larger than the signal, as key biases give.

    python -m benchmarks.offset_error --out benchmarks/results/cpu-zen4-offsets.json

Random keys N(0, 1) plus a bias per channel, turned by RoPE or not, 1,024 of them before the query. An error of logits
is the root mean square over the tokens, less what is common to them, which softmax ignores.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from kvserve.attention.base import Answers, Batch, LayerSpec, NewRows
from kvserve.attention.native import NativeAttention
from kvserve.pages.layout import PageLayout
from kvserve.pages.reference import decode_page, encode_page
from kvserve.policies.loading import load_policy
from kvserve.scorers.rotary import Rotary

HEAD_DIM, TOKENS, QUERIES, SEEDS = 64, 1024, 32, 8
THETA = 1e6  # Qwen2's
TILE = 64

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # query [QUERIES, D], key and value [TOKENS, D], float32
Bias = Callable[[torch.Generator], torch.Tensor]


def signs(size: float) -> Bias:
    return lambda generator: size * (2.0 * torch.randint(0, 2, (HEAD_DIM,), generator=generator) - 1)


def normal(size: float) -> Bias:
    return lambda generator: size * torch.randn(HEAD_DIM, generator=generator)


# Name: bias, whether RoPE turns it, softmax scale.
CASES: dict[str, tuple[Bias, bool, float]] = {
    "no bias": (normal(0), True, HEAD_DIM**-0.5),
    "no bias, scale 1": (normal(0), True, 1.0),
    "bias +-50": (signs(50), True, HEAD_DIM**-0.5),
    "bias N(0, 50)": (normal(50), True, HEAD_DIM**-0.5),
    "offset N(0, 50), not turned": (normal(50), False, HEAD_DIM**-0.5),
    "offset N(0, 1000), not turned": (normal(1000), False, HEAD_DIM**-0.5),
}


def rows_of(bias: Bias, turned: bool, seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(QUERIES, HEAD_DIM, generator=generator)
    key = torch.randn(TOKENS, HEAD_DIM, generator=generator) + bias(generator)
    value = torch.randn(TOKENS, HEAD_DIM, generator=generator)
    if turned:
        half = HEAD_DIM // 2
        rotary = Rotary(THETA ** (-torch.arange(half) / half))
        key = rotary.rotate(key, torch.arange(TOKENS))
        query = rotary.rotate(query, torch.full((QUERIES,), TOKENS))
    return query, key, value


def coded(key: torch.Tensor, value: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """What the pages of the rows say."""
    tiles = zip(key.split(TILE), value.split(TILE), strict=True)
    pages = [decode_page(encode_page(*tile, layout), layout) for tile in tiles]
    return torch.cat([page[0] for page in pages]), torch.cat([page[1] for page in pages])


def centred(key: torch.Tensor) -> torch.Tensor:
    """8-bit codes of exact rows less their channel's mean, with scales and minima in float32."""
    groups = key.double().reshape(-1, TILE, HEAD_DIM)
    mean = groups.mean(1, keepdim=True)
    rest = groups - mean
    low, high = rest.amin(1, keepdim=True), rest.amax(1, keepdim=True)
    scale = (high - low) / 255
    return (((rest - low) / scale).round() * scale + low + mean).reshape(TOKENS, HEAD_DIM)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> tuple[torch.Tensor, ...]:
    """(logits, answers) in float64."""
    logits = query.double() @ key.double().T * scale
    return logits, logits.softmax(-1) @ value.double()


def kernel_answers(rows: Rows, layout: PageLayout, scale: float) -> torch.Tensor:
    """What the compiled kernels answer to each query as a decode step over sealed pages; its own key weighs nothing."""
    query, key, value = rows
    row = torch.arange(layout.blocks_for(TOKENS + 1), dtype=torch.int32)[None]
    cells = torch.zeros(row.shape[1], 1, layout.cell_bytes, dtype=torch.uint8)
    attention = NativeAttention(layout, LayerSpec(1, 1, scale))
    attention.store(key[:, None], value[:, None], cells, batch_of(0, TOKENS, row))
    answers = []
    for each in query:
        own = -each[None, None] * 1e4 / each.norm() ** 2 / scale
        output = torch.empty(1, 1, HEAD_DIM)
        new = NewRows(each[None, None], own, torch.zeros_like(own))
        attention.forward(new, cells, batch_of(TOKENS, 1, row), Answers(output))
        answers.append(output[0, 0])
    return torch.stack(answers).double()


def batch_of(computed: int, new: int, row: torch.Tensor) -> Batch:
    lengths = torch.tensor([computed + new], dtype=torch.int32)
    return Batch(torch.tensor([0, new], dtype=torch.int32), lengths, row)


def errors(bias: Bias, turned: bool, scale: float, layout: PageLayout) -> dict[str, list[float]]:
    """Of each way to keep the keys: [error of logits, relative error of answers], means over seeds."""
    sums: dict[str, torch.Tensor] = {}
    for seed in range(SEEDS):
        rows = rows_of(bias, turned, seed)
        query, key, value = rows
        logits, exact = attend(query, key, value, scale)
        page_key, page_value = coded(key.half().float(), value.half().float(), layout)
        ways = {
            "rows in bfloat16": (key.bfloat16(), value),
            "rows in float16": (key.half(), value),
            "8-bit codes of exact rows": (coded(key, value, layout)[0], value),
            "8-bit codes of exact rows less their mean": (centred(key), value),
            "pages": (page_key, page_value),
        }
        for name, (other_key, other_value) in ways.items():
            other_logits, answers = attend(query, other_key, other_value, scale)
            off = other_logits - logits
            off = (off - off.mean(-1, keepdim=True)).square().mean().sqrt()
            sums[name] = sums.get(name, 0) + torch.stack([off, (answers - exact).norm() / exact.norm()])
        of_pages = attend(query, page_key, page_value, scale)[1]
        off = (kernel_answers(rows, layout, scale) - of_pages).norm() / of_pages.norm()
        name = "kernel, over what its pages say"
        sums[name] = sums.get(name, 0) + torch.stack([torch.tensor(torch.nan).double(), off])
    return {name: [float(f"{x:.3g}") for x in (total / SEEDS).tolist()] for name, total in sums.items()}


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="result file")
    options = parser.parse_args()
    layout = PageLayout.build(load_policy("int8"), HEAD_DIM, TILE, torch.float32)
    found = {name: errors(*case, layout) for name, case in CASES.items()}
    for name, ways in found.items():
        print(name)
        for way, (of_logits, of_answers) in ways.items():
            print(f"  {way:42} logits {of_logits:8.3g}  answers {of_answers:8.3g}")
    for ways in found.values():
        ways["kernel, over what its pages say"].pop(0)
    record = {
        "schema": 1,
        "command": ["python", "-m", "benchmarks.offset_error", *(Path(word).name for word in sys.argv[1:])],
        "seeds": SEEDS,
        "errors": found,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
