"""Plans from a trace: a burst is seen and paid for; the Azure hour keeps the promise on time it was not fitted on."""

import os
from pathlib import Path

import numpy as np
import pytest

from crosspool.planner.demand import ModelDemand
from crosspool.planner.dispersion import rate_spread
from crosspool.planner.from_trace import ServiceModel, TraceDemand, check_rolling, check_split, fit, folds
from crosspool.planner.traces import find_trace, read_trace
from serving.errors import UserError

pytestmark = pytest.mark.cpu

AZURE = "azure_llm_2023_conv.csv"
SHARED = Path(os.environ.get("WORKLOAD_TRACES", Path(__file__).parents[4] / "shared" / "traces"))


def arrivals_of(wave=0.0, seconds=4000.0, rate=4.0, seed=0):
    """Poisson arrivals whose rate swings by `wave` with a period of 100 s."""
    random = np.random.default_rng(seed)
    times = np.sort(random.uniform(0, seconds, int(random.poisson(seconds * rate * (1 + wave)))))
    kept = random.random(times.size) * (1 + wave) < 1 + wave * np.sin(times * 2 * np.pi / 100)
    return times[kept]


def trace_of(wave, seed=0):
    arrivals = arrivals_of(wave, seed=seed)
    random = np.random.default_rng(seed + 1)
    prompt, output = random.integers(100, 900, arrivals.size), random.integers(1, 200, arrivals.size)
    return TraceDemand(arrivals, ModelDemand("t", 0, prompt, output, ServiceModel().service_s(prompt, output), 4, 700))


def test_poisson_arrivals_have_an_index_of_dispersion_of_one_and_waves_more():
    for wave in (0.0, 0.6):
        arrivals = arrivals_of(wave)
        spread = rate_spread(arrivals, np.ones(arrivals.size), [(0, 4000)], 10)
        # a rate of 1 + w sin has squared CV w^2 / 2, and windows of 10 s hold 40 arrivals
        assert spread.index == pytest.approx(1 + 40 * wave**2 / 2, rel=0.15)
        assert spread.squared_cv == pytest.approx(wave**2 / 2, abs=0.03)
        assert spread.factors.mean() == pytest.approx(1)
        assert spread.factors.var() == pytest.approx(spread.squared_cv, abs=0.01)


def test_waves_break_a_poisson_plan_and_not_a_dispersed_one():
    checks = {(c.fit, c.quantile): c for c in check_split(trace_of(0.6), "interleaved", 100, (0.95, 0.99), 65536, 0)}
    assert checks["poisson", 0.99].ratio > 3
    assert checks["dispersed", 0.95].kept
    assert checks["dispersed", 0.99].kept


def test_plain_poisson_arrivals_are_planned_alike_by_every_fit():
    checks = check_split(trace_of(0.0), "shuffled", 60, (0.9,), 65536, 0)
    assert all(check.kept for check in checks)
    budgets = [check.budget_pages for check in checks]
    assert max(budgets) < 1.05 * min(budgets)


@pytest.mark.parametrize("how", ["interleaved", "shuffled", "first", "second"])
def test_a_fold_never_checks_on_what_it_was_fitted_on(how):
    for fitted, checked in folds((3.0, 603.0), how, 60):
        assert not set(fitted) & set(checked)
        assert sum(b - a for a, b in fitted + checked) == pytest.approx(600)


def test_fitting_reads_only_its_spans():
    trace = trace_of(0.3)
    spans = [(500.0, 900.0), (1000.0, 1400.0)]
    fitted = fit(trace, spans)
    assert fitted.plain.prompt_tokens.size == trace.inside(spans).sum()
    assert fitted.plain.rate_rps == pytest.approx(trace.inside(spans).sum() / 800)


@pytest.mark.skipif(not (SHARED / AZURE).is_file(), reason=f"{AZURE} is not in WORKLOAD_TRACES or ../shared/traces")
def test_the_azure_hour_keeps_the_promise_within_a_factor_of_two_on_time_it_was_not_fitted_on():
    lengths = read_trace(SHARED / AZURE)
    service_s = ServiceModel().service_s(lengths.prompt_tokens, lengths.output_tokens)
    model = ModelDemand("azure", 0, lengths.prompt_tokens, lengths.output_tokens, service_s, 48, 2048)
    trace = TraceDemand(lengths.arrivals_s, model)
    halves = {(c.fit, c.quantile): c for c in check_split(trace, "shuffled", 60, (0.95, 0.99), 65536, 0)}
    rolling = check_rolling(trace, 60, 300, (0.95, 0.99), 65536, 0)
    for check in (halves["dispersed", 0.95], halves["dispersed", 0.99], *rolling):
        assert check.kept, f"{check.how} P{100 * check.quantile:g}: {check.ratio:.2f} times the promise"
    assert halves["poisson", 0.99].ratio > 2  # what plain Poisson arrivals would have promised in vain


def test_both_trace_formats_are_read(tmp_path):
    azure = tmp_path / "a.csv"
    azure.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:01.5,7,3\n2023-11-16 18:00:00.0,5,2\n")
    lengths = read_trace(azure)
    assert lengths.arrivals_s.tolist() == [0.0, 1.5]
    assert lengths.prompt_tokens.tolist() == [5, 7]
    mooncake = tmp_path / "m.jsonl"
    mooncake.write_text('{"timestamp": 1000, "input_length": 9, "output_length": 4}\n')
    assert read_trace(mooncake).output_tokens.tolist() == [4]
    untimed = tmp_path / "s.csv"
    untimed.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nXXX,42,285\n")
    assert read_trace(untimed).arrivals_s is None


def test_traces_that_are_none_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="WORKLOAD_TRACES"):
        find_trace("no_such_trace.csv")
    for content in ("a,b\n1,2\n", "TIMESTAMP,ContextTokens,GeneratedTokens\n", ""):
        path = tmp_path / "bad.csv"
        path.write_text(content)
        with pytest.raises(UserError, match=r"bad\.csv"):
            read_trace(path)
    model = ModelDemand("m", 0, [1, 1], [1, 1], [1.0, 1.0], 1, 1)
    with pytest.raises(UserError, match="ascending"):
        TraceDemand(np.array([2.0, 1.0]), model)
    with pytest.raises(UserError, match="cannot be negative"):
        ServiceModel(base_s=-1)
