"""What the planner expects of a run's KV demand, what was then observed, and whether to plan again. Pure.

`expect` is asked once, when a placement is made: it draws the demand of the whole pool from each model's rate and joint
lengths (paper, "Planner"). `compare` is asked at any time with the samples of the running pool: demand is what requests hold
and what waiting ones ask for, since a pool that never preempts cannot hold more than its budget.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosspool.planner.demand import BudgetEstimate, ModelDemand, kv_budget_pages
from crosspool.planner.from_trace import ServiceModel
from crosspool.planner.models import model_demand, promised_output_tokens
from crosspool.planner.watch import ObservedDemand, overflow_curve, watch
from serving.interface import Demand, ServedModel

_BLOCKS = 16  # of a run, whose overflow shares are taken as independent
_LEAST_SAMPLES = 2


@dataclass(frozen=True, eq=False)
class Expectation:
    """The planned demand of a pool of `pool_pages` pages; `promised` is by model the output tokens that admission by
    quantile promises."""

    estimate: BudgetEstimate
    pool_pages: int
    promised: dict[str, int]

    @property
    def fits(self) -> bool:
        """Whether the pool is as large as the planned quantile of demand."""
        return self.pool_pages >= self.estimate.budget_pages

    def described(self) -> dict[str, Any]:
        """As plain data, for a record."""
        estimate = self.estimate
        return {
            "quantile": estimate.quantile,
            "budget_pages": estimate.budget_pages,
            "budget_low_pages": estimate.low_pages,
            "budget_high_pages": estimate.high_pages,
            "mean_pages": estimate.mean_pages,
            "page_bytes": estimate.page_bytes,
            "rounding_loss": estimate.rounding_loss,
            "pool_pages": self.pool_pages,
            "pool_overflow": estimate.overflow_probability(self.pool_pages),
            "fits": self.fits,
            "own_pages": estimate.own_pages(),
            "promised_output_tokens": dict(self.promised),
        }


def expect(
    models: Sequence[ServedModel],
    demand: Demand,
    page_bytes: int,
    pool_pages: int,
    quantile: float,
    service: ServiceModel,
) -> Expectation | None:
    """What `demand` lets one expect; None where it says nothing of rates and lengths.

    Raises UserError for a quantile outside (0, 1)."""
    loads = [_load(model, demand, service) for model in models if _known(model.name, demand)]
    if not loads:
        return None
    estimate = kv_budget_pages(loads, page_bytes, quantile)
    return Expectation(estimate, pool_pages, promised_output_tokens(loads, quantile))


def _known(name: str, demand: Demand) -> bool:
    return demand.rate_rps.get(name, 0.0) > 0 and len(demand.lengths.get(name, ())) > 0


def _load(model: ServedModel, demand: Demand, service: ServiceModel) -> ModelDemand:
    prompt, output = np.asarray(demand.lengths[model.name], dtype=np.int64).T
    return model_demand(model.spec, model.dtype, demand.rate_rps[model.name], prompt, output, service)


@dataclass(frozen=True)
class PoolUse:
    """At one time: pages that requests hold in all ranks, and pages that waiting ones ask for."""

    time_s: float
    in_use: int
    waiting: int


class RecentUse(Sequence[PoolUse]):
    """The latest samples of a pool's use: up to `most` of them and no less than half as many once there were more. A system
    that serves for days so keeps as much as it needs to be watched, in 24 bytes a sample."""

    def __init__(self, most: int = 200_000) -> None:
        self._most = max(most, 2)
        self._times_s = array("d")
        self._in_use, self._waiting = array("q"), array("q")

    def add(self, time_s: float, in_use: int, waiting: int) -> None:
        """Take one more sample."""
        if len(self._times_s) == self._most:
            for values in (self._times_s, self._in_use, self._waiting):
                del values[: self._most - self._most // 2]
        self._times_s.append(time_s)
        self._in_use.append(in_use)
        self._waiting.append(waiting)

    def __len__(self) -> int:
        return len(self._times_s)

    def __getitem__(self, index: int) -> PoolUse:
        return PoolUse(self._times_s[index], self._in_use[index], self._waiting[index])


def compare(expected: Expectation, seen: Sequence[PoolUse]) -> dict[str, Any]:
    """Expected against observed demand and what to do about it, as plain data; empty for too few samples."""
    if len(seen) < _LEAST_SAMPLES or seen[-1].time_s <= seen[0].time_s:
        return {}
    observed = ObservedDemand.of([u.time_s for u in seen], [u.in_use for u in seen], [u.waiting for u in seen])
    found = watch(expected.estimate, observed, observed.duration_s / _BLOCKS)
    return {
        "expected_pages": found.expected_pages,
        "observed_pages": found.observed_pages,
        "promised_overflow": found.promised_overflow,
        "observed_overflow": found.observed_overflow,
        "observed_overflow_low": found.overflow_low,
        "observed_overflow_high": found.overflow_high,
        "observed_pool_overflow": observed.overflow(expected.pool_pages),
        "suggestion": found.suggestion.action,
        "suggested_pages": found.suggestion.budget_pages,
        "reason": found.suggestion.reason,
        "curve": [
            {"quantile": p.quantile, "pages": p.pages, "promised": p.promised, "observed": p.observed}
            for p in overflow_curve(expected.estimate, observed)
        ],
    }
