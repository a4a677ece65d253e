"""Draw an Inspection into a PNG file with matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvserve.errors import UsageError
from kvserve.inspect.result import Inspection


def load_pyplot() -> Any:
    """matplotlib's pyplot, which draws into files only.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UsageError('--png needs matplotlib; install it with `pip install "kvserve[plot]"`') from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def write_png(path: Path, inspection: Inspection) -> None:
    """Two maps above each other: kept tokens of layers and KV heads, and the tokens that stay."""
    pyplot = load_pyplot()
    counts, shares = inspection.kept_counts(), inspection.layer_shares()
    figure, (by_head, by_position) = pyplot.subplots(2, 1, figsize=(12, 9), layout="constrained")
    figure.suptitle(f"{inspection.policy} on {inspection.model}, keep {inspection.limit}")
    image = by_head.imshow(counts, aspect="auto", interpolation="nearest", vmin=0)
    by_head.set(xlabel="KV head", ylabel="layer", xticks=range(counts.shape[1]))
    figure.colorbar(image, ax=by_head, label=f"kept of {len(inspection.tokens)} tokens")
    image = by_position.imshow(shares, aspect="auto", interpolation="nearest", vmin=0, vmax=1)
    by_position.set(xlabel="position", ylabel="layer")
    figure.colorbar(image, ax=by_position, label="share of KV heads that keep the token")
    figure.savefig(path)
    pyplot.close(figure)
