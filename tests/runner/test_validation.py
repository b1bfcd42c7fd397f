"""The comparison of simulated with measured cells: equal questions are paired, misses are shown, nothing is left out."""

from pathlib import Path

import pytest

from runner.records import COMPLETE, Record
from runner.validation import BOUNDS, compare, main, table

pytestmark = pytest.mark.cpu


def record(backend, system="static", rate_rps=1.0, status=COMPLETE, options=None, **metrics):
    lengths = {"prompt_min": 1, "prompt_max": 2, "output_min": 3, "output_max": 4}
    workload = {"arrivals": {"rate_rps": rate_rps}, "lengths": lengths, "seeds": {"schedule": 0}}
    config = {
        "system": {"name": system, "options": {"max_batch": 4, **(options or {})}},
        "models": [],
        "devices": [],
        "workload": workload,
    }
    values = {**dict.fromkeys(BOUNDS, 100.0), **metrics}
    return Record(
        Path("unused"), {"status": status, "system": system, "backend": backend, "config": config, "metrics": values}
    )


def test_cells_that_ask_the_same_are_paired_and_misses_are_shown():
    found = compare(
        [
            record("real"), record("sim", mean_itl_ms=109.0, p99_itl_ms=125.0),
            record("real", rate_rps=2.0), record("sim", rate_rps=4.0), record("sim", system="crosspool"),
        ]
    )  # fmt: skip
    assert {(one.system, one.metric) for one in found} == {("static", metric) for metric in BOUNDS}
    errors = {one.metric: (round(one.error, 3), one.within) for one in found}
    assert errors["mean_itl_ms"] == (0.09, True) and errors["p99_itl_ms"] == (0.25, False)
    text = table(found)
    assert text.count("MISS") == 1 and text.endswith("3 of 4 within their bounds")


def test_what_only_a_simulation_is_told_makes_no_other_question():
    told = {"contention": "time_slice", "slice_s": 1e-3}
    assert len(compare([record("real"), record("sim", options=told)])) == len(BOUNDS)
    assert compare([record("real"), record("sim", options={"lanes": 3})]) == []


def test_failed_runs_prove_nothing(tmp_path, capsys):
    assert compare([record("real", status="failed"), record("sim")]) == []
    assert main([str(tmp_path)]) == 2
    assert "no cell that was both run" in capsys.readouterr().err
