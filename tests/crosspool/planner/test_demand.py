"""The page budget: agrees with closed forms, moves the right way, repeats itself, says what is wrong with its input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosspool.planner.closed_form import kv_bytes_moments, page_moments
from crosspool.planner.demand import ModelDemand, SamplingRule, kv_budget_pages
from serving.errors import UserError
from serving.memory.kv_pool import KVGeometry

pytestmark = pytest.mark.cpu

PAGE_BYTES = 4096
SPREAD = np.array([0.4, 0.8, 1.2, 1.6])


def model_of(rate_rps=0.7, name="m", samples=301, layers=3, token_bytes=72, seed=0, factors=(1.0,)):
    random = np.random.default_rng(seed)
    prompt = random.lognormal(4, 1, samples).astype(int)
    output = random.lognormal(4, 0.8, samples).astype(int)
    return ModelDemand(name, rate_rps, prompt, output, 0.1 + 0.05 * output, layers, token_bytes, np.array(factors))


def pool():
    return [model_of(0.7, "a"), model_of(0.05, "b", 77, 5, 130, 1), model_of(1.9, "c", 13, 2, 4096, 2, SPREAD)]


models = st.builds(
    model_of,
    rate_rps=st.floats(0.05, 3),
    samples=st.integers(1, 50),
    layers=st.integers(1, 5),
    token_bytes=st.integers(1, 9000),
    seed=st.integers(0, 99),
)


@pytest.mark.parametrize("holding", ["grown", "declared"])
def test_mean_and_variance_agree_with_campbell_within_a_percent(holding):
    rule = SamplingRule(holding=holding, least_requests=2_000_000)
    estimate = kv_budget_pages(pool(), PAGE_BYTES, 0.99, 3, rule)
    exact = page_moments(pool(), PAGE_BYTES, holding)
    assert estimate.mean_pages == pytest.approx(exact.mean, rel=0.01)
    assert estimate.samples_pages.var() == pytest.approx(exact.variance, rel=0.02)


def test_bytes_before_rounding_agree_with_m_g_infinity_within_a_percent():
    estimate = kv_budget_pages(pool(), PAGE_BYTES, 0.99, 4, SamplingRule(least_requests=2_000_000))
    exact = kv_bytes_moments(pool())
    assert estimate.mean_kv_bytes == pytest.approx(exact.mean, rel=0.01)


def test_pages_of_one_slot_are_the_number_of_live_requests_and_so_poisson():
    one = ModelDemand("one", 0.5, [1] * 3, [0] * 3, [2.0, 4.0, 9.0], 1, PAGE_BYTES)
    estimate = kv_budget_pages([one], PAGE_BYTES, 0.95, 0, SamplingRule(least_requests=500_000))
    assert estimate.mean_pages == pytest.approx(2.5, rel=0.01)
    assert estimate.samples_pages.var() == pytest.approx(2.5, rel=0.02)
    assert estimate.budget_pages == 5  # Poisson(2.5): P(X <= 4) = 0.891, P(X <= 5) = 0.958


def test_correlation_of_lengths_and_service_times_is_kept():
    lengths, times = [10, 1000], [1.0, 100.0]
    joint = ModelDemand("joint", 1.0, lengths, [0, 0], times, 1, 64)
    crossed = ModelDemand("crossed", 1.0, lengths[::-1], [0, 0], times, 1, 64)
    budgets = [kv_budget_pages([m], 64, 0.9, 0).mean_pages for m in (joint, crossed)]
    assert budgets == [pytest.approx((10 + 100_000) / 2, rel=0.02), pytest.approx((1000 + 1000) / 2, rel=0.02)]


@settings(max_examples=15, deadline=None)
@given(models, st.floats(1.5, 4), st.sampled_from([0.5, 0.9, 0.99]))
def test_budget_is_monotone_in_rate(model, factor, quantile):
    more = ModelDemand(
        "more",
        model.rate_rps * factor,
        model.prompt_tokens,
        model.output_tokens,
        model.service_s,
        model.num_runs,
        model.run_token_bytes,
    )
    low, high = (kv_budget_pages([m], PAGE_BYTES, quantile, 1) for m in (model, more))
    assert low.low_pages <= high.high_pages
    assert low.mean_pages < high.mean_pages


@settings(max_examples=15, deadline=None)
@given(st.lists(models, min_size=1, max_size=3), st.integers(0, 2**31))
def test_budget_is_monotone_in_quantile_and_lies_in_its_interval(pool, seed):
    estimate = kv_budget_pages(pool, PAGE_BYTES, 0.99, seed)
    pages = [estimate.pages_at(q) for q in (0.01, 0.5, 0.9, 0.95, 0.99, 0.999)]
    assert pages == sorted(pages)
    assert estimate.low_pages <= estimate.budget_pages <= estimate.high_pages
    assert estimate.overflow_probability(estimate.budget_pages) <= 0.01 + 1e-12
    assert estimate.converged
    assert estimate.relative_half_width <= 0.02 or estimate.high_pages - estimate.low_pages <= 1


@settings(max_examples=15, deadline=None)
@given(st.lists(models, min_size=1, max_size=3))
def test_rounding_is_never_below_the_raw_bytes(pool):
    estimate = kv_budget_pages(pool, PAGE_BYTES, 0.95, 0)
    assert estimate.mean_pages * PAGE_BYTES >= estimate.mean_kv_bytes
    assert 0 <= estimate.rounding_loss < 1
    declared = kv_budget_pages(pool, PAGE_BYTES, 0.95, 0, SamplingRule(holding="declared"))
    assert declared.high_pages >= estimate.low_pages


@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 10**5), st.sampled_from([4096, 65536, 2 << 20]))
def test_pages_of_a_request_are_the_virtualizers(tokens, layers, token_bytes, page_bytes):
    model = ModelDemand("m", 1, [1], [1], [1], layers, token_bytes)
    assert model.pages(np.array([tokens]), page_bytes)[0] == KVGeometry("m", layers, token_bytes, tokens).pages(
        tokens, page_bytes
    )


def test_same_seed_same_budget_and_another_seed_another():
    first, again, other = (kv_budget_pages(pool(), PAGE_BYTES, 0.99, seed) for seed in (7, 7, 8))
    assert (first.samples_pages == again.samples_pages).all()
    assert first.budget_pages == again.budget_pages
    assert first.samples_pages.size != other.samples_pages.size or (first.samples_pages != other.samples_pages).any()


def test_the_interval_covers_the_true_quantile_about_as_often_as_it_says():
    one = ModelDemand("one", 40.0, [1], [0], [2.0], 1, PAGE_BYTES)  # Poisson(80): P95 is 95
    rule = SamplingRule(relative_half_width=0.5)
    found = [kv_budget_pages([one], PAGE_BYTES, 0.95, seed, rule) for seed in range(60)]
    assert sum(e.low_pages <= 95 <= e.high_pages for e in found) >= 54


def test_pooling_needs_less_than_partitions_and_bursts_together_more_than_apart():
    cold = [model_of(0.1, f"m{i}", seed=i, factors=SPREAD) for i in range(12)]
    apart = kv_budget_pages(cold, PAGE_BYTES, 0.99, 0)
    together = kv_budget_pages(cold, PAGE_BYTES, 0.99, 0, SamplingRule(bursts="together"))
    assert apart.budget_pages < 0.7 * sum(apart.own_pages().values())
    assert apart.high_pages < together.low_pages
    assert apart.mean_pages == pytest.approx(together.mean_pages, rel=0.02)


def test_a_search_that_may_not_go_on_says_that_it_did_not_converge():
    rule = SamplingRule(relative_half_width=1e-4, most_requests=300_000)
    assert not kv_budget_pages(pool(), 64, 0.99, 0, rule).converged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate_rps": -1.0}, "rate -1.0"),
        ({"rate_rps": float("nan")}, "rate nan"),
        ({"prompt_tokens": [], "output_tokens": [], "service_s": []}, "no samples"),
        ({"service_s": [0.0]}, "above 0"),
        ({"service_s": [1.0, 2.0]}, "joint"),
        ({"output_tokens": [-3]}, "negative"),
        ({"run_token_bytes": 0}, "hold no KV"),
        ({"rate_factors": [0.5]}, "average 1"),
    ],
)
def test_a_load_that_is_none_is_refused_in_one_line(change, message):
    good = {"name": "m", "rate_rps": 1.0, "prompt_tokens": [1], "output_tokens": [1], "service_s": [1.0]}
    good |= {"num_runs": 1, "run_token_bytes": 1}
    with pytest.raises(UserError, match=message) as caught:
        ModelDemand(**{**good, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("quantile", [0, 1, -0.5, 1.5])
def test_a_quantile_outside_zero_to_one_is_refused(quantile):
    with pytest.raises(UserError, match=r"outside \(0, 1\)"):
        kv_budget_pages(pool(), PAGE_BYTES, quantile)


def test_no_models_and_no_load_are_refused():
    with pytest.raises(UserError, match="no models"):
        kv_budget_pages([], PAGE_BYTES)
    with pytest.raises(UserError, match="no demand"):
        kv_budget_pages([model_of(0.0)], PAGE_BYTES)
    with pytest.raises(UserError, match="page of 0"):
        kv_budget_pages(pool(), 0)
