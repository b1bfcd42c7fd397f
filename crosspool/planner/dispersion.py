"""How much burstier than Poisson a load is, and rate factors that carry it into the Monte Carlo.

Real arrivals come in waves of minutes (and lengths change with them), so counts over windows vary more than Poisson
counts do. The index of dispersion for work (Fendick and Whitt, 1989) measures it: work is what a request adds to the
pool's demand, token-seconds, so that correlation between rate and lengths counts too. Window by window, the part of
the variance that Poisson arrivals would show anyway is removed; what is left is the spread of the rate itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crosspool.planner.sweep import Span
from serving.errors import UserError


@dataclass(frozen=True, eq=False)
class RateSpread:
    """What windows of a fitted trace say. `index` is 1 for Poisson arrivals; `squared_cv` is that of the rate alone;
    `factors` [windows] are multiples of the mean rate with that spread and the windows' own shape, mean 1."""

    window_s: float
    windows: int
    index: float
    squared_cv: float
    factors: np.ndarray


def rate_spread(arrivals_s: np.ndarray, work: np.ndarray, spans: Sequence[Span], window_s: float) -> RateSpread:
    """Spread of the rate over windows of about `window_s` that tile `spans`; `work` [requests] in token-seconds.

    The windows' relative deviations are shrunk by sqrt(excess / total variance), so that the Poisson noise in them is
    not counted twice when the Monte Carlo draws Poisson numbers again. No excess gives factors of 1: plain Poisson.
    """
    if window_s <= 0:
        raise UserError(f"window of {window_s} s; a window is longer than 0")
    totals, lengths, squares = [], [], 0.0
    for start, end in spans:
        count = max(1, round((end - start) / window_s))
        edges = np.linspace(start, end, count + 1)
        inside = (arrivals_s >= start) & (arrivals_s < end)
        totals.append(np.histogram(arrivals_s[inside], edges, weights=work[inside])[0])
        lengths.append(np.full(count, (end - start) / count))
        squares += float(np.square(work[inside]).sum())
    total, length = np.concatenate(totals), np.concatenate(lengths)
    if total.size < 2 or not total.any():
        return RateSpread(window_s, total.size, 1.0, 0.0, np.ones(1))
    relative = total / length * (length.sum() / total.sum())
    variance = float(np.var(relative, ddof=1))
    poisson = squares / total.size / float(total.mean()) ** 2  # of a compound Poisson window of the mean length
    excess = max(0.0, variance - poisson)
    shrink = (excess / variance) ** 0.5 if variance else 0.0
    factors = np.maximum(1 + shrink * (relative - relative.mean()), 0.0)
    return RateSpread(window_s, total.size, variance / poisson, excess, factors / factors.mean())
