"""Shares of models against closed forms; the total rate does not move with skew."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from workloads.config import Popularity
from workloads.errors import WorkloadError
from workloads.popularity import assign, cold_models, model_shares, power_law, total_rate
from workloads.statistics import cold_share

pytestmark = pytest.mark.cpu

ALPHAS = [0.0, 0.7, 0.9, 1.3, 1.7, 2.1]
NAMES = [f"m{number}" for number in range(20)]


def shares_of(names: list[str] = NAMES, seed: int = 0, **content) -> np.ndarray:
    return model_shares(Popularity(**content), names, np.random.default_rng(seed))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_power_law_shares(alpha):
    """Chi-square of 200,000 choices at 1e-4, and the exact weights."""
    shares = shares_of(alpha=alpha)
    assert shares / shares[0] == pytest.approx([rank**-alpha for rank in range(1, 21)])
    counts = np.bincount(assign(shares, 200_000, np.random.default_rng(3)), minlength=20)
    assert stats.chisquare(counts, shares * 200_000).pvalue > 1e-4


def test_total_rate_is_the_same_at_every_skew(make):
    """The same arrivals exactly; under MuxServe's variant, which fixes the top model's, the total falls with alpha."""
    traces = [make(8, duration_s=200, arrivals={"rate_rps": 20.0}, popularity={"alpha": alpha}) for alpha in ALPHAS]
    for trace in traces[1:]:
        assert (trace.arrival_s == traces[0].arrival_s).all()
        assert (trace.prompt_tokens == traces[0].prompt_tokens).all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_muxserve_variant_fixes_the_rate_of_the_top_model(make, alpha):
    """Within 4.5 standard errors of a Poisson count."""
    popularity = {"kind": "power_law_top", "alpha": alpha}
    trace = make(8, duration_s=400, arrivals={"rate_rps": 10.0}, popularity=popularity)
    total = 10 * sum(rank**-alpha for rank in range(1, 9))
    assert total_rate(Popularity(**popularity), 10.0, power_law(8, alpha)) == pytest.approx(total)
    assert abs(len(trace) - 400 * total) < 4.5 * (400 * total) ** 0.5
    assert abs((trace.model == 0).sum() - 4000) < 4.5 * 4000**0.5


def test_dirichlet_shares_have_the_closed_forms_moments():
    """Sum of squares of Dirichlet(c) over M models has mean (c + 1)/(M c + 1): 2,000 draws, 4 standard errors."""
    for concentration in (0.3, 1.0, 5.0):
        squares = [
            (shares_of(seed=seed, kind="dirichlet", concentration=concentration) ** 2).sum() for seed in range(2000)
        ]
        error = np.std(squares) / len(squares) ** 0.5
        assert abs(np.mean(squares) - (concentration + 1) / (20 * concentration + 1)) < 4 * error


@pytest.mark.parametrize("models", [2, 5, 20, 64, 300])
def test_tail_gives_the_coldest_their_share(models):
    shares = shares_of([str(number) for number in range(models)], kind="tail")
    assert shares[-cold_models(models, 0.9) :].sum() == pytest.approx(0.165, abs=1e-9)


def test_tail_of_openrouter_in_tokens_of_a_trace(make):
    """300 models as on OpenRouter: the coldest 270 take 16.5 % of tokens, here within a tenth of that."""
    trace = make(300, duration_s=2000, arrivals={"rate_rps": 100.0}, popularity={"kind": "tail"})
    tokens = np.bincount(trace.model, weights=trace.prompt_tokens + trace.output_tokens, minlength=300)
    assert cold_share(tokens) == pytest.approx(0.165, rel=0.1)


def test_measured_shares_by_name_and_in_order():
    by_name = shares_of(["a", "b", "c"], kind="shares", shares={"c": 3, "a": 1})
    assert by_name.tolist() == [0.25, 0.0, 0.75]
    assert shares_of(["a", "b"], kind="shares", shares=(1, 3)).tolist() == [0.25, 0.75]


def test_a_model_without_share_is_never_asked(make):
    for process_of in ("total", "model"):
        popularity = {"kind": "shares", "shares": [1, 0, 2, 0]}
        trace = make(4, arrivals={"rate_rps": 50.0, "process_of": process_of}, popularity=popularity)
        assert set(trace.model.tolist()) == {0, 2}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"kind": "shares", "shares": {"z": 1.0}}, "unknown model 'z'; known: a, b"),
        ({"kind": "shares", "shares": (1.0,)}, "1 shares for 2 models"),
        ({"kind": "tail", "tail_models": 0.5, "tail_tokens": 0.9}, "can take between"),
    ],
)
def test_shares_that_cannot_be(content, says):
    with pytest.raises(WorkloadError, match=says):
        shares_of(["a", "b"], **content)
