"""Where runs lie on the axes of sweeps, and what tells their scenarios apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paper_figures import stats
from paper_figures.records import Run
from paper_figures.selection import panels, variants
from paper_figures.sweep_axes import context, places, rate, skew

pytestmark = pytest.mark.cpu


def run(system: str = "crosspool", options: dict | None = None, number: int = 0, **workload) -> Run:
    config = {
        "system": {"name": system, "options": options or {}},
        "models": [{"name": "a"}, {"name": "b"}],
        "workload": workload,
    }
    return Run(Path("."), {"run_id": f"{system}-{number}", "system": system, "config": config, "status": "complete"})


@pytest.mark.parametrize(
    ("lengths", "tokens"),
    [
        ({"kind": "fixed", "prompt_max": 100, "output_max": 20}, 120),
        ({"kind": "uniform", "prompt_min": 1, "prompt_max": 100, "output_max": 20, "scale": 0.5}, 60),
        ({"kind": "bins", "bins": ["4-8K"]}, 8192),
        ({"kind": "empirical", "bins": ["64-128K"], "scale": 0.125}, 16384),
        ({"kind": "bins", "bins": ["4-8K", "8-16K"]}, None),
        ({"kind": "lognormal", "prompt_max": 100}, None),
    ],
)
def test_context(lengths, tokens):
    assert context(run(lengths=lengths)) == tokens


def test_rate_is_the_total_over_models_and_skew_is_of_power_laws_only():
    assert rate(run(arrivals={"rate_rps": 2.0, "rate_of": "total"})) == 2.0
    assert rate(run(arrivals={"rate_rps": 2.0, "rate_of": "model"})) == 4.0
    assert skew(run(popularity={"kind": "power_law", "alpha": 0.9})) == 0.9
    assert skew(run(popularity={"kind": "dirichlet", "alpha": 0.9})) is None


@pytest.mark.parametrize(
    ("options", "of_a_model"),
    [
        ({"max_batch": 4}, 4),
        ({"max_batch": 4, "lanes": 2}, 8),
        ({"max_batch": 4, "lanes": 3, "lanes_of_model": 1}, 4),
        ({"max_batch": 4, "lanes": 3, "lanes_of_model": 0}, 12),
        ({"max_batch": 4, "groups": {"a": {"devices": [0, 1]}}}, None),
        ({}, None),
    ],
)
def test_places_are_those_of_all_batches_that_a_model_may_have(options, of_a_model):
    assert places(run(options=options)) == of_a_model


def test_variants_name_only_the_options_that_differ():
    runs = [run("crosspool", {"lanes": lanes, "page": 1}, lanes) for lanes in (1, 2)] + [run("static", {"page": 1}, 3)]
    labels = variants(runs)
    assert [labels[r.run_id] for r in runs] == ["crosspool (lanes 1)", "crosspool (lanes 2)", "static"]


def test_panels_are_scenarios_and_seeds_are_not():
    runs = [
        run(number=n, arrivals={"rate_rps": r}, seeds={"schedule": s})
        for n, (r, s) in enumerate([(r, s) for r in (1.0, 2.0, 4.0, 8.0, 16.0) for s in (0, 1)])
    ]
    found = panels(runs)
    assert [label for label, _ in found] == ["rate 1.0", "rate 2.0", "rate 8.0", "rate 16.0"]
    assert all(len(members) == 2 for _, members in found)


def test_panels_are_told_apart_by_as_much_as_that_takes():
    cells = [(process, rate, alpha) for process in ("gamma", "poisson") for rate in (1.0, 2.0) for alpha in (0.0, 0.9)]
    runs = [
        run(number=n, arrivals={"kind": kind, "rate_rps": rate}, popularity={"alpha": alpha})
        for n, (kind, rate, alpha) in enumerate(cells)
    ]
    labels = [label for label, _ in panels(runs, most=8)]
    assert len(set(labels)) == len(cells)
    assert labels[0] == "arrivals.kind gamma, rate 1.0, skew 0.0"


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=2000))
def test_a_cdf_rises_to_one_and_keeps_its_ends(values):
    found, fractions = stats.cdf(np.array(values))
    assert fractions[-1] == 1.0
    assert found[0] == min(values)
    assert found[-1] == max(values)
    assert (np.diff(found) >= 0).all()
    assert (np.diff(fractions) > 0).all()
    assert len(found) <= 400


def test_interval_is_students():
    found = stats.interval([1.0, 2.0, 3.0, float("nan")])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.high - found.mean == pytest.approx(4.302653 * 1.0 / 3**0.5, rel=1e-6)
    assert np.isnan(stats.interval([5.0]).low)
    assert stats.interval([]).n == 0
