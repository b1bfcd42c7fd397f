"""Trace files: written and read back bit for bit; damage is seen and named."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workloads.columnar import ModelLimits
from workloads.config import workload_from_dict
from workloads.errors import WorkloadError
from workloads.files import read_trace, trace_for, write_trace
from workloads.generate import build_trace

pytestmark = pytest.mark.cpu

COLUMNS = ("arrival_s", "model", "prompt_tokens", "output_tokens")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rate_rps=st.floats(1e-6, 40.0),
    models=st.integers(1, 5),
    seed=st.integers(0, 10_000),
    prompts=st.sampled_from(["random", "prefix", "none"]),
)
def test_round_trip_is_bit_identical(tmp_path, suffix, rate_rps, models, seed, prompts):
    content = {"duration_s": 11.0, "arrivals": {"rate_rps": rate_rps}, "prompts": {"kind": prompts}}
    limits = [ModelLimits(f'm "{number}"', 64, 200) for number in range(models)]
    trace = build_trace(workload_from_dict({**content, "seeds": {"schedule": seed}}), limits)
    path, again = tmp_path / f"t{suffix}", tmp_path / f"u{suffix}"
    assert write_trace(trace, path) == trace.digest
    back = read_trace(path)
    assert back.digest == trace.digest and list(back) == list(trace)
    for column in COLUMNS:
        ours, theirs = getattr(trace, column), getattr(back, column)
        assert ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()
    assert back.summary() == json.loads(json.dumps(trace.summary()))
    write_trace(back, again)
    assert again.read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, again.name])


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_text_and_prefix_hashes_stand_in_the_file(tmp_path, suffix, text_models):
    turns = [{"from": "human", "value": "ab cd ef"}, {"from": "gpt", "value": "gh"}]
    (tmp_path / "s.json").write_text(json.dumps([{"conversations": turns}]))
    (tmp_path / "m.jsonl").write_text(
        "".join(
            json.dumps({"timestamp": 9 * n, "input_length": 700, "output_length": 3, "hash_ids": [0, n]}) + "\n"
            for n in range(5)
        )
    )
    text = {
        "lengths": {"kind": "empirical"},
        "prompts": {"kind": "text"},
        "source": {"format": "sharegpt", "path": str(tmp_path / "s.json")},
    }
    blocks = {
        "arrivals": {"kind": "replay"},
        "lengths": {"kind": "replay"},
        "prompts": {"kind": "blocks"},
        "source": {"format": "mooncake", "path": str(tmp_path / "m.jsonl")},
    }
    for content in (text, blocks):
        trace = build_trace(workload_from_dict(content), text_models)
        write_trace(trace, tmp_path / f"t{suffix}")
        back = read_trace(tmp_path / f"t{suffix}")
        assert len(trace) and list(back) == list(trace) and back.digest == trace.digest


def test_a_file_replays_against_those_who_serve_its_models(tmp_path, make):
    path = tmp_path / "t.jsonl"
    trace = make(3, context=100, vocabulary=64)
    write_trace(trace, path)
    served = [*reversed(trace.models), ModelLimits("another", 5, 50)]
    assert list(trace_for(path, served)) == list(trace)
    config = workload_from_dict({"trace_file": str(path)})
    assert build_trace(config, served).digest == trace.digest
    with pytest.raises(WorkloadError, match="unknown model 'm1'; served: m0, m2"):
        trace_for(path, [trace.models[0], trace.models[2]])
    with pytest.raises(WorkloadError, match="m0 is asked for .* tokens; its context is 20"):
        trace_for(path, [dataclasses.replace(m, max_context_tokens=20) for m in trace.models])
    with pytest.raises(WorkloadError, match="made for a vocabulary of 64; model m0 has 65"):
        trace_for(path, [dataclasses.replace(m, vocab_size=65) for m in trace.models])


def damaged(lines: list[str], how: str) -> list[str]:
    first = json.loads(lines[0])
    row = json.loads(lines[3])
    if how == "cut":
        return lines[:-2]
    if how == "changed":
        row["prompt_tokens"] += 1
    elif how == "model":
        row["model"] = "who"
    elif how == "order":
        row["arrival_s"] = 0.0
    elif how == "field":
        del row["output_tokens"]
    elif how == "fraction":
        row["output_tokens"] = 1.5
    elif how == "version":
        first["crosspool_trace"]["version"] = 2
    elif how == "header":
        return lines[1:]
    return [json.dumps(first) + "\n", *lines[1:3], json.dumps(row) + "\n", *lines[4:]]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("cut", "the header says .* not whole"),
        ("changed", "its digest is"),
        ("model", "t.jsonl:4: unknown model 'who'; the header knows m0, m1"),
        ("order", "t.jsonl:4: requests must be in order of arrival"),
        ("field", "t.jsonl:4: no output_tokens"),
        ("fraction", "t.jsonl:4: output_tokens is 1.5"),
        ("version", "t.jsonl:1: the trace is of version 2; this reads version 1"),
        ("header", "t.jsonl:1: no trace header"),
    ],
)
def test_damage_is_named(tmp_path, make, how, says):
    path = tmp_path / "t.jsonl"
    write_trace(make(2), path)
    path.write_text("".join(damaged(path.read_text().splitlines(keepends=True), how)))
    with pytest.raises(WorkloadError, match=says):
        read_trace(path)


def test_what_is_no_trace_file(tmp_path, make):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bad.parquet").write_text("x")
    for name, says in (
        ("gone.jsonl", "no such trace file"),
        ("empty.jsonl", "the file is empty"),
        ("bad.parquet", "no trace file"),
        ("t.txt", "a trace file ends in .jsonl or .parquet"),
    ):
        with pytest.raises(WorkloadError, match=says):
            read_trace(tmp_path / name)
    (tmp_path / "file").touch()
    with pytest.raises(WorkloadError, match="cannot be written"):
        write_trace(make(1), tmp_path / "file" / "t.jsonl")


def test_arrival_times_survive_as_floats(tmp_path, make):
    """Denormals and the largest gaps too: a decimal text that is read back is the same double."""
    trace = make(1, duration_s=1e6, arrivals={"rate_rps": 1e-3})
    times = np.sort(np.concatenate([[5e-324, 1e-17, 0.1, 1 / 3], trace.arrival_s]))[: len(trace)]
    odd = dataclasses.replace(trace, arrival_s=times)
    write_trace(odd, tmp_path / "t.jsonl")
    assert read_trace(tmp_path / "t.jsonl").arrival_s.tobytes() == times.tobytes()
