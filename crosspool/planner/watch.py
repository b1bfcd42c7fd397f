"""The planner online: what was expected against what is observed, and when to plan again. Pure functions over samples.

Demand is what admitted requests hold *and* what queued ones wait for: a pool that never preempts holds at most its
budget, so pages in use alone can never show an overflow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crosspool.planner.demand import BudgetEstimate
from crosspool.planner.quantile import block_bootstrap_interval
from serving.errors import UserError

_LEAST_BLOCKS = 8  # fewer say nothing about the spread of their mean


@dataclass(frozen=True, eq=False)
class ObservedDemand:
    """Demand as sampled online: from `times_s[i]` on, until the next sample, `pages[i]` were in use or waited for."""

    times_s: np.ndarray
    pages: np.ndarray

    def __post_init__(self) -> None:
        times, pages = np.asarray(self.times_s, dtype=float), np.asarray(self.pages, dtype=float)
        object.__setattr__(self, "times_s", times)
        object.__setattr__(self, "pages", pages)
        if times.shape != pages.shape or times.size < 2 or (np.diff(times) < 0).any() or times[-1] <= times[0]:
            raise UserError("observed demand needs ascending times, two at least, and one page count for each")

    @classmethod
    def of(
        cls, times_s: Sequence[float], in_use: Sequence[int], waiting: Sequence[int] | None = None
    ) -> ObservedDemand:
        """From pages in use and, by sample, pages that queued requests wait for (their declared need)."""
        pages = np.asarray(in_use, dtype=float)
        return cls(np.asarray(times_s), pages if waiting is None else pages + np.asarray(waiting))

    @property
    def durations_s(self) -> np.ndarray:
        """How long each sample but the last one stood."""
        return np.diff(self.times_s)

    @property
    def duration_s(self) -> float:
        return float(self.times_s[-1] - self.times_s[0])

    @property
    def mean_pages(self) -> float:
        return float(np.average(self.pages[:-1], weights=self.durations_s))

    def overflow(self, budget_pages: float) -> float:
        """Share of time in which the demand exceeded `budget_pages`."""
        return float(self.durations_s[self.pages[:-1] > budget_pages].sum() / self.duration_s)

    def overflow_interval(self, budget_pages: float, block_s: float) -> tuple[float, float]:
        """95 % interval of :meth:`overflow` by redrawing blocks of `block_s`, which should span several service times.

        (0, 1), that is no knowledge, for fewer than eight blocks.
        """
        block = ((self.times_s[:-1] - self.times_s[0]) / block_s).astype(int)
        length = np.bincount(block, weights=self.durations_s)
        over = np.bincount(block, weights=self.durations_s * (self.pages[:-1] > budget_pages))
        kept = length > 0
        if kept.sum() < _LEAST_BLOCKS:
            return 0.0, 1.0
        return block_bootstrap_interval(over[kept] / length[kept], length[kept])

    def quantile_pages(self, quantile: float) -> int:
        order = np.argsort(self.pages[:-1], kind="stable")
        reached = np.cumsum(self.durations_s[order]) / self.duration_s
        return math.ceil(self.pages[:-1][order][min(np.searchsorted(reached, quantile), order.size - 1)])


@dataclass(frozen=True)
class OverflowPoint:
    """At one quantile of the plan: its pages, the overflow it promises and the overflow observed."""

    quantile: float
    pages: int
    promised: float
    observed: float


def overflow_curve(
    plan: BudgetEstimate, observed: ObservedDemand, quantiles: Sequence[float] = (0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
) -> list[OverflowPoint]:
    """Overflow probability against quantile: a calibrated plan has observed equal promised all along."""
    points = []
    for quantile in quantiles:
        pages = plan.pages_at(quantile)
        points.append(OverflowPoint(quantile, pages, 1 - quantile, observed.overflow(pages)))
    return points


@dataclass(frozen=True)
class Replan:
    """What the watch advises. `action`: keep | grow | shrink | wait (too little seen); `budget_pages` is the advised
    one."""

    action: str
    budget_pages: int
    reason: str


@dataclass(frozen=True)
class WatchReport:
    """One look at a running pool."""

    expected_pages: float
    observed_pages: float
    promised_overflow: float
    observed_overflow: float
    overflow_low: float
    overflow_high: float
    suggestion: Replan

    @property
    def load_ratio(self) -> float:
        """Observed mean demand over expected."""
        return self.observed_pages / self.expected_pages if self.expected_pages else math.inf


def watch(
    plan: BudgetEstimate, observed: ObservedDemand, block_s: float, factor: float = 2.0, slack: float = 0.2
) -> WatchReport:
    """Compare and advise. Grow once the observed overflow is above `factor` times the promise beyond doubt (its
    interval excludes that); shrink when overflow is below promise / `factor` beyond doubt and the mean demand is more
    than `slack` below the expected; wait when too few blocks were seen. The advised budget scales the plan by the
    load ratio and is at least (when growing) what was observed at the plan's quantile."""
    if factor < 1 or not 0 <= slack < 1 or block_s <= 0:
        raise UserError("watch needs factor of at least 1, slack in [0, 1) and blocks longer than 0 s")
    promised, budget = 1 - plan.quantile, plan.budget_pages
    seen = observed.overflow(budget)
    low, high = observed.overflow_interval(budget, block_s)
    mean = observed.mean_pages
    ratio = mean / plan.mean_pages if plan.mean_pages else math.inf
    suggestion = _suggest(plan, observed, promised, (low, high), ratio, factor, slack)
    return WatchReport(plan.mean_pages, mean, promised, seen, low, high, suggestion)


def _suggest(
    plan: BudgetEstimate,
    observed: ObservedDemand,
    promised: float,
    interval: tuple[float, float],
    ratio: float,
    factor: float,
    slack: float,
) -> Replan:
    budget, (low, high) = plan.budget_pages, interval
    if interval == (0.0, 1.0):
        return Replan("wait", budget, f"fewer than {_LEAST_BLOCKS} blocks observed")
    scaled = math.ceil(budget * ratio) if math.isfinite(ratio) else 0
    if low > factor * promised:
        advised = max(budget + 1, scaled, observed.quantile_pages(plan.quantile))
        return Replan("grow", advised, f"overflow is at least {low:.2%} of the time, {promised:.2%} was promised")
    if high < promised / factor and ratio < 1 - slack:
        advised = min(budget, max(scaled, observed.quantile_pages(plan.quantile)))
        return Replan("shrink", advised, f"mean demand is {ratio:.0%} of the expected, overflow at most {high:.2%}")
    return Replan("keep", budget, f"overflow between {low:.2%} and {high:.2%}, {promised:.2%} was promised")
