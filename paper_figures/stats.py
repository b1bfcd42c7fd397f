"""The few statistics that exhibits need: percentiles within a run, intervals across runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit


@dataclass(frozen=True)
class Interval:
    """Mean of `n` runs and the 95 % confidence interval of that mean (Student's t); no interval for one run."""

    mean: float
    low: float
    high: float
    n: int


def interval(values: Sequence[float]) -> Interval:
    """Over runs that differ in their seed only. Values that are not there (NaN) do not count."""
    known = np.asarray([value for value in values if value is not None and not math.isnan(value)], dtype=float)
    if not len(known):
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(known.mean())
    if len(known) == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = float(stdtrit(len(known) - 1, 0.975) * known.std(ddof=1) / math.sqrt(len(known)))
    return Interval(mean, mean - half, mean + half, len(known))


def cdf(values: np.ndarray, points: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """(value, fraction of values <= it) at up to `points` evenly spaced ranks, ends and tail ranks included."""
    ordered = np.sort(np.asarray(values, dtype=float))
    ranks = np.arange(1, len(ordered) + 1)
    if len(ordered) > points:
        tail = len(ordered) - points // 4
        keep = np.unique(
            np.r_[np.linspace(1, tail, points - points // 4).astype(int), np.arange(tail, len(ordered) + 1)]
        )
        ranks = keep
    return ordered[ranks - 1], ranks / len(ordered)
