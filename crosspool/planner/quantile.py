"""How well a quantile is known from draws, and a share of time from correlated blocks."""

from __future__ import annotations

import numpy as np
from scipy.stats import binom


def order_statistic_interval(ascending: np.ndarray, quantile: float, confidence: float = 0.95) -> tuple[int, int]:
    """Distribution-free interval of the `quantile` from independent draws, sorted ascending [n].

    The number of draws at or below the true quantile is binomial(n, q), so the order statistics at its tail quantiles
    bracket it (David and Nagaraja, Order Statistics, section 7.1). Ranks are kept inside the sample.
    """
    n = ascending.size
    tail = (1 - confidence) / 2
    low = int(binom.ppf(tail, n, quantile)) - 1
    high = int(binom.ppf(1 - tail, n, quantile))
    return int(ascending[min(max(low, 0), n - 1)]), int(ascending[min(max(high, 0), n - 1)])


def block_bootstrap_interval(
    values: np.ndarray, weights: np.ndarray, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Interval of the weighted mean of `values` [blocks] when whole blocks are redrawn; keeps correlation within
    blocks."""
    random = np.random.default_rng(seed)
    pick = random.integers(0, values.size, size=(resamples, values.size))
    means = (values * weights)[pick].sum(axis=1) / weights[pick].sum(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)
