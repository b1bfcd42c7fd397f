"""Lengths against their laws: means, percentiles, what truncation cuts off, correlation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from workloads.config import Lengths
from workloads.errors import WorkloadError
from workloads.expected import PERCENTILES, law_statistics, length_laws
from workloads.lengths import draw_lengths, resample
from workloads.statistics import length_statistics

pytestmark = pytest.mark.cpu

COUNT = 100_000
LOGNORMAL = Lengths(
    "lognormal", 4, 1024, 4, 512, prompt_median=42.3, prompt_sigma=1.32, output_median=229.0, output_sigma=1.0
)
LAWS = {
    "uniform": Lengths("uniform", 3, 177, 1, 64),
    "lognormal": LOGNORMAL,
    "scaled": Lengths("lognormal", 4, 1024, 4, 512, 42.3, 1.32, 229.0, 1.0, scale=0.125),
    "bins": Lengths("bins", output_min=100, output_max=300, bins=("4-8K", "64-128K")),
    "scaled-bins": Lengths("bins", output_min=100, output_max=300, bins=("4-8K",), scale=1 / 64),
    "fixed": Lengths("fixed", prompt_max=77, output_max=5),
}


@pytest.mark.parametrize("lengths", LAWS.values(), ids=LAWS)
def test_means_and_percentiles_are_the_laws(lengths):
    """Mean within 4.5 standard errors. A percentile's rank is known to sqrt(p (1 - p)/n): the value found lies between the
    law's values at 4.5 such errors to either side."""
    drawn = draw_lengths(lengths, COUNT, np.random.default_rng(5))
    for part, (values, shares) in length_laws(lengths, None).items():
        tokens = getattr(drawn, part)
        promised = law_statistics((values, shares))
        assert abs(tokens.mean() - promised["mean"]) <= 4.5 * promised["std"] / COUNT**0.5 + 1e-9
        below = shares.cumsum()
        for percentile in PERCENTILES:
            rank, found = percentile / 100, length_statistics(tokens)[f"p{percentile}"]
            slack = 4.5 * (rank * (1 - rank) / COUNT) ** 0.5
            low, high = (values[min(np.searchsorted(below, q), len(values) - 1)] for q in (rank - slack, rank + slack))
            assert low <= found <= high


def test_truncation_is_no_clipping_and_reports_what_it_cut():
    """Nothing piles up at the limits; the share cut off is that of the untruncated law, here seen by rejection."""
    drawn = draw_lengths(LOGNORMAL, COUNT, np.random.default_rng(0))
    free = np.rint(229.0 * np.exp(np.random.default_rng(1).standard_normal(400_000)))
    outside = ((free < 4) | (free > 512)).mean()
    assert drawn.cut_share["output"] == pytest.approx(outside, abs=4.5 * (0.25 / 400_000) ** 0.5)
    inside = free[(free >= 4) & (free <= 512)]
    assert stats.ks_2samp(drawn.output, inside).pvalue > 1e-4
    assert (drawn.output == 512).mean() < 0.01


@pytest.mark.parametrize("correlation", [-0.8, 0.0, 0.3, 0.95, 1.0])
def test_correlation_of_a_gaussian_copula(correlation):
    """Spearman's rank correlation of a Gaussian copula is 6/pi arcsin(rho/2); rounding to tokens makes ties."""
    drawn = draw_lengths(
        Lengths("lognormal", 1, 4000, 1, 4000, 300.0, 0.8, 300.0, 0.8, correlation), COUNT, np.random.default_rng(2)
    )
    promised = 6 / np.pi * np.arcsin(correlation / 2)
    assert stats.spearmanr(drawn.prompt, drawn.output)[0] == pytest.approx(promised, abs=0.015)


def test_bins_hold_prompt_and_output_together():
    drawn = draw_lengths(LAWS["bins"], 20_000, np.random.default_rng(0))
    context = drawn.prompt + drawn.output
    assert (((context >= 4096) & (context < 8192)) | ((context >= 65536) & (context < 131072))).all()
    assert (context < 8192).mean() == pytest.approx(0.5, abs=0.02)


def test_resampling_keeps_pairs_and_their_correlation():
    rng = np.random.default_rng(0)
    prompt = rng.integers(1, 5000, 3000)
    output = prompt // 3 + rng.integers(1, 200, 3000)
    drawn = resample(Lengths("empirical"), prompt, output, rng.random(COUNT))
    assert (prompt[drawn.rows] == drawn.prompt).all() and (output[drawn.rows] == drawn.output).all()
    found, wanted = (np.corrcoef(*pair)[0, 1] for pair in ((drawn.prompt, drawn.output), (prompt, output)))
    assert found == pytest.approx(wanted, abs=4.5 * (1 - wanted**2) / COUNT**0.5 + 1e-3)
    counts = np.bincount(drawn.rows, minlength=3000)
    assert stats.chisquare(counts).pvalue > 1e-4


def test_resampling_within_bins():
    prompt, output = np.array([100, 5000, 9000, 7000]), np.array([10, 100, 100, 2000])
    drawn = resample(Lengths("empirical", bins=("4-8K",)), prompt, output, np.random.default_rng(0).random(50))
    assert set(drawn.rows.tolist()) == {1}
    with pytest.raises(WorkloadError, match="no row within 64-128K"):
        resample(Lengths("empirical", bins=("64-128K",)), prompt, output, np.zeros(1))


def test_limits_that_hold_nothing_of_the_law():
    with pytest.raises(WorkloadError, match="holds none of a log-normal"):
        draw_lengths(Lengths("lognormal", 5000, 6000, 1, 8, 10.0, 0.1, 4.0, 1.0), 10, np.random.default_rng(0))
