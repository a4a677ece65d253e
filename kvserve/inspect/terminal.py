"""Draw an Inspection as text: coloured where the terminal has colours, in five shades where not."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from rich.console import Console
from rich.text import Text

from kvserve.inspect.result import Inspection
from kvserve.shades import shade

LABEL_WIDTH = 10  # "layer 123 "


def draw(console: Console, inspection: Inspection) -> None:
    """The numbers, both maps and the text."""
    counts = inspection.kept_counts()
    report = inspection.report
    console.print(
        f"policy {inspection.policy}, model {inspection.model}, keep {inspection.limit}: of {len(inspection.tokens)} "
        f"tokens a KV head keeps {counts.mean():.1f} on average, {counts.min()} to {counts.max()}; "
        f"{report['bytes_held']:,} bytes\n",
        soft_wrap=True,
        markup=False,
    )
    console.print("kept tokens: layers down, KV heads across", style="bold")
    for line in count_lines(counts, console.width):
        console.print(line, soft_wrap=True)
    console.print(
        "\nwhich tokens stay: layers down, positions across; the more KV heads keep, the darker", style="bold"
    )
    for line in position_lines(inspection.layer_shares(), console.width):
        console.print(line, soft_wrap=True)
    console.print(f"\nthe text: {_text_legend(console)}", style="bold")
    console.print(shaded_text(inspection, console.color_system is not None))


def count_lines(counts: np.ndarray, width: int) -> list[Text]:
    """One line for each layer, a number for each KV head; without the numbers where they do not fit into `width`."""
    digits = len(str(counts.max()))
    numbered = LABEL_WIDTH + counts.shape[1] * (digits + 2) <= width
    shares = counts / counts.max()
    lines = []
    for layer, (row, row_shares) in enumerate(zip(counts, shares, strict=True)):
        line = Text(f"layer {layer}".ljust(LABEL_WIDTH))
        for count, share in zip(row, row_shares, strict=True):
            line.append(f" {count:>{digits}} " if numbered else shade(share), _style(share, on_cells=numbered))
        lines.append(line)
    return lines


def position_lines(shares: np.ndarray, width: int) -> list[Text]:
    """One line for each layer; a column is the average of consecutive tokens."""
    columns = min(max(width - LABEL_WIDTH, 1), shares.shape[1])
    borders = np.linspace(0, shares.shape[1], columns + 1).round().astype(int)
    lines = []
    for layer, row in enumerate(shares):
        line = Text(f"layer {layer}".ljust(LABEL_WIDTH))
        for first, last in pairwise(borders):
            share = float(row[first:last].mean())
            line.append(shade(share), _style(share, on_cells=False))
        lines.append(line)
    return lines


def shaded_text(inspection: Inspection, has_colors: bool) -> Text:
    """The prompt; without colours, tokens that fewer than half of the KV heads keep are dots."""
    text = Text()
    for token, share in zip(inspection.tokens, inspection.token_shares(), strict=True):
        if has_colors:
            text.append(token, _style(share, on_cells=True))
        else:
            text.append(token if share >= 0.5 else "".join(c if c.isspace() else "·" for c in token))
    return text


def _style(share: float, on_cells: bool) -> str:
    """From grey to green; `on_cells` colours the background."""
    red, green, blue = (round(low + share * (high - low)) for low, high in ((48, 30), (48, 150), (48, 70)))
    return f"{'white on ' if on_cells else ''}rgb({red},{green},{blue})"


def _text_legend(console: Console) -> str:
    if console.color_system is not None:
        return "the more KV heads of all layers keep a token, the greener"
    return "dots for tokens that fewer than half of the KV heads keep"
