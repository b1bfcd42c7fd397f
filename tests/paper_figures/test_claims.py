"""Claims: formulas against the paper, verdicts from made-up records, and when the status is not zero."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from paper_figures.checks import CHECKS
from paper_figures.claims import main
from paper_figures.paper import paper
from paper_figures.shapes import shapes

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]


def verdicts(tmp_path, *arguments: str) -> tuple[int, dict[str, dict]]:
    report = tmp_path / "claims.json"
    status = main(["--records", str(tmp_path), "--json", str(report), *arguments])
    return status, {claim["name"]: claim for claim in json.loads(report.read_text())}


def test_formulas_reproduce_the_paper_without_any_run(tmp_path, capsys):
    status, found = verdicts(tmp_path)
    assert status == 0
    for name in ("kv_share", "ffn_parameters", "ffn_share", "ffn_bytes_in_weights_pool"):
        assert found[name]["verdict"] == "reproduced"
        assert found[name]["backend"] == "formula"
        assert found[name]["command"].startswith("python -m paper_figures ")
    assert found["ablation_both"]["verdict"] == "not run"
    assert found["ablation_both"]["why"] == "no records of experiment ablation"
    assert "reproduced" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "kib"),
    [
        ("Mixtral-8x7B", 128),
        ("DeepSeek-MoE-16B", 224),
        ("DeepSeek-V2-Lite", 30.4),
        ("GLM-4.7-Flash", 52.9),
        ("Qwen3-30B-A3B", 96),
    ],
)
def test_kv_bytes_per_token(model, kib):
    assert shapes()[model].kv_bytes_per_token / 1024 == pytest.approx(kib, abs=0.05)


def test_ablation_verdicts_follow_the_records(write_run, tmp_path):
    for lanes, control, throughput in ((1, "host", 50), (2, "host", 60), (1, "lowered", 40), (2, "lowered", 100)):
        options = {"lanes": lanes, "control": control}
        write_run(experiment="ablation", options=options, output_throughput=throughput)
    status, found = verdicts(tmp_path)
    assert status == 0
    assert found["ablation_both"]["ours"] == pytest.approx(2.0)
    assert found["ablation_both"]["verdict"] == "reproduced"
    assert found["ablation_lowering_only"]["ours"] == pytest.approx(0.8)
    assert found["ablation_lowering_only"]["verdict"] == "different"
    assert found["ablation_both"]["command"] == "python bench.py experiment=ablation"


def test_per_model_ratio_is_taken_at_its_rate(write_run, tmp_path):
    for system, scale in (("elastic", 9.0), ("crosspool", 1.0)):
        write_run(system, "paper-tbt", rate=1.6, scale=scale)
        write_run(system, "paper-tbt", rate=4.0, scale=1.0)
    write_run(
        "crosspool", "paper-tbt", rate=1.6, scale=3.0, options={"lanes": 3, "lanes_of_model": 1}
    )  # another system
    write_run("elastic", "paper-tbt", rate=1.6, scale=2.0, options={"mps": True})
    write_run("crosspool", "paper-tbt", rate=1.6, scale=5.0, seed=1)  # requests that elastic engines were not given
    check = {"metric": "p99_itl_ms", "model": "model-0", "rate_a_model_rps": 0.8}
    from paper_figures.records import read_records

    runs = read_records([tmp_path]).runs
    measured = CHECKS["model_metric_ratio"](runs, **check, numerator="elastic", denominator="crosspool")
    assert measured.value == pytest.approx(9.0, rel=1e-6)
    assert len(measured.runs) == 2


def test_a_claim_rests_on_measured_runs_where_there_are_any(write_run, tmp_path):
    for backend, speedup in (("sim", 2.0), ("real", 1.6)):
        for lanes, control, throughput in ((1, "host", 1.0), (2, "lowered", speedup)):
            options = {"lanes": lanes, "control": control}
            write_run(experiment="ablation", options=options, backend=backend, output_throughput=throughput)
        both = verdicts(tmp_path)[1]["ablation_both"]
        assert (both["backend"], both["ours"], both["n"]) == (backend, pytest.approx(speedup), 2)


def test_status_tells_what_should_have_run_and_did_not(write_run, tmp_path, capsys):
    assert verdicts(tmp_path, "--expect", "ablation")[0] == 1
    assert "should have run and did not: ablation_pipeline_only" in capsys.readouterr().err
    for options in ({"lanes": 1, "control": "host"}, {"lanes": 2, "control": "lowered"}):
        write_run(experiment="ablation", options=options, status="failed")
    status, found = verdicts(tmp_path)
    assert status == 1
    assert "17 bytes are missing" in found["ablation_both"]["why"]


def test_every_claim_names_a_known_check_or_says_why_not():
    for claim in paper()["claims"]:
        assert ("not_run" in claim) != (claim.get("check") in CHECKS), claim["name"]
        if "check" in claim:
            assert claim["low"] <= claim["high"], claim["name"]


def test_the_readme_counts_the_claims_of_the_shipped_records(tmp_path, capsys):
    report = tmp_path / "claims.json"
    assert main(["--records", str(ROOT / "results" / "shipped"), "--json", str(report)]) == 0
    verdicts = Counter(claim["verdict"].split(":")[0] for claim in json.loads(report.read_text()))
    told = re.search(
        r"Of (\d+) claims .* (\d+) came out alike, (\d+) differently, and (\d+) were not run",
        (ROOT / "README.md").read_text(),
    )
    counted = [verdicts.total(), verdicts["reproduced"], verdicts["different"], verdicts["not run"]]
    assert [int(number) for number in told.groups()] == counted
