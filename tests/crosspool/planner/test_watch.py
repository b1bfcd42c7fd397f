"""The watch: keeps a plan that holds, and advises to grow or shrink only when the samples leave no doubt."""

import numpy as np
import pytest

from crosspool.planner.demand import ModelDemand, kv_budget_pages
from crosspool.planner.sweep import demand_curve
from crosspool.planner.watch import ObservedDemand, overflow_curve, watch
from serving.errors import UserError

pytestmark = pytest.mark.cpu

RATE = 5.0


def model_of(rate=RATE, samples=20_000, seed=0):
    random = np.random.default_rng(seed)
    output = random.integers(1, 100, samples)
    return ModelDemand("m", rate, random.integers(1, 300, samples), output, 0.1 + 0.04 * output, 3, 512)


PLAN = kv_budget_pages([model_of()], 4096, 0.95)


def observed_at(load, seed=1, requests=20_000):
    random = np.random.default_rng(seed)
    arrivals = np.cumsum(random.exponential(1 / (RATE * load), requests))
    curve = demand_curve(arrivals, model_of(samples=requests, seed=seed), 4096)
    inside = (curve.times_s > 10) & (curve.times_s < arrivals[-1])
    return ObservedDemand(curve.times_s[inside], curve.pages[inside])


def test_the_planned_load_is_kept_and_its_overflow_curve_is_the_promise():
    report = watch(PLAN, observed_at(1.0), block_s=30)
    assert report.suggestion.action == "keep"
    assert report.suggestion.budget_pages == PLAN.budget_pages
    assert report.load_ratio == pytest.approx(1, abs=0.05)
    for point in overflow_curve(PLAN, observed_at(1.0), (0.5, 0.9, 0.95, 0.99)):
        assert point.observed == pytest.approx(point.promised, rel=0.35)


@pytest.mark.parametrize(("load", "action"), [(2.0, "grow"), (0.5, "shrink")])
def test_another_load_is_replanned_towards_what_it_needs(load, action):
    suggestion = watch(PLAN, observed_at(load), block_s=30).suggestion
    needed = kv_budget_pages([model_of(RATE * load)], 4096, 0.95).budget_pages
    assert suggestion.action == action
    assert suggestion.budget_pages == pytest.approx(needed, rel=0.15)


def test_little_seen_is_no_reason_to_replan():
    report = watch(PLAN, ObservedDemand([0.0, 1.0, 2.0], [10**6, 10**6, 0]), block_s=30)
    assert report.observed_overflow == 1.0
    assert report.suggestion.action == "wait"


def test_a_full_pool_shows_its_overflow_only_with_what_waits():
    times = np.arange(0, 4000.0)
    full = np.full(times.size, PLAN.budget_pages)
    assert ObservedDemand.of(times, full).overflow(PLAN.budget_pages) == 0
    waiting = ObservedDemand.of(times, full, np.full(times.size, 7))
    assert watch(PLAN, waiting, block_s=30).suggestion.action == "grow"


def test_samples_stand_until_the_next_one():
    observed = ObservedDemand([0.0, 9.0, 10.0], [2, 4, 99])
    assert observed.mean_pages == pytest.approx(2.2)
    assert observed.overflow(3) == pytest.approx(0.1)
    assert (observed.quantile_pages(0.5), observed.quantile_pages(0.95)) == (2, 4)


def test_bad_samples_are_refused():
    for times, pages in (([0.0], [1]), ([1.0, 0.0], [1, 1]), ([0.0, 1.0], [1])):
        with pytest.raises(UserError, match="ascending times"):
            ObservedDemand(times, pages)
    with pytest.raises(UserError, match="factor"):
        watch(PLAN, ObservedDemand([0.0, 1.0], [1, 1]), block_s=1, factor=0.5)
