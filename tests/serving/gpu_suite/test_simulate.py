"""Measured loads are simulated as they were: the same requests, on the same bytes; misses are printed, not hidden."""

import json
from pathlib import Path

import pytest

from serving.cost.contention import Contention
from serving.errors import UserError
from serving.gpu_suite import fit_loads, simulate
from serving.gpu_suite.fit_loads import Fit, read_fit
from serving.gpu_suite.loads import Case, Row, case_of, read_rows
from serving.gpu_suite.simulate import AGAINST
from serving.gpu_suite.simulated_load import Assumed

pytestmark = pytest.mark.cpu

H200 = Path(__file__).parents[3] / "results" / "h200"
QUICK = Case("static", ("deepseek-v2-lite", "qwen3-30b-a3b"), (30 << 30, 90 << 30), 4.0, 6, 3, (64, 128), 0.0)


def row_of(case, **measured):
    told = {"system": case.label, "kv_gib": 12.0, "models": list(case.models), "prompts": list(case.prompts)}
    return {**told, "requests": case.requests, "rate_rps": case.rate_rps, "seed": 0, "skew": case.skew, **measured}


def test_shipped_rows_are_of_the_requests_that_were_measured():
    rows = read_rows(H200)
    assert len(rows) > 30
    unhurried = [row for row in rows if row.case.rate_rps == 2.0 and row.case.label == "static"]
    assert len({row.case.load for row in unhurried}) == 7
    for row in (unhurried[0], unhurried[-1]):  # drawn as the first runs did, and as later ones
        found = simulate.simulate(row.case, Assumed())
        assert found["tokens_per_s"] == pytest.approx(row.measured["tokens_per_s"], rel=0.02)
    for row in rows:
        if "p99_by_model" in row.measured:  # models stand there in the order of their first requests
            arrived = dict.fromkeys(request.model for _, request in row.case.arrivals())
            assert list(arrived) == list(row.measured["p99_by_model"])


def test_systems_of_one_load_have_the_same_requests_and_bytes():
    loads = {}
    for row in read_rows(H200):
        loads.setdefault(row.case.load, []).append(row.case)
    assert all(AGAINST in {case.label for case in same} for same in loads.values())
    assert all(case.arrivals() == same[0].arrivals() for same in list(loads.values())[:2] for case in same)


def test_prompts_that_take_longer_and_dearer_switches_slow_what_they_should():
    usual = simulate.simulate(QUICK, Assumed())
    assert simulate.simulate(QUICK, Assumed()) == usual
    longer = simulate.simulate(QUICK, Assumed(prompts=2.0))
    assert 1.5 * usual["ttft_mean_s"] < longer["ttft_mean_s"] < 2.5 * usual["ttft_mean_s"]
    dear = Assumed(contention=Contention("time_slice", switch_s=2e-3))
    assert simulate.simulate(QUICK, dear) == usual  # one process: nobody to switch to
    engines = Case("elastic", *[getattr(QUICK, name) for name in list(vars(QUICK))[1:]])
    assert simulate.simulate(engines, dear)["tbt_mean_s"] > simulate.simulate(engines, Assumed())["tbt_mean_s"]


def test_steps_in_parts_take_longer_where_prompts_meet():
    usual, parted = simulate.simulate(QUICK, Assumed()), simulate.simulate(QUICK, Assumed(in_parts=True))
    assert parted["tbt_p99_s"] > usual["tbt_p99_s"]
    alone = Case(QUICK.label, QUICK.models, QUICK.pools_bytes, QUICK.rate_rps, 1, QUICK.seed, (64, 64), 0.0)
    times = [simulate.simulate(alone, Assumed(in_parts=each))["ttft_mean_s"] for each in (False, True)]
    assert times[1] == pytest.approx(times[0], rel=0.01)


def test_a_fit_is_written_with_what_it_rests_on_and_read_back(tmp_path):
    chosen = Assumed(prompts=1.5, contention=Contention("time_slice", switch_s=3e-4))
    simulate.write_fit(tmp_path / "fit.json", Fit(chosen, {1.5: 0.1}, {0.15: 0.2}), read_rows(H200))
    assert read_fit(tmp_path / "fit.json") == chosen
    assert "12 measured rows" in json.loads((tmp_path / "fit.json").read_text())["provenance"]["rows"]
    assert read_fit().contention.mode == "time_slice" and read_fit().prompts >= 1.0
    with pytest.raises(UserError, match="no fit"):
        read_fit(tmp_path / "other.json")


def test_tables_show_every_row_measured_and_simulated(tmp_path, capsys, monkeypatch):
    measured = {name: 0.01 for name in simulate.TIMES} | {"p99_by_model": {QUICK.models[0]: 0.01}}
    rows = [row_of(QUICK, **measured), row_of(QUICK, **measured) | {"system": AGAINST}, {"system": "x", "error": "no"}]
    (tmp_path / "elastic_seeds.json").write_text(json.dumps({"rows": rows}))
    result = {"p99_by_model": {QUICK.models[0]: 0.02}} | {name: 0.02 for name in simulate.TIMES}
    monkeypatch.setattr(simulate, "simulate", lambda case, assumed: result)
    assert simulate.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "| elastic_seeds.json | static | 12 | 4 | 20 | 10.0 | 20.0 | 20.0 | 20.0 | 20.0 |" in printed
    assert f"| {QUICK.models[0]} | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 |" in printed
    assert "| static | 1 held out | measured steps | 2.00 | 2.00 |" in printed
    assert "| static | fitted | 1 | 1.00 | 1.00 | 1.00 (1.00 to 1.00) |" in printed
    assert simulate.main([str(tmp_path), "--fit", str(tmp_path / "fit.json")]) == 2
    assert "no rows of static and elastic" in capsys.readouterr().err


def test_the_fit_finds_what_rows_were_made_with(monkeypatch):
    made = Assumed(prompts=1.3, contention=Contention("time_slice", switch_s=3e-4))
    engines = Case("elastic", *[getattr(QUICK, name) for name in list(vars(QUICK))[1:]])
    rows = [Row("elastic.json", case, simulate.simulate(case, made)) for case in (QUICK, engines)]
    monkeypatch.setattr(fit_loads, "_PROMPTS", (1.0, 1.3, 1.6))
    monkeypatch.setattr(fit_loads, "_SWITCHES", (0.0, 0.15, 0.3))
    found = fit_loads.fit(rows)
    assert found.assumed == made and found.by_prompts[1.3] == found.by_switch[0.15] == 0.0 < found.by_switch[0.0]


@pytest.mark.parametrize("content", ["{", '{"rows": [{"system": "static"}]}', "[]"])
def test_a_file_that_is_no_result_is_refused(tmp_path, content):
    (tmp_path / "elastic.json").write_text(content)
    with pytest.raises(UserError, match="not a result"):
        read_rows(tmp_path)


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds none of"):
        read_rows(tmp_path)


def test_rows_of_the_first_runs_say_less_and_mean_the_same():
    case = case_of({"system": "static", "rate_rps": 5.0})
    assert (case.requests, case.seed, case.prompts, case.skew) == (30, 5, (64, 512), None)
    assert sum(case.pools_bytes) == 120 << 30
