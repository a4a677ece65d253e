"""How far a layer's answers are from what they should be, and when that is too far.

Three distances, each the size of a difference over the size of what it is compared with (1: as large as the answer):

kernel   from what the policy's cache must answer to the same rows (LayerHistory.expected). The worst single query row.
         Anything above rounding is a bug, a wrong table or broken memory.
codec    from the exact answer of the tokens that the policy holds. Root mean square over all rows: what bits cost.
cache    from a dense cache that holds every token, likewise: what bits and evictions cost together. Where the request
         was evicted, over the rows since then.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from kvserve.policies.base import Policy

KINDS = ("kernel", "codec", "cache")


class LayerDistances:
    """Adds up one layer's differences, per KV head."""

    def __init__(self, num_kv_heads: int) -> None:
        self._worst = torch.zeros(num_kv_heads, dtype=torch.float64)
        self._was_cut = False
        self._squares = {kind: torch.zeros(2, num_kv_heads, dtype=torch.float64) for kind in ("codec", "cache")}

    def add(
        self, output: torch.Tensor, expected: torch.Tensor, uncoded: torch.Tensor, dense: torch.Tensor,
        is_cut: bool = False,
    ) -> None:  # fmt: skip
        """One step's query rows, all [rows, heads, head_dim]; `output` is what the layer answered.

        Args:
            is_cut: whether the request was evicted before. From then on `cache` counts such rows alone: the many rows
                of a prompt, which still sees all of itself, would hide what is lost.
        """
        if is_cut and not self._was_cut:
            self._was_cut = True
            self._squares["cache"].zero_()
        rounded = expected.to(output.dtype).double()  # what an exact kernel would have written
        found = output.detach().cpu().double()
        self._worst = torch.maximum(self._worst, self._by_head(_worst_row(found, rounded)).amax(-1))
        kinds = {"codec": uncoded} | ({"cache": dense} if is_cut or not self._was_cut else {})
        for kind, wanted in kinds.items():
            error, size = (rows.square().sum((0, 2)) for rows in (found - wanted, wanted.double()))
            self._squares[kind] += torch.stack([self._by_head(error).sum(-1), self._by_head(size).sum(-1)])

    def report(self, layer: int, num_tokens: int, codec_limit: float) -> LayerReport:
        """What has been added so far; a difference that is not a number counts as infinite."""
        codec, cache = self._squares["codec"], self._squares["cache"]
        heads = (self._worst.tolist(), _ratio(*codec).tolist(), _ratio(*cache).tolist())
        return LayerReport(
            layer, num_tokens, *heads, float(_ratio(*codec.sum(1))), float(_ratio(*cache.sum(1))), codec_limit
        )

    def _by_head(self, of_query_heads: torch.Tensor) -> torch.Tensor:
        """[heads] to [kv_heads, group]."""
        return of_query_heads.unflatten(0, (len(self._worst), -1))


def _worst_row(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Per query head, the largest error of a row over the row's size, or the head's usual size if that is larger."""
    size = wanted.norm(dim=-1)
    usual = size.square().mean(0).sqrt()
    errors = (found - wanted).norm(dim=-1) / torch.maximum(size, usual).clamp_min(TINY)
    return torch.where(errors.isfinite(), errors, torch.inf).amax(0)


def _ratio(error: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    ratio = (error / size.clamp_min(TINY)).sqrt()
    return torch.where(ratio.isfinite(), ratio, torch.inf)


TINY = 1e-30


@dataclass(frozen=True)
class LayerReport:
    """One layer's distances: `*_heads` by KV head, the others of all heads together.

    Attributes:
        layer: index in the model.
        num_tokens: query rows that were compared.
        codec_limit: of `codec`, by the bits of the layer's pages.
        target: index of the layer whose cache this one reads; None: it has its own.
    """

    layer: int
    num_tokens: int
    kernel_heads: list[float]
    codec_heads: list[float]
    cache_heads: list[float]
    codec: float
    cache: float
    codec_limit: float
    target: int | None = None

    @property
    def kernel(self) -> float:
        """Of the worst head."""
        return max(self.kernel_heads)

    def beside(self, other: LayerReport) -> LayerReport:
        """The same layer with the heads of another rank; of figures over all heads the worse one stays."""
        return LayerReport(
            self.layer, min(self.num_tokens, other.num_tokens), self.kernel_heads + other.kernel_heads,
            self.codec_heads + other.codec_heads, self.cache_heads + other.cache_heads,
            max(self.codec, other.codec), max(self.cache, other.cache), self.codec_limit, self.target,
        )  # fmt: skip


@dataclass(frozen=True)
class ProbeReport:
    """What a probe saw. `problems` are things that make the comparison itself impossible, as sentences."""

    layers: list[LayerReport]
    problems: list[str] = field(default_factory=list)

    @classmethod
    def of_ranks(cls, ranks: list[dict[str, Any]]) -> ProbeReport:
        """Put together what the workers returned (`to_dict`): ranks share layers' heads, or the layers."""
        layers: dict[int, LayerReport] = {}
        for rank in ranks:
            for content in rank["layers"]:
                report = LayerReport(**content)
                earlier = layers.get(report.layer)
                layers[report.layer] = earlier.beside(report) if earlier else report
        problems = dict.fromkeys(problem for rank in ranks for problem in rank["problems"])
        return cls([layers[index] for index in sorted(layers)], list(problems))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for messages between processes and for JSON."""
        return asdict(self)

    def worst(self, kind: str) -> LayerReport:
        """The layer with the largest distance of this kind."""
        return max(self.layers, key=lambda layer: getattr(layer, kind))


# Kernels and reference round alike and store the same bytes, so their answers differ by the order of float32 sums:
# see docs/doctor.md for the spread measured over seeds, policies and dtypes. Damage to one page shows far above this.
KERNEL_LIMIT = 0.02
# By the fewest bits of a page's keys or values. A layer that is off by its own size is no better than one that answers
# zero; with more bits, far less is garbage already. The default model's worst layer has 0.5 with 2 bits.
CODEC_LIMITS = {8: 0.2, 4: 0.6, 0: 1.0}  # from so many bits on
DENSE_LIMIT = 0.05  # rounding to 16 bits


def codec_limit(policy: Policy) -> float:
    """The largest `codec` distance that a layer may have."""
    if policy.key is None:
        return DENSE_LIMIT
    return next(limit for bits, limit in CODEC_LIMITS.items() if policy.code_bits >= bits)


def complaints(report: ProbeReport, num_tokens: int, spare: int = 0) -> list[str]:
    """Why a server must not serve like this, one sentence each; empty: it may.

    Args:
        num_tokens: query rows that every layer should have seen.
        spare: how many more it may have seen: drafts of the last step.
    """
    found = list(report.problems)
    if not report.layers:
        return [*found, "no attention layer was seen"]
    missing = [layer.layer for layer in report.layers if not 0 <= layer.num_tokens - num_tokens <= spare]
    if missing:
        seen = next(layer.num_tokens for layer in report.layers if layer.layer == missing[0])
        found.append(f"{layers_text(missing)} answered {seen} queries of {num_tokens}")
    wrong = [layer.layer for layer in report.layers if not layer.kernel <= KERNEL_LIMIT]
    if wrong:
        worst = report.worst("kernel")
        found.append(
            f"{layers_text(wrong)} of {len(report.layers)}: answers are not what the cache should hold, in layer "
            f"{worst.layer} off by {worst.kernel:.2g} of their size (limit {KERNEL_LIMIT:g}); a kernel, a block table "
            "or the cache's memory is broken"
        )
    lossy = [layer.layer for layer in report.layers if not layer.codec <= layer.codec_limit]
    if lossy:
        worst = max(report.layers, key=lambda layer: layer.codec / layer.codec_limit)
        found.append(
            f"{layers_text(lossy)} of {len(report.layers)}: the codec loses too much, in layer {worst.layer} answers "
            f"are off by {worst.codec:.2g} of their size (limit {worst.codec_limit:g}); these weights need more bits"
        )
    return found


def layers_text(layers: list[int], most: int = 6) -> str:
    """'layer 3', 'layers 0, 1 and 29', 'layers 0, 1, 2, ... and 29'."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    shown = list(map(str, layers if len(layers) <= most else [*layers[: most - 1], "...", layers[-1]]))
    return f"layers {', '.join(shown[:-1])} and {shown[-1]}"
