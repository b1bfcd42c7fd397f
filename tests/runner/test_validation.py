"""The comparison of simulated with measured cells: equal questions are paired, misses are shown, nothing is left out."""

from pathlib import Path

import pytest

from runner.records import COMPLETE, Record
from runner.validation import BOUNDS, compare, main, table

pytestmark = pytest.mark.cpu


def record(backend, system="static", rate_rps=1.0, status=COMPLETE, options=None, repeat=0, **metrics):
    lengths = {"prompt_min": 1, "prompt_max": 2, "output_min": 3, "output_max": 4}
    workload = {"arrivals": {"rate_rps": rate_rps}, "lengths": lengths, "seeds": {"schedule": 0}}
    config = {
        "system": {"name": system, "options": {"max_batch": 4, **(options or {})}},
        "models": [],
        "devices": [],
        "workload": workload,
        **({"repeat": repeat} if repeat else {}),  # older records have none
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


def rounds(measured, simulated):
    return [
        record(backend, repeat=number, mean_itl_ms=value)
        for backend, values in (("real", measured), ("sim", simulated))
        for number, value in enumerate(values, start=1)
    ]


def test_of_several_rounds_the_median_of_their_errors_counts_not_the_error_of_their_medians(
    tmp_path, monkeypatch, capsys
):
    made = rounds((100.0, 200.0, 50.0), (130.0, 210.0, 51.0))  # +30, +5 and +2 %; medians are 30 % apart
    found = {one.metric: one for one in compare(made)}["mean_itl_ms"]
    assert found.errors == pytest.approx([0.3, 0.05, 0.02]) and found.error == pytest.approx(0.05) and found.within
    text = table([found])
    assert "by round: +30% +5% +2%" in text and "MISS" not in text
    assert text.endswith("1 of 1 within their bounds, by the median of 3 rounds; in each round alone: 0, 1, 1")
    monkeypatch.setattr("runner.validation.read_records", lambda folder: (made, 0))
    assert main([str(tmp_path), "--csv", str(tmp_path / "rows.csv")]) == 0
    rows = [line.split(",") for line in (tmp_path / "rows.csv").read_text().splitlines()]
    assert len(rows) == 1 + 3 * len(BOUNDS)


def test_a_round_counts_that_was_run_and_simulated_and_cells_say_how_many_they_have():
    made = rounds((100.0, 100.0), (101.0, 102.0)) + [
        record("real", repeat=3),
        record("real", "swap"),
        record("sim", "swap"),
    ]
    found = compare(made)
    assert {(one.system, len(one.errors)) for one in found} == {("static", 2), ("swap", 1)}
    assert table(found).endswith(
        f"{2 * len(BOUNDS)} of {2 * len(BOUNDS)} within their bounds, by the median of 1 to 2 rounds"
    )
    assert compare([record("real", repeat=1), record("sim", repeat=2)]) == []


def test_failed_runs_prove_nothing(tmp_path, capsys):
    assert compare([record("real", status="failed"), record("sim")]) == []
    assert main([str(tmp_path)]) == 2
    assert "no cell that was both run" in capsys.readouterr().err
