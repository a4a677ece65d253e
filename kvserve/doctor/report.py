"""What the doctor found, drawn on a terminal: a line for each layer, and a map of the KV heads."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvserve.doctor.examination import KL_LIMIT_NATS, Examination
from kvserve.probe.distances import KERNEL_LIMIT, LayerReport
from kvserve.shades import shade

BAR_WIDTH = 20
PIPED_WIDTH = 120


def draw(console: Console, examination: Examination) -> None:
    """The layers, the distance end to end and the verdict."""
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPED_WIDTH)
    console.print(layer_table(examination))
    console.print(
        "cache: off from a dense cache's answer, over the answer's size; codec: by bits alone; KV heads: codec, a full "
        "block is the limit; alone: KL of the next token, nats, where only this layer is compressed.",
        soft_wrap=True,
    )
    found = examination.end_to_end
    console.print(
        f"next token against a dense cache, {found.positions} positions: mean KL {found.kl:.4g} nats (limit "
        f"{KL_LIMIT_NATS:g}), same most likely token {found.agreement:.0%}",
        soft_wrap=True,
    )
    for line in verdict(examination):
        console.print(line, soft_wrap=True, style="bold" if examination.is_fit else "bold red")


def layer_table(examination: Examination) -> Table:
    """One line for each layer; bars are as long as the largest loss."""
    table = Table(title=f"policy {examination.policy}", title_justify="left", box=None, padding=(0, 1))
    for name in ("layer", "kernel", "codec", "cache"):
        table.add_column(name, justify="right")
    table.add_column("")
    table.add_column("KV heads")
    table.add_column("alone", justify="right")
    longest = max((layer.cache for layer in examination.report.layers), default=0.0)
    for layer in examination.report.layers:
        alone = examination.alone.get(layer.layer)
        table.add_row(
            str(layer.layer), _kernel(layer), _number(layer.codec, layer.codec_limit), f"{layer.cache:.3f}",
            bar(layer.cache, longest), head_map(layer), "" if alone is None else f"{alone:.4f}",
        )  # fmt: skip
    return table


def bar(value: float, longest: float) -> str:
    """A bar of at most BAR_WIDTH characters, eighths included; infinite values fill it."""
    if not longest > 0:
        return ""
    eighths = 8 * BAR_WIDTH if not value < longest else round(8 * BAR_WIDTH * value / longest)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def head_map(layer: LayerReport) -> str:
    """A character for each KV head, as dark as its codec distance is close to the limit."""
    return "".join(shade(min(head / layer.codec_limit, 1.0)) for head in layer.codec_heads)


def verdict(examination: Examination) -> list[str]:
    """Fit to serve, or why not; and which layers suffer most."""
    layers = examination.report.layers
    if not examination.is_fit:
        return [f"{examination.policy}: NOT fit to serve:", *(f"  {found}" for found in examination.complaints)]
    cost = examination.alone or {layer.layer: layer.cache for layer in layers}
    worst = sorted(cost, key=lambda layer: -cost[layer])[:3]
    what = "cost most alone" if examination.alone else "are off most"
    return [f"{examination.policy}: fit to serve; of {len(layers)} layers {', '.join(map(str, worst))} {what}"]


def _kernel(layer: LayerReport) -> Text:
    return Text(f"{layer.kernel:.1e}", style="" if layer.kernel <= KERNEL_LIMIT else "bold red")


def _number(value: float, limit: float) -> Text:
    return Text(f"{value:.3f}", style="" if value <= limit else "bold red")
