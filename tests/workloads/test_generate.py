"""Whole traces: seeds that leave each other alone, clipping that is counted, prompts, injected bursts, bad descriptions."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.columnar import ModelLimits
from workloads.config import WorkloadConfig, workload_from_dict
from workloads.errors import WorkloadError
from workloads.expected import active_models
from workloads.generate import build_trace
from workloads.statistics import active_over_time, rate_over_time

pytestmark = pytest.mark.cpu

COLUMNS = ("arrival_s", "model", "prompt_tokens", "output_tokens")


def test_the_same_description_is_the_same_trace_and_another_is_not(make):
    content = {"duration_s": 20.0, "arrivals": {"rate_rps": 10.0}}
    trace = make(**content)
    assert make(**content).digest == trace.digest
    assert list(make(**content)) == list(trace)
    for seed in ("schedule", "model", "lengths", "prompts"):
        assert make(**content, seeds={seed: 1}).digest != trace.digest
    assert make(**content, vocabulary=999).digest != trace.digest


@pytest.mark.parametrize("process_of", ["total", "model"])
def test_each_seed_changes_its_own_choice_only(make, process_of):
    content = {"duration_s": 50.0, "arrivals": {"rate_rps": 10.0, "process_of": process_of}}
    before = make(**content)
    prompts = [request.prompt for request in before]
    for seed, changed in (("lengths", {"prompt_tokens", "output_tokens"}), ("prompts", set()), ("model", {"model"})):
        after = make(**content, seeds={seed: 5})
        if seed == "model" and process_of == "model":
            continue  # each model's own process has decided
        assert {c for c in COLUMNS if (getattr(before, c) != getattr(after, c)).any()} == changed
        assert ([request.prompt for request in after] == prompts) == (seed == "model")
    after = make(**content, seeds={"schedule": 5})
    shortest = min(len(before), len(after))
    assert (before.prompt_tokens[:shortest] == after.prompt_tokens[:shortest]).all()


@settings(max_examples=60, deadline=None)
@given(
    models=st.integers(1, 9),
    context=st.integers(2, 300),
    kind=st.sampled_from(["fixed", "uniform", "lognormal"]),
    process=st.sampled_from(["poisson", "gamma", "bursts", "constant"]),
    process_of=st.sampled_from(["total", "model"]),
    popularity=st.sampled_from(["power_law", "power_law_top", "dirichlet"]),
    seed=st.integers(0, 1000),
)
def test_every_trace_is_in_order_within_contexts_and_counts_what_it_clips(
    models, context, kind, process, process_of, popularity, seed
):
    content = {
        "duration_s": 7.5,
        "arrivals": {"kind": process, "rate_rps": 9.0, "process_of": process_of},
        "popularity": {"kind": popularity, "alpha": 1.1},
        "lengths": {"kind": kind},
        "seeds": {"schedule": seed, "lengths": seed, "model": seed},
    }
    limits = [ModelLimits(f"m{number}", 50, context) for number in range(models)]
    trace = build_trace(workload_from_dict(content), limits)
    wide = build_trace(workload_from_dict(content), [dataclasses.replace(m, max_context_tokens=9999) for m in limits])
    requests = list(trace)
    assert [request.request_id for request in requests] == list(range(len(trace)))
    assert (np.diff(trace.arrival_s) >= 0).all()
    for request in requests:
        assert 0 <= request.arrival_s < 7.5
        assert request.prompt_tokens >= 1 and request.output_tokens >= 1
        assert request.prompt_tokens + request.output_tokens <= context
        assert len(request.prompt) == request.prompt_tokens and max(request.prompt) < 50
    clipped = (trace.prompt_tokens != wide.prompt_tokens) | (trace.output_tokens != wide.output_tokens)
    assert trace.summary()["clipped"] == clipped.sum()
    lost = wide.prompt_tokens.sum() + wide.output_tokens.sum() - trace.prompt_tokens.sum() - trace.output_tokens.sum()
    assert trace.summary()["clipped_tokens"] == lost


def test_rate_of_each_model_multiplies(make):
    trace = make(50, duration_s=400, arrivals={"rate_rps": 0.5, "rate_of": "model"})
    assert abs(len(trace) - 10_000) < 4.5 * 100
    counts = np.bincount(trace.model, minlength=50)
    assert (np.abs(counts - 200) < 5 * 200**0.5).all()


def test_active_models_over_time_are_the_closed_form(make):
    """Aegaeon's M (1 - exp(-lambda T)) = 46.6 for 100 models at 0.037 req/s within 16.8 s; 100 windows."""
    assert active_models(3.7, np.full(100, 0.01), 16.8) == pytest.approx(46.3, abs=0.5)
    trace = make(100, duration_s=1680.0, arrivals={"rate_rps": 0.037, "rate_of": "model"})
    active = active_over_time(trace, 16.8)
    assert len(active) == 100
    assert abs(active.mean() - active_models(3.7, np.full(100, 0.01), 16.8)) < 4.5 * 5.0 / 10


def test_prompts_are_uniform_over_the_vocabulary(make):
    from scipy import stats

    trace = make(1, vocabulary=100, duration_s=200, arrivals={"rate_rps": 20.0})
    ids = np.concatenate([request.prompt for request in trace])
    assert stats.chisquare(np.bincount(ids, minlength=100)).pvalue > 1e-4
    assert len({request.prompt for request in trace}) == len(trace)


def test_shared_prefixes(make):
    """A share of 0.6 of the requests, by one of three prefixes: within 4.5 standard errors."""
    prompts = {"kind": "prefix", "prefix_tokens": 10, "prefix_share": 0.6, "prefix_groups": 3}
    trace = make(2, duration_s=100, arrivals={"rate_rps": 20.0}, prompts=prompts)
    begins = [request.prompt[:10] for request in trace]
    common = {begin for begin in begins if begins.count(begin) > 5}
    assert len(common) == 3
    share = sum(begin in common for begin in begins) / len(begins)
    assert abs(share - 0.6) < 4.5 * (0.24 / len(begins)) ** 0.5
    assert len({request.prompt[10:] for request in trace}) == len(trace)


def test_lengths_only(make):
    trace = make(prompts={"kind": "none"})
    assert all(request.prompt == () and request.prompt_tokens > 0 for request in trace)


def test_an_injected_burst_leaves_the_rest_as_it_was(make):
    content = {"duration_s": 60.0, "arrivals": {"rate_rps": 5.0}}
    calm = make(**content)
    injection = {"requests": 40, "at_s": 30.0, "over_s": 2.0, "model": "m3", "prompt_tokens": 5000, "output_tokens": 7}
    trace = make(**content, injection=injection)
    long = trace.prompt_tokens == 5000
    assert long.sum() == 40 and (trace.model[long] == 3).all() and (trace.output_tokens[long] == 7).all()
    assert ((trace.arrival_s[long] >= 30) & (trace.arrival_s[long] < 32)).all()
    for column in COLUMNS:
        assert (getattr(trace, column)[~long] == getattr(calm, column)).all()
    assert rate_over_time(trace, 2.0).argmax() == 15
    assert trace.summary()["injected"] == 40


BAD = {
    "rate negative": ({"arrivals": {"rate_rps": -1.0}}, "arrivals.rate_rps is -1.0; it must be a positive number"),
    "rate nan": ({"arrivals": {"rate_rps": math.nan}}, "arrivals.rate_rps is nan"),
    "rate text": ({"arrivals": {"rate_rps": "fast"}}, "arrivals.rate_rps is 'fast'"),
    "rate absurd": ({"arrivals": {"rate_rps": 1e12}}, "at most 2e.08 fit a trace"),
    "duration": ({"duration_s": 0}, "duration_s is 0"),
    "cv": ({"arrivals": {"kind": "gamma", "cv": 9.0}}, "arrivals.cv is 9.0; it must be between 0.5 and 8"),
    "alpha": ({"popularity": {"alpha": -0.1}}, "popularity.alpha is -0.1; it must be between 0 and 10"),
    "alpha nan": ({"popularity": {"alpha": math.nan}}, "popularity.alpha is nan"),
    "kind": ({"arrivals": {"kind": "weibull"}}, "arrivals.kind is 'weibull'; known: poisson, gamma"),
    "key": ({"arrivals": {"rps": 1}}, "workload.arrivals: unknown key 'rps'; known: kind, rate_rps"),
    "part": ({"arrivals": 3}, "workload.arrivals: a mapping is wanted, got 3"),
    "lengths": ({"lengths": {"prompt_min": 9, "prompt_max": 8}}, "prompt_min 9 is larger than prompt_max 8"),
    "zero": ({"lengths": {"output_min": 0}}, "output_min is 0; it must be a whole number of 1 or more"),
    "fraction": ({"lengths": {"prompt_max": 8.5}}, "prompt_max is 8.5; it must be a whole number"),
    "bin": ({"lengths": {"kind": "bins", "bins": ["8-4K"]}}, "'8-4K' is no bin"),
    "no bins": ({"lengths": {"kind": "bins"}}, "bins is empty"),
    "wide output": ({"lengths": {"kind": "bins", "bins": ["1-2K"], "output_max": 1024}}, "it must be below 1024"),
    "shares": ({"popularity": {"kind": "shares", "shares": {"zzz": 1}}}, "unknown model 'zzz'; known: m0, m1"),
    "injected model": ({"injection": {"requests": 1, "model": "x"}}, "injection.model: unknown model 'x'"),
    "injected late": ({"injection": {"requests": 1, "at_s": 30.0}}, "lies past duration_s 30"),
    "no source": ({"lengths": {"kind": "empirical"}}, "give workload.source.format and .path"),
    "no times": (
        {"arrivals": {"kind": "replay"}, "source": {"format": "lengths", "path": "x"}},
        "lengths has no arrival times",
    ),
    "blocks": (
        {"prompts": {"kind": "blocks"}, "source": {"format": "azure", "path": "x"}},
        "needs lengths.kind=replay",
    ),
    "seed": ({"seeds": {"model": -1}}, "seeds.model is -1"),
    "prefix": ({"prompts": {"kind": "prefix", "prefix_share": 1.5}}, "prefix_share is 1.5; it must be between 0 and 1"),
}


@pytest.mark.parametrize(("content", "says"), BAD.values(), ids=BAD)
def test_a_bad_description_is_one_clear_line(make, content, says):
    with pytest.raises(WorkloadError, match=says) as caught:
        make(2, **content)
    assert "\n" not in str(caught.value)


def test_rate_is_short_for_the_arrivals_rate_and_stronger():
    content = {"arrivals": {"kind": "gamma", "rate_rps": 3.0}}
    assert workload_from_dict({**content, "rate": 7.0}).arrivals.rate_rps == 7.0
    assert workload_from_dict({**content, "rate": None}) == workload_from_dict(content)
    assert workload_from_dict({"rate": 2}).arrivals.rate_rps == 2
    with pytest.raises(WorkloadError, match="rate_rps is -2"):
        workload_from_dict({"rate": -2})


def test_defaults_are_valid_and_models_are_needed():
    assert workload_from_dict({}) == WorkloadConfig()
    with pytest.raises(WorkloadError, match="no model is given"):
        build_trace(WorkloadConfig(), [])
    with pytest.raises(WorkloadError, match="hold no request"):
        build_trace(WorkloadConfig(), [ModelLimits("m", 10, 1)])


def test_a_million_requests_to_a_thousand_models_in_five_seconds(make):
    """By processor time, which other work on the machine does not stretch; a small multiple of the columns' 20 MB."""
    import time

    start = time.process_time()
    content = {"duration_s": 1000.0, "arrivals": {"kind": "gamma", "cv": 2.0, "rate_rps": 1000.0}}
    trace = make(1000, **content, popularity={"alpha": 0.9}, lengths={"kind": "lognormal"})
    assert time.process_time() - start < 5
    assert len(trace) > 950_000
    assert sum(getattr(trace, column).nbytes for column in COLUMNS) < 25e6
