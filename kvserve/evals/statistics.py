"""Intervals by the bootstrap (Efron, 1979), and what they allow to say."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap as scipy_bootstrap

NUM_RESAMPLES = 2000
LEVEL = 0.95

Statistic = Callable[[np.ndarray], np.ndarray]


class Estimate(NamedTuple):
    """A figure and its 95 % interval; (value, nan, nan) where one sample gives no interval."""

    value: float
    low: float
    high: float


def mean(samples: np.ndarray) -> np.ndarray:
    """The mean of all but the first axis."""
    return samples.reshape(len(samples), -1).mean(1)


def quantile(share: float) -> Statistic:
    """A quantile of all but the first axis."""
    return lambda samples: np.quantile(samples.reshape(len(samples), -1), share, axis=1)


def bootstrap(samples: np.ndarray, statistic: Statistic = mean, seed: int = 0) -> Estimate:
    """The percentile interval of a statistic.

    Args:
        samples: [samples, ...]; the first axis is resampled, since tokens of one text or questions of one prompt are
            no independent samples.
        statistic: of [resamples, samples, ...], one value for each resample.

    Raises:
        ValueError: there are no samples.
    """
    samples = np.asarray(samples, dtype=np.float64)
    if not len(samples):
        raise ValueError("an interval needs at least one sample")
    value = float(statistic(samples[None])[0])
    if len(samples) == 1:
        return Estimate(value, float("nan"), float("nan"))
    found = scipy_bootstrap(
        (np.arange(len(samples)),), lambda index, axis: statistic(samples[index]), n_resamples=NUM_RESAMPLES,
        batch=NUM_RESAMPLES // 20, vectorized=True, confidence_level=LEVEL, method="percentile", rng=seed,
    )  # fmt: skip
    return Estimate(value, float(found.confidence_interval.low), float(found.confidence_interval.high))


def share_interval(samples: np.ndarray, low: float, high: float, seed: int = 0) -> Estimate:
    """The mean of samples that lie between `low` and `high`.

    Where all samples are equal there is nothing to resample: the interval then reaches as far as a value at the other
    end of the range could have stayed unseen with a probability of 5 % (the rule of three, exactly).
    """
    found = bootstrap(samples, seed=seed)
    if np.ptp(samples):
        return found
    unseen = 1 - (1 - LEVEL) ** (1 / len(samples))
    value = found.value
    return Estimate(value, value - unseen * (value - low), value + unseen * (high - value))
