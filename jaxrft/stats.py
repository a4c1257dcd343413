"""Computes intervals, correlations and the area under the ROC curve, of numpy arrays on the host.

`jaxrft.report.metrics` has the two figures that a training step computes on the device, under a
mask.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

RESAMPLES = 10_000  # of a bootstrap: 250 beyond each end, which are then known to 6 %


class Interval(NamedTuple):
    """An estimate and its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: ArrayLike) -> Interval:
    """Returns mean +- t s / sqrt(n) of the values [n]; NaN for the ends of a single value.

    t is the 97.5 % quantile of Student's distribution with n - 1 degrees of freedom, s the unbiased
    standard deviation.
    """
    values = np.asarray(values)
    count = len(values)
    mean = values.mean()
    if count < 2:
        return Interval(float(mean), float("nan"), float("nan"))
    half = stdtrit(count - 1, 0.975) * values.std(ddof=1) / np.sqrt(count)
    return Interval(float(mean), float(mean - half), float(mean + half))


def bootstrap_means(values: np.ndarray) -> list[Interval]:
    """Returns the mean of each column of `values` [n, m] with a percentile bootstrap over rows.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3.
    """
    count = len(values)
    random = np.random.default_rng(0)
    chances = np.full(count, 1 / count)
    means = [
        random.multinomial(count, chances, size=100) @ values / count
        for _ in range(RESAMPLES // 100)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5], axis=0)
    return [
        Interval(*map(float, column)) for column in zip(values.mean(axis=0), low, high, strict=True)
    ]


def known_mean(values: ArrayLike, axis: int | None = None) -> np.ndarray:
    """Returns the mean of the finite values; NaN where there is none."""
    count = np.isfinite(values).sum(axis=axis)
    return np.where(count > 0, np.nansum(values, axis=axis) / np.maximum(count, 1), np.nan)


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the correlation of x and y [n]; NaN when either does not vary."""
    x = x - x.mean()
    y = y - y.mean()
    if np.allclose(x, 0) or np.allclose(y, 0):
        return float("nan")
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def auc(score: np.ndarray, positive: np.ndarray) -> float:
    """Returns the chance that a positive scores higher than a negative, where ties count half.

    It is (sum of the positives' ranks - m (m + 1) / 2) / (m n) for m positives and n negatives
    [Mann and Whitney, 1947]; NaN without both, or when a score is NaN. `score` and `positive`,
    bool, have one shape.
    """
    score = score.ravel()
    positive = positive.ravel()
    ones = int(positive.sum())
    zeros = len(positive) - ones
    if not ones or not zeros or np.isnan(score).any():
        return float("nan")
    ranks = rank(score)[positive].sum()
    return float((ranks - ones * (ones + 1) / 2) / (ones * zeros))


def rank(values: np.ndarray) -> np.ndarray:
    """Returns the rank of each of the values [n], from 1; equal ones share the mean of theirs."""
    # imported here: scipy.stats takes a fifth of the time that importing jaxrft.train takes
    from scipy.stats import rankdata

    return rankdata(values)
