"""Exhibits from made-up records: their numbers, their bytes, and what they do with too little."""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import pandas as pd
import pytest

from paper_figures import style
from paper_figures.__main__ import main
from paper_figures.caption import stamp
from paper_figures.exhibit import TableExhibit
from paper_figures.records import read_run
from paper_figures.registry import EXHIBITS
from paper_figures.validation import METRICS
from runner.validation import BOUNDS

pytestmark = pytest.mark.cpu

FIGURES = ("pdf", "png", "csv", "caption.txt")
TABLES = ("md", "tex", "csv", "caption.txt")


def files_of(name: str) -> tuple[str, ...]:
    return TABLES if isinstance(EXHIBITS[name], TableExhibit) else FIGURES


def draw(root, *arguments: str) -> int:
    return main([*arguments, "--records", str(root), "--out", str(root / "out")])


@pytest.fixture
def everything(write_run, write_study):
    """Records that every exhibit has something in."""
    for system, scale in (("crosspool", 1.0), ("static", 2.0)):
        for seed in (0, 1):
            for rate in (1.0, 4.0):
                write_run(system, "by-rate", seed=seed, rate=rate, scale=scale)
            for alpha in (0.0, 0.9):
                write_run(system, "by-skew", seed=seed, alpha=alpha, scale=scale)
        for prompt in (64, 256):
            for rate in (1.0, 4.0):
                write_run(system, "by-context", prompt=prompt, rate=rate, scale=scale)
        for num_models in (2, 3):
            write_run(system, "by-models", num_models=num_models, scale=scale)
    for most in (2, 4):
        for options in ({"lanes": 2}, {"lanes": 2, "lanes_of_model": 1}):
            write_run(experiment="by-places", options={"max_batch": most, **options}, scale=most)
        write_run("static", "by-places", options={"max_batch": most}, scale=2 * most)
    for lanes in (1, 2):
        for control in ("host", "lowered"):
            options = {"lanes": lanes, "control": control}
            write_run(experiment="by-option", options=options, scale=3 - lanes, timeline=True)
    for rate in (1.0, 4.0):
        for system, scale in (("crosspool", 1.0), ("elastic", 5.0)):
            write_run(system, "assumptions", rate=rate, scale=scale, backend="sim")
        for backend in ("real", "sim"):
            write_run(experiment="both", rate=rate, backend=backend)
    write_run(experiment="many", num_models=8)
    write_run("swap", "swaps", swaps=3, **{"switch_ms/evict": 1.0, "switch_ms/load": 20.0})
    write_study("kernels", KERNELS, measured_with={"ceilings": {"bytes_per_s": 1e10, "flops": 1e11}})
    write_study("planner-overflow", OVERFLOW, backend="offline")
    write_study("rate-estimate", ESTIMATE, backend="offline")


KERNELS = [
    {"op": op, "shape": "made up", "dtype": "float32", "seconds": 1e-3 * n, "bytes": 10**6, "flops": 10**6 * n}
    for n, op in enumerate(("rope", "router", "moe_ffn"), 1)
]
ESTIMATE = [
    {"system": system, "bin": f"{tokens // 1024}K", "context_tokens": tokens, "reserve_gib": reserve, "rate_rps": rate}
    for system, rate in (("crosspool", 1.0), ("static", 0.0))
    for reserve in (0.0, 4.0)
    for tokens in (8192, 16384)
]
OVERFLOW = [
    {"check": check, "fit": fit, "quantile": 1 - p, "budget_pages": 10.0, "promised": p, "observed": p}
    for check, fit in (("drawn", "plan"), ("drawn", "normal"), ("blocks", "dispersed"))
    for p in (0.1, 0.05, 0.01)
]


EXPERIMENT_OF = {
    "latency_vs_rate": "by-rate", "goodput": "by-rate", "skew": "by-skew", "context": "by-context",
    "model_count": "by-models", "places": "by-places", "ablation": "by-option", "pipeline_timeline": "by-option", "rate_by_context": "by-context",
    "sensitivity": "assumptions", "validation": "both", "popularity": "many", "swap_breakdown": "swaps",
    "kernel_roofline": "kernels", "rate_estimate": "rate-estimate", "planner_overflow": "planner-overflow", "kv_share": "models", "model_table": "models",
}  # fmt: skip


def test_every_exhibit_is_drawn_with_all_its_files(everything, tmp_path):
    names_of = defaultdict(list)
    for name in EXHIBITS:
        names_of[EXPERIMENT_OF.get(name, "by-rate")].append(name)
    for folder, names in names_of.items():
        assert draw(tmp_path, *names, "--experiment", folder) == 0
        for name in names:
            for suffix in files_of(name):
                assert (tmp_path / "out" / folder / f"{name}.{suffix}").stat().st_size > 0
    assert not list((tmp_path / "out").rglob(".*")), "something half-written is left"


@pytest.mark.parametrize("name", ["tbt_cdf", "kv_pages_over_time", "summary"])
def test_same_records_same_bytes(write_run, tmp_path, name):
    write_run("crosspool")
    write_run("static", scale=2.0)
    for out in ("first", "second"):
        assert main([name, "--records", str(tmp_path / "made-up"), "--out", str(tmp_path / out)]) == 0
    for suffix in files_of(name):
        first, second = ((tmp_path / out / "made-up" / f"{name}.{suffix}").read_bytes() for out in ("first", "second"))
        assert first == second, f"{name}.{suffix} differs"


def test_fonts_are_embedded_whole_and_no_date_is_in_a_pdf(write_run, tmp_path):
    write_run()
    draw(tmp_path, "ttft_cdf")
    pdf = (tmp_path / "out" / "made-up" / "ttft_cdf.pdf").read_bytes()
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf
    assert b"CreationDate" not in pdf


@pytest.mark.parametrize(("name", "samples_ms"), [("tbt_cdf", "itl_ms"), ("ttft_cdf", "ttft_ms")])
def test_a_cdf_is_the_record_s_own_rows(write_run, tmp_path, name, samples_ms):
    run = read_run(write_run("crosspool"))
    main([name, "--records", str(tmp_path), "--out", str(tmp_path / "out")])
    rows = pd.read_csv(tmp_path / "out" / "made-up" / f"{name}.csv")
    samples = np.sort(getattr(run, samples_ms)())
    np.testing.assert_array_equal(rows["latency_ms"], samples)
    np.testing.assert_allclose(rows["fraction"], np.arange(1, len(samples) + 1) / len(samples), rtol=0, atol=1e-15)
    assert np.percentile(samples, 99) == pytest.approx(run.metrics[f"p99_{samples_ms}"])


def test_sweeps_and_tables_hold_the_records_numbers(everything, tmp_path):
    draw(tmp_path, "latency_vs_rate")
    draw(tmp_path, "ablation", "outcomes", "--experiment", "by-option", "--experiment", "by-models")
    rates = pd.read_csv(tmp_path / "out" / "by-rate" / "latency_vs_rate.csv")
    cell = rates[(rates["system"] == "static") & (rates["x"] == 4.0) & (rates["metric"] == "p99_itl_ms")].iloc[0]
    seeds = [read_run(path.parent) for path in tmp_path.glob("by-rate/static-real-*-4.0-*/record.json")]
    values = [run.metrics["p99_itl_ms"] for run in seeds]
    assert cell["mean"] == np.mean(values)
    assert cell["n"] == 2
    assert cell["ci_low"] < min(values)
    assert cell["ci_high"] > max(values)
    ablation = pd.read_csv(tmp_path / "out" / "by-option" / "ablation.csv").set_index(["in-flight batches", "control"])
    assert ablation.loc[(2, "lowered"), "tokens/s"] == 100.0
    assert ablation.loc[(2, "lowered"), "speed-up"] == 2.0
    outcomes = pd.read_csv(tmp_path / "out" / "by-models" / "outcomes.csv")
    assert list(outcomes["completed"]) == [11] * 4
    assert list(outcomes["rejected"]) == [1] * 4


def test_batches_and_lanes_make_places_and_no_variants(everything, tmp_path):
    draw(tmp_path, "places", "--experiment", "by-places")
    rows = pd.read_csv(tmp_path / "out" / "by-places" / "places.csv")
    lines = rows[rows["metric"] == "p99_itl_ms"].groupby("system")["x"].apply(list).to_dict()
    assert lines == {"crosspool": [4, 8], "crosspool-one-batch": [2, 4], "static": [2, 4]}


def test_systems_that_differ_in_places_are_no_sweep_of_them(write_run, tmp_path, capsys):
    write_run(options={"max_batch": 4, "lanes": 2})
    write_run("static", options={"max_batch": 4})
    assert draw(tmp_path, "places") == 2
    assert "needs a system at two or more numbers of places a model" in capsys.readouterr().err


def test_simulated_against_measured_takes_the_median_over_rounds_of_the_error(write_run, tmp_path):
    for repeat, (measured, simulated) in enumerate([(100.0, 130.0), (200.0, 210.0), (50.0, 51.0)], start=1):
        write_run(repeat=repeat, p99_itl_ms=measured)
        write_run(repeat=repeat, backend="sim", p99_itl_ms=simulated)
    write_run(repeat=4, p99_itl_ms=1.0)  # not simulated
    assert draw(tmp_path, "validation") == 0
    rows = pd.read_csv(tmp_path / "out" / "made-up" / "validation.csv")
    row = rows[rows["metric"] == "p99_itl_ms"].iloc[0]
    assert (row["rounds"], row["measured"], row["simulated"]) == (3, 100.0, 130.0)
    assert list(row[["error", "least", "most"]]) == pytest.approx([0.05, 0.02, 0.3])
    assert "n = 1 seed (0), 4 times" in (tmp_path / "out" / "made-up" / "validation.caption.txt").read_text()
    assert set(rows["metric"]) == set(BOUNDS)
    assert {metric: bound for metric, (_, bound) in METRICS.items()} == BOUNDS, "the figure shows what the table judges"


@pytest.mark.parametrize("num_systems", [1, 2, 9])
def test_any_number_of_systems_is_drawn_each_with_its_own_look(write_run, tmp_path, num_systems):
    names = ["crosspool", "static", "elastic", "swap", "quota", "prism", "a", "b", "c"][:num_systems]
    for name in names:
        write_run(name)
    looks = {(style.look(n).color, style.look(n).marker, str(style.look(n).line)) for n in names}
    assert len(looks) == num_systems
    for exhibit in ("tbt_cdf", "kv_pages_over_time", "outcomes", "tbt_by_model"):
        assert draw(tmp_path, exhibit) == 0
        rows = pd.read_csv(tmp_path / "out" / "made-up" / f"{exhibit}.csv")
        assert set(rows["system"]) == set(names)


def test_tbt_of_each_model_says_which_load_it_is_of(write_run, tmp_path):
    for rate in (1.0, 2.5):
        write_run(rate=rate)
    assert draw(tmp_path, "tbt_by_model") == 0
    rows = pd.read_csv(tmp_path / "out" / "made-up" / "tbt_by_model.csv")
    assert set(rows["load"]) == {"2.5 req/s in all"}


def test_tbt_of_each_model_is_of_the_skew_that_most_variants_ran(write_run, tmp_path):
    options = {"max_batch": 4}
    for alpha, variants in ((0.9, ({}, {"mps": True})), (2.1, ({"mps": True},))):
        write_run(alpha=alpha, options=options)
        for own in variants:
            write_run("elastic", alpha=alpha, options={**options, **own})
    assert draw(tmp_path, "tbt_by_model") == 0
    rows = pd.read_csv(tmp_path / "out" / "made-up" / "tbt_by_model.csv")
    assert set(rows["load"]) == {"2 req/s in all, skew 0.9"}
    assert set(rows["system"]) == {"crosspool", "elastic", "elastic-mps"}


def test_a_stamp_says_how_often_cells_were_run_at_least_and_at_most(write_run):
    once = [read_run(write_run(system)) for system in ("crosspool", "static")]
    again = [read_run(write_run("static", seed=seed)) for seed in (1, 2)]
    assert stamp(once).endswith("; n = 1")
    assert stamp([*once, *again]).endswith("; n = 1 to 3")
    assert stamp([once[1], *again]).endswith("; n = 3")


def test_what_could_not_run_is_shown_and_named(write_run, tmp_path):
    write_run("crosspool", rate=1.0)
    write_run("crosspool", rate=2.0)
    write_run("static", rate=1.0)
    write_run("static", rate=2.0, status="failed")
    assert draw(tmp_path) == 0
    rows = pd.read_csv(tmp_path / "out" / "made-up" / "goodput.csv")
    failed = rows[(rows["system"] == "static") & (rows["x"] == 2.0)]
    assert (failed["could_not_run"] == 1).all()
    assert failed["mean"].isna().all()
    caption = (tmp_path / "out" / "made-up" / "goodput.caption.txt").read_text()
    assert "Could not run: static (made-up: does not fit, 17 bytes are missing)" in caption
    assert "Measured on made-up test machine" in caption
    assert "could not run" in (tmp_path / "out" / "made-up" / "summary.md").read_text()


def test_simulated_runs_are_called_simulated(write_run, tmp_path):
    write_run(backend="sim")
    draw(tmp_path, "tbt_cdf")
    caption = (tmp_path / "out" / "made-up" / "tbt_cdf.caption.txt").read_text()
    assert "SIMULATED" in caption
    assert "Measured" not in caption


def test_measured_and_simulated_runs_never_share_a_curve(write_run, tmp_path):
    for backend in ("real", "sim"):
        write_run(backend=backend)
    for name in ("tbt_cdf", "outcomes"):
        draw(tmp_path, name)
        rows = pd.read_csv(tmp_path / "out" / "made-up" / f"{name}.csv")
        assert set(rows["panel"]) == {"backend real", "backend sim"}
        assert (rows["runs"] == 1).all()


def test_a_corrupt_record_costs_one_run_and_is_named(write_run, tmp_path, capsys):
    write_run("crosspool")
    (write_run("static") / "record.json").write_text("{ not json")
    (write_run("swap") / "requests.parquet").write_bytes(b"PAR1")
    old = write_run("elastic") / "record.json"
    old.write_text(json.dumps({**json.loads(old.read_text()), "schema_version": 99}))
    assert draw(tmp_path, "tbt_cdf") == 0
    captured = capsys.readouterr()
    assert captured.err.count("warning: skipped") == 3
    for system in ("static", "swap", "elastic"):
        assert f"{system}-real-made-up" in captured.err
    assert "1 exhibits from 1 runs" in captured.out
    assert "3 records skipped" in captured.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_figure"], "error: unknown figure no_such_figure; known: summary, tbt_cdf"),
        (["tbt_cdf", "--records", "{root}/absent"], "error: no records at "),
        (["tbt_cdf", "--records", "{root}"], "error: tbt_cdf: no records were found"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, capsys, arguments, message):
    status = main([argument.replace("{root}", str(tmp_path)) for argument in arguments])
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_an_exhibit_asked_for_that_has_nothing_to_show_says_what_it_needs(write_run, tmp_path, capsys):
    write_run()
    assert draw(tmp_path, "skew") == 2
    assert "needs runs at two or more values of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_caption_names_the_card_of_the_devices_and_counts_many(write_run, tmp_path):
    """The card that a backend would take for devices without one is not what was simulated."""
    directory = write_run("static", backend="sim")
    content = json.loads((directory / "record.json").read_text())
    content["config"]["backend"] = {"name": "sim", "card": "a100-40gb"}
    content["hardware"] = ", ".join(f"gpu:{i} (10 MiB)" for i in range(9)) + "; simulated h200"
    (directory / "record.json").write_text(json.dumps(content))
    assert draw(tmp_path, "kv_capacity") == 0
    told = (tmp_path / "out" / "made-up" / "kv_capacity.caption.txt").read_text()
    assert "on modelled h200 [9 devices of 10 MiB; simulated h200]" in told and "a100" not in told


def test_what_lies_where_is_of_the_scenario_that_most_systems_served(write_run, tmp_path):
    for rate, systems in (
        (1.0, ("crosspool", "static")),
        (2.0, ("crosspool", "static", "swap")),
        (4.0, ("crosspool",)),
    ):
        for system in systems:
            write_run(system, rate=rate)
    assert draw(tmp_path, "kv_capacity", "placement") == 0
    out = tmp_path / "out" / "made-up"
    assert list(pd.read_csv(out / "kv_capacity.csv")["system"]) == ["crosspool", "static", "swap"]
    placed = [name for name in pd.read_csv(out / "placement.csv")["system"] if not name.startswith("paper")]
    assert placed == ["crosspool", "static", "swap"]


def test_a_caption_counts_calibrations_and_a_stamp_names_what_measured(write_run, tmp_path):
    write_run("static")
    for number in range(3):
        directory = write_run("static", seed=number, backend="sim")
        content = json.loads((directory / "record.json").read_text())
        content["config"]["backend"] = {"name": "sim", "calibration": f"made/{number}.json"}
        content["hardware"] = f"cpu:0 (10 MiB); simulated made/{number}.json"
        (directory / "record.json").write_text(json.dumps(content))
    assert draw(tmp_path, "outcomes") == 0
    told = (tmp_path / "out" / "made-up" / "outcomes.caption.txt").read_text()
    assert "on modelled hardware by 3 calibrations [cpu:0 (10 MiB)]." in told
    runs = [read_run(path.parent) for path in tmp_path.rglob("record.json")]
    assert stamp(runs).startswith("measured+simulated on made-up test machine [")
    assert "more" not in stamp(runs)


def test_beside_an_arena_any_model_can_use_all_kv(write_run, tmp_path):
    directory = write_run("swap")
    content = json.loads((directory / "record.json").read_text())
    for device in content["placement"]:
        device["weights_bytes"] = {"arena": 1000}
    (directory / "record.json").write_text(json.dumps(content))
    assert draw(tmp_path, "kv_capacity") == 0
    (row,) = pd.read_csv(tmp_path / "out" / "made-up" / "kv_capacity.csv").to_dict("records")
    assert row["least_bytes"] == row["total_bytes"] == 2 << 18


def test_a_comparison_says_where_crosspool_loses_and_names_presets_as_systems(write_run, tmp_path):
    """Trace by trace: 0.8x in every seed is a clear win of the other whatever seeds differ by; a bound that ties wins nothing."""
    for seed, level in ((0, 10.0), (1, 20.0), (2, 40.0)):
        write_run("crosspool", seed=seed, p95_ttft_ms=level, p99_itl_ms=level, request_goodput=1.0)
        searched = {"placement": "searched"}
        write_run(
            "static", seed=seed, options=searched, p95_ttft_ms=0.8 * level, p99_itl_ms=2 * level, request_goodput=1.2
        )
        write_run("swap", seed=seed, options={"zero_cost": True}, p95_ttft_ms=level, p99_itl_ms=level, swaps=4)
    write_run("quota", options={"admission": "cap"}, status="failed")
    assert draw(tmp_path, "comparison", "comparison_by_rate", "comparison_by_model") == 0
    table = pd.read_csv(tmp_path / "out" / "made-up" / "comparison.csv").set_index("system")
    told = table["beats CrossPool in"]
    assert list(table.index) == ["crosspool", "static-searched", "quota-cap", "swap-zero-cost"]
    assert told["static-searched"] == "TTFT p95 0.80x*, goodput 1.20x*"
    assert told["quota-cap"] == "could not run" and table["n"]["quota-cap"] == 0
    assert told["swap-zero-cost"] == "goodput 1.50x*" and table["swaps"]["swap-zero-cost"] == 4
    drawn = pd.read_csv(tmp_path / "out" / "made-up" / "comparison_by_rate.csv")
    ringed = drawn[drawn["beats_crosspool"]]
    assert sorted(zip(ringed["system"], ringed["metric"], strict=True)) == [
        ("static-searched", "TTFT p95 (ms)"),
        ("static-searched", "goodput (req/s)"),
        ("swap-zero-cost", "goodput (req/s)"),
    ]
    assert "could not run: quota-cap" in (tmp_path / "out" / "made-up" / "comparison.caption.txt").read_text().lower()
    assert draw(tmp_path, "comparison", "--experiment", "none-of-crosspool") == 2
