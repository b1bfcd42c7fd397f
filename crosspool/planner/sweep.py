"""Demand over time from real intervals, exact: every arrival, page crossing and end of a trace, swept in order.

No assumption on arrivals is made here, so this is what predictions are checked against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crosspool.planner.demand import ModelDemand
from crosspool.planner.growth import staircase
from serving.errors import UserError

Span = tuple[float, float]  # seconds, end excluded


@dataclass(frozen=True, eq=False)
class DemandCurve:
    """A step function: `pages[i]` are held from `times_s[i]` until `times_s[i + 1]`, nothing before the first."""

    times_s: np.ndarray
    pages: np.ndarray

    def within(self, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        """(durations in seconds, pages) of the pieces inside `spans`."""
        pieces = [self._piece(start, end) for start, end in spans]
        return np.concatenate([d for d, _ in pieces]), np.concatenate([p for _, p in pieces])

    def _piece(self, start: float, end: float) -> Span:
        first = np.searchsorted(self.times_s, start, side="right")
        last = np.searchsorted(self.times_s, end, side="left")
        edges = np.concatenate([[start], self.times_s[first:last], [end]])
        held = np.concatenate([[self.pages[first - 1] if first else 0], self.pages[first:last]])
        return np.diff(edges), held

    def mean_pages(self, spans: Sequence[Span]) -> float:
        durations, pages = self.within(spans)
        return float(np.average(pages, weights=durations))

    def overflow(self, budget_pages: float, spans: Sequence[Span]) -> float:
        """Share of the time in `spans` in which the demand exceeds `budget_pages`."""
        durations, pages = self.within(spans)
        return float(durations[pages > budget_pages].sum() / durations.sum())

    def quantile_pages(self, quantile: float, spans: Sequence[Span]) -> int:
        """The smallest demand that is not exceeded for a share `quantile` of the time in `spans`."""
        durations, pages = self.within(spans)
        order = np.argsort(pages, kind="stable")
        reached = np.cumsum(durations[order]) / durations.sum()
        return int(pages[order][min(np.searchsorted(reached, quantile), pages.size - 1)])


def demand_curve(arrivals_s: np.ndarray, model: ModelDemand, page_bytes: int, holding: str = "grown") -> DemandCurve:
    """The pages held over time when request i of `model`'s samples arrives at `arrivals_s[i]` and is served at once."""
    arrivals_s = np.asarray(arrivals_s, dtype=float)
    if arrivals_s.shape != model.service_s.shape:
        raise UserError(f"{model.name}: {arrivals_s.size} arrivals for {model.service_s.size} requests")
    steps = staircase(model, page_bytes, holding)
    added = np.diff(steps.pages, prepend=0)
    added[steps.first] = steps.pages[steps.first]
    ends = np.append(steps.first[1:], steps.sample.size) - 1
    times = arrivals_s[steps.sample] + steps.start * model.service_s[steps.sample]
    times = np.concatenate([times, arrivals_s + model.service_s])
    changes = np.concatenate([added, -steps.pages[ends]])
    order = np.argsort(times, kind="stable")
    return DemandCurve(times[order], np.cumsum(changes[order]))
