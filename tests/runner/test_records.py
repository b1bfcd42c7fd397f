"""Records are written whole or not at all, read back equal, and a corrupt one is named and skipped."""

import errno
import json
import shutil
import threading

import pyarrow.parquet as pq
import pytest

from runner import records
from runner.identity import config_hash, run_id
from runner.observation import COMPLETED, PoolRow, RequestRow
from runner.table import main as table_main
from serving.errors import UserError

pytestmark = pytest.mark.cpu

CONTENT = {
    "run_id": "static-1", "config_hash": "1", "status": "complete", "config": {"a": {"b": 1}}, "system": "static",
    "backend": "real", "hardware": "cpu", "experiment": "e", "error": "", "provenance": {},
    "metrics": {"completed": 1, "p99_itl_ms": None}, "metrics_by_model": {}, "seeds": {}, "trace": {}, "placement": [],
}  # fmt: skip


def requests():
    return [RequestRow(4, "m", 2, 3, 0, 1, 2, [5, 6], [7, 8], 6, COMPLETED)]


def write(directory, **changes):
    pools = [PoolRow(1, "cpu:0/kv", "m", 3, 10, 4096)]
    return records.write_record(directory, {**CONTENT, **changes}, requests(), pools)


def test_reads_back_what_was_written(tmp_path):
    record = records.read_record(write(tmp_path / "e" / "r"))
    assert record.metrics == CONTENT["metrics"]
    (row,) = record.requests().to_pylist()
    assert (row["token_times_ns"], row["token_ids"], row["ended_ns"], row["reason"]) == ([5, 6], [7, 8], 6, "")
    assert record.series().to_pylist()[0]["pages_in_use"] == 3


def test_a_second_record_of_a_run_replaces_the_first_and_leaves_no_litter(tmp_path):
    write(tmp_path / "r")
    write(tmp_path / "r", status="interrupted")
    assert records.read_record(tmp_path / "r").status == "interrupted"
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_a_full_disk_is_one_line_and_nothing_half_written(tmp_path, monkeypatch):
    write(tmp_path / "r")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(UserError, match="the disk is full; nothing was kept"):
        write(tmp_path / "r", status="interrupted")
    assert [path.name for path in tmp_path.iterdir()] == ["r"]
    assert records.read_record(tmp_path / "r").status == "complete"


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "file" / "r")


def damage_json(directory):
    (directory / records.RECORD_FILE).write_text("{")


def damage_keys(directory):
    (directory / records.RECORD_FILE).write_text("{}")


def damage_version(directory):
    content = json.loads((directory / records.RECORD_FILE).read_text())
    (directory / records.RECORD_FILE).write_text(json.dumps({**content, "schema_version": 99}))


def damage_parquet(directory):
    (directory / records.REQUESTS_FILE).write_bytes(b"PAR1")


def damage_columns(directory):
    shutil.copy(directory / records.SERIES_FILE, directory / records.REQUESTS_FILE)


def damage_status(directory):
    content = json.loads((directory / records.RECORD_FILE).read_text())
    (directory / records.RECORD_FILE).write_text(json.dumps({**content, "status": "fine"}))


def damage_types(directory):
    content = json.loads((directory / records.RECORD_FILE).read_text())
    (directory / records.RECORD_FILE).write_text(json.dumps({**content, "metrics": []}))


DAMAGES = [damage_json, damage_keys, damage_version, damage_parquet, damage_columns, damage_status, damage_types]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_corrupt_record_is_named_skipped_and_counted(damage, tmp_path, capsys):
    write(tmp_path / "good")
    damage(write(tmp_path / "bad"))
    with pytest.raises(UserError, match="bad"):
        records.read_record(tmp_path / "bad")
    found, skipped = records.read_records(tmp_path)
    assert [record.path.name for record in found] == ["good"] and skipped == 1
    assert "warning: skipped" in capsys.readouterr().err


def test_rows_that_are_damaged_inside_are_named_when_read(tmp_path):
    record = records.read_record(write(tmp_path / "r"))
    path = record.path / records.REQUESTS_FILE
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    with pytest.raises(UserError, match="requests.parquet: is corrupt"):
        records.read_record(tmp_path / "r").requests()


def test_a_place_that_cannot_be_written_is_said_before_a_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="results directory .* cannot be written"):
        records.require_writable(tmp_path / "file" / "e")


@pytest.mark.parametrize("exchanges", [True, False])
def test_readers_see_one_whole_record_while_another_replaces_it(exchanges, tmp_path, monkeypatch):
    if not exchanges:
        monkeypatch.setattr(records, "_exchange", lambda one, other: False)
    write(tmp_path / "r", error="0")
    seen, stop = set(), threading.Event()

    def read():
        while not stop.is_set():
            try:
                seen.add(records.read_record(tmp_path / "r").content["error"])
            except UserError:
                seen.add("torn")

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 60):
        write(tmp_path / "r", error=str(number))
    stop.set()
    reader.join()
    assert not exchanges or "torn" not in seen or not _exchange_works(tmp_path)
    assert records.read_record(tmp_path / "r").content["error"] == "59"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def _exchange_works(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    return records._exchange(one, other)


def test_the_table_tells_apart_what_was_swept_and_says_why_a_run_failed(tmp_path, capsys):
    for rate in (1, 2):
        write(tmp_path / f"r{rate}", config={"workload": {"rate_rps": rate, "fixed": 3}, "results_dir": f"/{rate}"})
    write(tmp_path / "bad", status="failed", error="17 bytes are missing", metrics={})
    assert table_main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "workload.rate_rps" in printed and "results_dir" not in printed.splitlines()[0]
    assert "failed: " in printed and "17 bytes are missing" in printed


def test_the_table_has_a_row_a_record_and_a_column_a_setting(tmp_path, capsys):
    write(tmp_path / "results" / "a")
    write(tmp_path / "results" / "b", system="crosspool")
    out = tmp_path / "table.parquet"
    assert table_main([str(tmp_path / "results"), "--out", str(out)]) == 0
    frame = pq.read_table(out).to_pandas()
    assert sorted(frame["system"]) == ["crosspool", "static"] and set(frame["config.a.b"]) == {1}
    assert "2 records, 0 skipped" in capsys.readouterr().out
    assert table_main([str(tmp_path / "nowhere")]) == 2


def test_identity_follows_the_content_not_its_order():
    assert config_hash({"a": 1, "b": [1, 2]}) == config_hash({"b": [1, 2], "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})
    assert run_id("static", {}).startswith("static-")
