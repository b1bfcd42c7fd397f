"""The sweep-line is exact: a sum over live requests at any time, and over long Poisson arrivals the closed form."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosspool.planner.closed_form import page_moments
from crosspool.planner.demand import ModelDemand, kv_budget_pages
from crosspool.planner.sweep import demand_curve
from serving.errors import UserError

pytestmark = pytest.mark.cpu

request_rows = st.tuples(
    st.floats(0, 50), st.integers(0, 400), st.integers(0, 300), st.floats(0.01, 40)
)  # arrival, prompt, output, service


@settings(deadline=None)
@given(
    st.lists(request_rows, min_size=1, max_size=20),
    st.integers(1, 4),
    st.integers(1, 5000),
    st.sampled_from(["grown", "declared"]),
    st.integers(0, 1000),
)
def test_the_curve_equals_the_sum_over_live_requests(rows, runs, token_bytes, holding, seed):
    arrivals, prompt, output, service = (np.array(column) for column in zip(*rows, strict=True))
    model = ModelDemand("m", 0, prompt, output, service, runs, token_bytes)
    curve = demand_curve(arrivals, model, 4096, holding)
    assert curve.pages[-1] == 0
    assert (np.diff(curve.times_s) >= 0).all()
    for time in np.random.default_rng(seed).uniform(-1, 95, 20):
        age = (time - arrivals) / service
        live = (age >= 0) & (age < 1)
        grown = np.ceil(prompt + output * (age if holding == "grown" else 1))[live].astype(int)
        index = np.searchsorted(curve.times_s, time, side="right") - 1
        assert (curve.pages[index] if index >= 0 else 0) == model.pages(grown, 4096).sum()


def test_long_poisson_arrivals_give_the_closed_form_and_keep_the_quantiles_promise():
    random = np.random.default_rng(5)
    n, rate = 60_000, 3.0
    prompt, output = random.lognormal(5, 1, n).astype(int), random.lognormal(4, 1, n).astype(int)
    model = ModelDemand("m", rate, prompt, output, 0.1 + 0.05 * output, 7, 900)
    curve = demand_curve(np.cumsum(random.exponential(1 / rate, n)), model, 65536)
    spans = [(200.0, n / rate - 200)]
    exact, estimate = page_moments([model], 65536), kv_budget_pages([model], 65536, 0.99)
    assert curve.mean_pages(spans) == pytest.approx(exact.mean, rel=0.01)
    # 20,000 s hold some 2,000 independent looks, so that the overflow itself spreads by a fifth
    assert curve.overflow(estimate.budget_pages, spans) == pytest.approx(0.01, rel=0.5)
    assert curve.quantile_pages(0.99, spans) == pytest.approx(estimate.budget_pages, rel=0.03)


def test_spans_are_weighted_by_time():
    model = ModelDemand("m", 0, [1, 1], [0, 0], [10.0, 5.0], 1, 4096)
    curve = demand_curve(np.array([0.0, 5.0]), model, 4096)  # one live in [0, 5), two in [5, 10)
    assert curve.overflow(1, [(0, 20)]) == pytest.approx(0.25)
    assert curve.overflow(1, [(2, 6), (9, 12)]) == pytest.approx(2 / 7)
    assert curve.mean_pages([(-10, 10)]) == pytest.approx(0.75)
    assert curve.quantile_pages(0.7, [(0, 20)]) == 1
    assert curve.quantile_pages(0.8, [(0, 20)]) == 2


def test_arrivals_and_requests_must_match():
    with pytest.raises(UserError, match="2 arrivals for 1 requests"):
        demand_curve(np.array([0.0, 1.0]), ModelDemand("m", 0, [1], [1], [1.0], 1, 1), 4096)
