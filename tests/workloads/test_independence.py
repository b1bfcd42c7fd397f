"""A sweep over one choice leaves the others as they are, and no two choices are drawn from one stream."""

import itertools

import numpy as np
import pytest

from workloads.config import workload_from_dict
from workloads.files import read_trace, write_trace
from workloads.generate import ModelLimits, build_trace
from workloads.seeds import INJECTED, LENGTHS, MODEL, SCHEDULE, SHARES, stream

pytestmark = pytest.mark.cpu

MODELS = [ModelLimits(f"m{index}", 32_000, 131_072) for index in range(4)]
LAWS = {
    "uniform": {"kind": "uniform"},
    "lognormal": {"kind": "lognormal", "correlation": 0.5},
    "bins": {"kind": "bins", "bins": ["4-8K", "8-16K"]},
}


def drawn(duration_s=100.0, rate_rps=5.0, **parts):
    return build_trace(
        workload_from_dict({"duration_s": duration_s, "arrivals": {"rate_rps": rate_rps}, **parts}), MODELS
    )


def test_no_two_purposes_seeds_or_models_share_a_stream():
    purposes = (SCHEDULE, MODEL, LENGTHS, SHARES, INJECTED)
    first = [
        stream(seed, purpose, number).random()
        for seed, purpose, number in itertools.product(range(6), purposes, range(6))
    ]
    assert len(set(first)) == len(first)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("other", [{"seeds": {"schedule": 7}}, {"rate_rps": 3.0}, {"duration_s": 61.0}], ids=str)
def test_request_i_has_its_lengths_and_model_whatever_the_schedule(law, other):
    base, moved = drawn(lengths=LAWS[law]), drawn(lengths=LAWS[law], **other)
    count = min(len(base), len(moved))
    assert len(base) != len(moved)
    for column in ("model", "prompt_tokens", "output_tokens"):
        np.testing.assert_array_equal(getattr(base, column)[:count], getattr(moved, column)[:count], err_msg=column)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    "prompts", [{"kind": "random"}, {"kind": "prefix", "prefix_share": 0.5, "prefix_groups": 3}], ids=str
)
def test_an_injected_burst_moves_no_other_prompt_and_is_kept_in_a_file(prompts, suffix, tmp_path):
    burst = {"requests": 5, "at_s": 10.0, "over_s": 1.0, "prompt_tokens": 999}
    quiet, burst = drawn(30.0, prompts=prompts), drawn(30.0, prompts=prompts, injection=burst)
    before = {request.arrival_s: request for request in quiet}
    around = [request for request in burst if request.arrival_s in before]
    assert len(around) == len(quiet) == len(burst) - 5
    assert all(r.prompt == before[r.arrival_s].prompt for r in around)
    path = tmp_path / f"trace{suffix}"
    write_trace(burst, path)
    again = read_trace(path)
    assert again.digest == burst.digest
    assert [r.prompt for r in again] == [r.prompt for r in burst]


@pytest.mark.parametrize("concentration", [1e-6, 1e-4, 1e-2, 1.0, 1e3])
def test_dirichlet_shares_are_shares_at_any_concentration(concentration):
    shares = np.array(
        list(drawn(popularity={"kind": "dirichlet", "concentration": concentration}).made["expected_shares"].values())
    )
    assert np.isfinite(shares).all() and (shares >= 0).all() and shares.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("rate_of", ["total", "model"])
def test_muxserves_variant_fixes_the_top_models_rate(rate_of):
    trace = build_trace(
        workload_from_dict(
            {
                "duration_s": 10_000.0,
                "arrivals": {"rate_rps": 1.0, "rate_of": rate_of},
                "popularity": {"kind": "power_law_top", "alpha": 0.9},
            }
        ),
        MODELS,
    )
    assert (trace.model == 0).sum() / 10_000.0 == pytest.approx(1.0, abs=0.05)  # 5 s.e.


def test_a_replay_ends_with_its_file(tmp_path):
    rows = "".join(f"2023-11-16 18:15:{second:02d}.0000000,{10 + second},5\n" for second in range(0, 20, 2))
    (tmp_path / "azure.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    source = {"format": "azure", "path": "azure.csv", "directory": str(tmp_path)}
    parts = {"lengths": {"kind": "replay"}, "source": source}
    for scale, end_s in ((1.0, 18.0), (2.0, 9.0)):
        arrivals = {"kind": "replay", "rate_scale": scale}
        trace = build_trace(workload_from_dict({"duration_s": 3600.0, "arrivals": arrivals, **parts}), MODELS)
        assert len(trace) == 10 and trace.duration_s == pytest.approx(end_s)
        assert (trace.arrival_s < trace.duration_s).all()
