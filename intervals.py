"""95 % intervals of figures: how far a mean, or a distance between sets, may be off by chance.

    values of single clips ─► bootstrap(values)        ─► mean, low, high
    clips ─► any statistic ─► jackknife(statistic, clips) ─► value, low, high
    values of two rows, clip by clip ─► bootstrap(differences) ─► mean difference, low, high

bootstrap: the 2.5th and 97.5th percentiles of the means of `draws` resamples with replacement
(Efron 1979). jackknife: value ± 1.96 · sqrt((n-1)/n Σ (θ_i - θ̄)²), θ_i the statistic without item i
(Tukey 1958): for distances between sets, whose bootstrap is biased because a resample holds the
same clip twice. Either takes the items as independent; the training seed is not among what varies.
"""
import math

import numpy as np


def bootstrap(values, seed=0, draws=1000):
    """The mean of values, and the ends of its 95 % interval -> (mean, low, high)."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values: needs a list of at least one number, got shape {values.shape}")

    chosen = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    means = values[chosen].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def jackknife(statistic, items):
    """statistic(items), and the ends of its 95 % interval -> (value, low, high).

    statistic: a function of a list to a number; items: a list of at least two.
    """
    n = len(items)
    if n < 2:
        raise ValueError(f"items: needs at least two, got {n}")

    value = float(statistic(items))
    without = [float(statistic(items[:i] + items[i + 1:])) for i in range(n)]
    mean = sum(without) / n
    error = math.sqrt((n - 1) / n * sum((x - mean) ** 2 for x in without))
    return value, value - 1.96 * error, value + 1.96 * error
