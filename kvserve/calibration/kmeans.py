"""Weighted k-means, on a line and in a few dimensions."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor

import torch

_BLOCK = 1024  # points whose distances are compared at once, so that they stay in a core's cache
_LEAST_GAP = 1e-6


def line_levels(
    values: torch.Tensor, weights: torch.Tensor | None, num_levels: int, iterations: int = 50
) -> torch.Tensor:
    """Lloyd's algorithm on a line, from the weighted quantiles (i + 1/2) / num_levels.

    Sorted once, every iteration reads its sums from prefix sums, so it costs num_levels searches and no pass.

    Args:
        values, weights: float [n]; weights at least 0, None: all 1.

    Returns:
        float32 [num_levels], strictly ascending.

    Raises:
        ValueError: there are no values of positive weight.
    """
    ordered, order = values.double().sort()
    weight = torch.ones_like(ordered) if weights is None else weights.double()[order]
    total = weight.cumsum(0)
    if not len(ordered) or not total[-1] > 0:
        raise ValueError("k-means needs values of positive weight")
    moment = (weight * ordered).cumsum(0)
    shares = (torch.arange(num_levels, dtype=torch.float64) + 0.5) / num_levels * total[-1]
    levels = ordered[torch.searchsorted(total, shares).clamp(max=len(ordered) - 1)]
    for _ in range(iterations):
        ends = torch.searchsorted(ordered, (levels[1:] + levels[:-1]) / 2)
        mass, sums = _between(total, ends), _between(moment, ends)
        moved = torch.where(mass > 0, sums / mass.clamp(min=1e-300), levels)
        if torch.equal(moved, levels):
            break
        levels = moved
    return ascending(levels)


def _between(prefix: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Sums of the stretches that `ends` divide a list into, from its inclusive prefix sums."""
    at = torch.cat([prefix.new_zeros(1), prefix])[torch.cat([ends, ends.new_tensor([len(prefix)])])]
    return at.diff(prepend=prefix.new_zeros(1))


def ascending(levels: torch.Tensor, limit: float = math.inf) -> torch.Tensor:
    """Sorted levels as float32 within -limit and limit, those that would coincide moved apart a little."""
    rising = levels.clamp(-limit, limit).float().tolist()
    for index in range(1, len(rising)):
        rising[index] = max(rising[index], rising[index - 1] + _LEAST_GAP)
    top = limit
    for index in reversed(range(len(rising))):
        rising[index] = min(rising[index], top)
        top = rising[index] - _LEAST_GAP
    return torch.tensor(rising, dtype=torch.float32)


def codebooks(
    points: torch.Tensor, weights: torch.Tensor | None, num_centroids: int, iterations: int, seed: int
) -> torch.Tensor:
    """Lloyd's algorithm from k-means++ (Arthur and Vassilvitskii, 2007), for several sets of points at once.

    Args:
        points: float32 [sets, n, dim].
        weights: float32 [sets, n], at least 0; None: all 1.

    Returns:
        float32 [sets, num_centroids, dim].

    Raises:
        ValueError: fewer points than centroids.
    """
    if points.shape[1] < num_centroids:
        raise ValueError(f"{num_centroids} centroids need as many points, got {points.shape[1]}")
    weight = points.new_ones(points.shape[:2]) if weights is None else weights.float()
    weight = weight / weight.mean(1, keepdim=True).clamp(min=1e-30)
    start = _spread_start(points, weight, num_centroids, seed)

    def improved(index: int) -> torch.Tensor:
        return _lloyd(points[index], weight[index], start[index], iterations)

    # One thread for each set: the products are too small to be divided.
    with ThreadPoolExecutor(os.cpu_count(), initializer=lambda: torch.set_num_threads(1)) as pool:
        return torch.stack(list(pool.map(improved, range(len(start)))))


def _spread_start(points: torch.Tensor, weights: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """k-means++: each start is drawn with a probability in proportion to weight times squared distance."""
    generator = torch.Generator().manual_seed(seed)
    sets, channels = torch.arange(len(points)), points.transpose(1, 2).contiguous()
    chances, chosen = weights, []
    nearest = torch.full_like(weights, torch.inf)
    for _ in range(count):
        ends = chances.double().cumsum(1)
        drawn = torch.rand(len(points), 1, generator=generator, dtype=torch.float64) * ends[:, -1:]
        index = torch.searchsorted(ends, drawn).squeeze(1).clamp(max=points.shape[1] - 1)
        chosen.append(points[sets, index])
        nearest = torch.minimum(nearest, (channels - chosen[-1][..., None]).square_().sum(1))
        chances = weights * nearest
    return torch.stack(chosen, 1)


def _lloyd(points: torch.Tensor, weights: torch.Tensor, centroids: torch.Tensor, iterations: int) -> torch.Tensor:
    """One set. A centroid that has no points stays where it is."""
    weighted = torch.cat([points * weights[:, None], weights[:, None]], 1)
    for _ in range(iterations):
        sums = weighted.new_zeros(len(centroids), weighted.shape[1])
        sums.index_add_(0, nearest_centroid(points, centroids), weighted)
        moved = torch.where(sums[:, -1:] > 0, sums[:, :-1] / sums[:, -1:].clamp(min=1e-30), centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def nearest_centroid(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Index of the centroid [k, dim] at the least Euclidean distance from each point [n, dim], int64 [n]."""
    offsets = centroids.square().sum(1)
    distances = (torch.addmm(offsets, block, centroids.T, alpha=-2) for block in points.split(_BLOCK))
    # On a CPU numpy's argmin takes an eighth of torch's time.
    return torch.cat([torch.from_numpy(block.numpy().argmin(1)) for block in distances])
