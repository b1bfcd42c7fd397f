"""The command, on every shipped configuration: it prints, draws, repeats itself, and says in one line what is wrong."""

import csv
import os
from pathlib import Path

import pytest

from crosspool.planner.__main__ import main
from crosspool.planner.bench import run_bench
from crosspool.planner.config import load_config
from crosspool.planner.plan import make_plan

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "conf" / "planner").glob("*.yaml"))
SHARED = Path(os.environ.get("WORKLOAD_TRACES", ROOT.parent / "shared" / "traces"))


def needs(path):
    """The traces that a shipped configuration reads and this machine lacks."""
    traces = {model.lengths.trace for model in load_config(path).models} - {""}
    return [name for name in traces if not (SHARED / name).is_file()]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_printed_and_drawn(path, tmp_path, capsys):
    if missing := needs(path):
        pytest.skip(f"{', '.join(missing)} is not in WORKLOAD_TRACES or ../shared/traces")
    assert main([str(path), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for word in ("Demand of", "Pool budget", "M/G/infinity", "Parallelism", "Layout"):
        assert word in printed
    for name in ("demand", "overflow", "layout"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert (tmp_path / f"{name}.pdf").stat().st_size > 5000
        assert len(list(csv.reader((tmp_path / f"{name}.csv").open()))) > 2


def test_the_papers_deployment_comes_out_as_derived_from_its_models():
    plan = make_plan(load_config(ROOT / "conf" / "planner" / "paper.yaml"))
    ffn_bytes = sum(sum(load.weights_bytes.values()) for load in plan.layout.weights)
    assert ffn_bytes == pytest.approx(144.4e9, rel=0.01)
    assert 25 * 2**30 < plan.layout.kv_bytes < 33 * 2**30
    assert not plan.layout.shortfalls
    token_kib = [model.demand.token_bytes / 1024 for model in plan.models]
    assert token_kib == pytest.approx([96, 52.9, 30.4], abs=0.05)
    assert plan.estimate.mean_pages == pytest.approx(plan.moments.mean, rel=0.01)
    assert {str(plan.layout.parallel[m.config.name]) for m in plan.models} == {"one device"}


def write(tmp_path, change):
    text = (ROOT / "conf" / "planner" / "cpu2.yaml").read_text()
    path = tmp_path / "changed.yaml"
    path.write_text(change(text))
    return str(path)


def test_what_does_not_fit_is_printed_drawn_and_named_with_its_missing_bytes(tmp_path, capsys):
    path = write(tmp_path, lambda text: text.replace("memory_bytes: 67108864", "memory_bytes: 8388608"))
    assert main([path, "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "does not fit: core1: FFN weights" in captured.out
    assert captured.err.startswith("error: core1: FFN weights")
    assert "bytes" in captured.err
    assert captured.err.count("\n") == 1
    assert (tmp_path / "layout.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("[0.95, 0.99]", "[0.95, 1.0]"), "must lie in (0, 1)"),
        (lambda text: text.replace("rate_rps: 1.0", "rate_rps: -1.0"), "rate -1.0"),
        (lambda text: text.replace("rate_rps: 1.0", ""), "rate_rps is missing"),
        (lambda text: text.replace("page_bytes", "page_byte"), "unknown key page_byte"),
        (lambda text: text.replace("prompt_mean: 64,", ""), "prompt_mean"),
        (lambda text: text.replace("model_type: mixtral", "model_type: gpt"), "unknown architecture"),
        (lambda text: text.replace("hidden_size: 128", "", 1), "lacks the key 'hidden_size'"),
        (lambda text: text.replace("holding: declared", "holding: breath"), "unknown holding"),
        (lambda text: text + "check: {model: nobody}\n", "no model of this plan"),
        (lambda text: text + "check: {model: tiny-mixtral}\n", "has no trace"),
        (lambda text: "models: [", "cannot be read as YAML"),
        (lambda text: "- a list\n", "must map names to values"),
        (lambda text: "name: x\n", "missing"),
        (lambda text: text.replace("base_s: 0.02", "base_s: soon"), "service"),
    ],
)
def test_a_wrong_configuration_is_one_line(change, message, tmp_path, capsys):
    assert main([write(tmp_path, change), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_samples_of_a_running_pool_are_judged_against_the_plan(tmp_path, capsys):
    samples = tmp_path / "samples.csv"
    rows = [f"{time},{20},{30}" for time in range(2000)]
    samples.write_text("\n".join(["time_s,pages,waiting_pages", *rows]))
    config = str(ROOT / "conf" / "planner" / "cpu2.yaml")
    assert main([config, "--out", str(tmp_path), "--observed", str(samples)]) == 0
    printed = capsys.readouterr().out
    assert "mean demand 50.0 pages" in printed
    assert "grow: " in printed
    samples.write_text("time,pages\n0,1\n")
    assert main([config, "--out", str(tmp_path), "--observed", str(samples)]) == 2
    assert "no column 'time_s'" in capsys.readouterr().err


def test_a_missing_file_and_no_file_are_one_line(capsys):
    assert main(["no/such.yaml"]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main([]) == 2
    assert "no configuration given" in capsys.readouterr().err


def test_the_planner_meets_its_speed_memory_and_precision():
    result = run_bench()
    assert result.requests >= 1_000_000
    assert result.half_width <= 0.02
    assert abs(result.mean_error) <= 0.01
    assert result.seconds <= 10
