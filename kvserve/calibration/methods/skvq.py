"""SKVQ's channel order and clipping (Duanmu et al., arXiv 2405.06219, section 3)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from kvserve.calibration.kmeans import codebooks
from kvserve.calibration.methods.base import HalfRows, Method, Table
from kvserve.codecs.layer_tables import KV_HEADS
from kvserve.codecs.tile import Half

CLIPS = tuple(round(1 - 0.05 * step, 2) for step in range(11))  # 1 down to 0.5


class Skvq(Method):
    """An order in which channels of alike range stand together, and how far each group's range is clipped.

    The channels of a KV head are clustered by their least and largest element, and stand in the order of the clusters'
    ranges; each `group_size` of them share one range for each token. The paper orders the channels of all heads of a
    layer together before the rotary embedding; here a head's stay in it, so that the order can be taken after the
    embedding, in queries too.
    """

    name: Literal["skvq"] = "skvq"
    keys: Literal["before-rope", "after-rope"] = "after-rope"
    bits: Literal[2, 4] = 2
    group_size: Literal[32, 64, 128] = 32
    paper: ClassVar[str] = "SKVQ, arXiv 2405.06219"

    def tables(self, head_dim: int) -> tuple[Table, ...]:
        if head_dim % self.group_size:
            raise ValueError(f"group_size {self.group_size} does not divide head_dim {head_dim}; set it to 32")
        order, clip = (KV_HEADS, head_dim), (KV_HEADS, head_dim // self.group_size)
        return (
            Table(Half.KEY, "permutation.order", order, torch.int32, "permutation"),
            Table(Half.KEY, "affine.clip", clip, rule="clip"),
            Table(Half.VALUE, "permutation.order", order, torch.int32, "permutation"),
            Table(Half.VALUE, "affine.clip", clip, rule="clip"),
        )

    def fit(self, half: Half, rows: HalfRows, seed: int) -> dict[str, torch.Tensor]:
        order = channel_order(rows.rows, rows.rows.shape[2] // self.group_size, seed)
        index = order.long()[:, None].expand_as(rows.rows)
        weights = None if rows.weights is None else rows.weights.gather(2, index)
        clip = best_clips(rows.rows.gather(2, index), weights, self.bits, self.group_size)
        return {"permutation.order": order, "affine.clip": clip}


def channel_order(rows: torch.Tensor, clusters: int, seed: int) -> torch.Tensor:
    """The old place of each channel in the new order, int32 [kv_heads, head_dim].

    Args:
        rows: [kv_heads, tokens, head_dim].
        clusters: of the channels of a head.
    """
    features = torch.stack([rows.amin(1), rows.amax(1)], 2)
    spread = features[..., 1] - features[..., 0]
    centres = codebooks(features, None, clusters, 50, seed)
    nearest = torch.cdist(features, centres).argmin(2)
    width = centres[..., 1] - centres[..., 0]
    # Clusters by their range, channels of a cluster by their own.
    rank = width.argsort(1).argsort(1).gather(1, nearest)
    by_range = spread.argsort(dim=1, stable=True)
    by_cluster = rank.gather(1, by_range).argsort(dim=1, stable=True)
    return by_range.gather(1, by_cluster).int()


def best_clips(rows: torch.Tensor, weights: torch.Tensor | None, bits: int, group_size: int) -> torch.Tensor:
    """The factor of `CLIPS` for each group's least and largest element with the least (weighted) squared error.

    Args:
        rows: [kv_heads, tokens, head_dim] in the new order; a token's group is coded asymmetrically, in 2**bits steps.

    Returns:
        float32 [kv_heads, groups].
    """
    grouped = rows.unflatten(2, (-1, group_size))
    importance = None if weights is None else weights.unflatten(2, (-1, group_size))
    low, high = grouped.amin(3, keepdim=True), grouped.amax(3, keepdim=True)
    errors = []
    for clip in CLIPS:
        step = ((high - low) * clip / (2**bits - 1)).clamp(min=1e-5)
        codes = ((grouped - low * clip) / step).round().clamp(0, 2**bits - 1)
        error = (codes * step + low * clip - grouped).square()
        errors.append((error if importance is None else error * importance).sum((1, 3)))
    return torch.tensor(CLIPS)[torch.stack(errors).argmin(0)]
