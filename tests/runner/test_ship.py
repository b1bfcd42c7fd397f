"""Shipped records: packed small, checked by their manifest, and never drawn beside local ones without being told to."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from paper_figures.__main__ import main as draw
from runner import records, ship
from runner.observation import COMPLETED, PoolRow, RequestRow
from runner.study import study_directory

pytestmark = pytest.mark.cpu

CONTENT = {
    "run_id": "static-1", "config_hash": "1", "status": "complete", "config": {"results_dir": "/somewhere"},
    "system": "static", "backend": "real", "hardware": "cpu", "experiment": "e", "error": "", "provenance": {},
    "metrics": {"completed": 1, "p99_itl_ms": 1.0}, "metrics_by_model": {}, "seeds": {}, "trace": {}, "placement": [],
    "command": "python bench.py results_dir=/somewhere", "system_series": [{"time_s": i} for i in range(500)],
}  # fmt: skip


@pytest.fixture
def shipped(tmp_path):
    requests = [RequestRow(i, "m", 2, 3, 0, 1, 2, [5 + i, 9 + i], [7, 8], 6, COMPLETED) for i in range(20)]
    pools = [PoolRow(i, "cpu:0/kv", f"m{m}", 3, 10, 4096) for i in range(4000) for m in range(2)]
    records.write_record(tmp_path / "local" / "e" / "static-1", CONTENT, requests, pools)
    records.write_record(tmp_path / "local" / "e" / "static-2", {**CONTENT, "status": "interrupted"}, requests, pools)
    ship.pack(tmp_path / "local", tmp_path / "shipped", ["e"])
    return tmp_path / "shipped"


def test_a_packed_record_is_small_reads_and_names_no_place_of_its_maker(shipped):
    (record,), skipped = records.read_records(shipped)
    assert not skipped and record.content["shipped"]
    assert "/somewhere" not in json.dumps(record.content)
    assert record.metrics == CONTENT["metrics"] and len(record.content["system_series"]) <= 60
    rows = record.requests().to_pylist()
    assert len(rows) == 20 and rows[3]["token_times_ns"] == [8, 12] and rows[3]["token_ids"] == []
    series = record.series().to_pandas()
    assert len(series) <= 1000 and set(series.groupby("time_ns").size()) == {2}
    assert ship.main(["verify", "--shipped", str(shipped)]) == 0


def test_a_thinned_series_says_what_was_so_at_the_times_that_are_left(tmp_path):
    pages = {m: [(i * 7919 * (m + 1)) % 13 if i % (m + 2) == 0 else None for i in range(3000)] for m in range(2)}
    pools = [
        PoolRow(i, "kv", f"m{m}", pages[m][i], 10, 4096)
        for i in range(3000)
        for m in range(2)
        if pages[m][i] is not None
    ]
    records.write_record(tmp_path / "local" / "e" / "static-1", CONTENT, [], pools)
    ship.pack(tmp_path / "local", tmp_path / "shipped", ["e"])
    (record,), _ = records.read_records(tmp_path / "shipped")
    series = record.series().to_pandas()
    assert 300 < len(series) <= 1000
    for row in series.itertuples():
        known = [value for value in pages[int(row.model[1:])][: row.time_ns + 1] if value is not None]
        assert row.pages_in_use == known[-1]
    assert series["time_ns"].max() == pools[-1].time_ns


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "record.json").write_text("{"), "its checksum differs"),
        (lambda d: (d / "series.parquet").unlink(), "is in the manifest and not there"),
        (lambda d: pq.write_table(pq.read_table(d / "series.parquet"), d / "more.parquet"), "is not in the manifest"),
    ],
    ids=["changed", "missing", "new"],
)
def test_what_is_not_as_it_was_shipped_is_named(shipped, capsys, damage, words):
    damage(shipped / "e" / "static-1")
    assert ship.main(["verify", "--shipped", str(shipped)]) == 1
    assert words in capsys.readouterr().out


def test_shipped_and_local_records_are_drawn_together_only_when_told_to(shipped, tmp_path, capsys):
    roots = ["--records", str(tmp_path / "local"), "--records", str(shipped), "--out", str(tmp_path / "out")]
    assert draw(["ttft_cdf", *roots]) == 2
    assert "are not drawn together" in capsys.readouterr().err
    assert draw(["ttft_cdf", *roots, "--together"]) == 0
    assert draw(["ttft_cdf", "--records", str(shipped), "--out", str(tmp_path / "out")]) == 0
    assert "ship with the repository" in (tmp_path / "out" / "e" / "ttft_cdf.caption.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"), [(["pack", "nothing"], "holds no record to ship"), (["verify"], "no such")]
)
def test_nothing_to_ship_is_one_clear_line(tmp_path, capsys, arguments, words):
    where = ["--source", str(tmp_path)] if arguments[0] == "pack" else []
    assert ship.main([*arguments, *where, "--shipped", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize("records", [ship.SHIPPED, ship.SHIPPED.parent / "h200x2" / "records"], ids=lambda p: p.name)
def test_what_this_repository_ships_verifies(records):
    if not (records / ship.MANIFEST).exists():
        pytest.skip("this checkout ships no records there")
    count, wrong = ship.verify(records)
    assert count and not wrong


def test_a_study_has_a_place_of_its_own(tmp_path):
    assert study_directory(tmp_path, "kernels", []).relative_to(tmp_path).as_posix() == "kernels/kernels"
    found = study_directory(tmp_path, "planner-overflow", ["conf/planner/cpu2.yaml", "--seed"])
    assert found.name == "planner-overflow-cpu2"


def test_without_names_what_was_measured_is_packed_and_drawn(shipped, capsys):
    """Simulated runs ship by name only, and experiments that are none of the artifact's do not."""
    local = shipped.parent / "local"
    requests = [RequestRow(i, "m", 2, 3, 0, 1, 2, [5 + i, 9 + i], [7, 8], 6, COMPLETED) for i in range(20)]
    pools = [PoolRow(i, "cpu:0/kv", "m", 3, 10, 4096) for i in range(40)]
    for system in ("static", "crosspool"):
        for rate in (1.0, 2.0):
            workload = {"arrivals": {"rate_rps": rate, "rate_of": "total"}}
            content = {
                **CONTENT, "experiment": "rate", "system": system, "run_id": f"{system}-{rate}",
                "config": {"results_dir": "", "workload": workload, "models": [{"name": "m"}]},
                "metrics": {**CONTENT["metrics"], "rejected": 0, "failed": 0}, "metrics_by_model": {"m": CONTENT["metrics"]},
            }  # fmt: skip
            records.write_record(local / "rate" / content["run_id"], content, requests, pools)
    simulated = {**CONTENT, "experiment": "paper-tbt", "backend": "sim"}
    records.write_record(local / "paper-tbt" / "static-1", simulated, requests, pools)
    arguments = ["pack", "--source", str(local), "--shipped", str(shipped)]
    assert ship.main(arguments) == 0
    assert capsys.readouterr().out.rstrip().endswith("packed: rate")
    assert not (shipped / "paper-tbt").exists() and ship.main(["verify", "--shipped", str(shipped)]) == 0
    drawn = {path.name for path in (shipped / "figures" / "rate").iterdir()}
    assert {"latency_vs_rate.png", "latency_vs_rate.caption.txt", "summary.md"} <= drawn
    assert ship.main(["pack", "--source", str(shipped.parent / "none"), "--shipped", str(shipped)]) == 2
