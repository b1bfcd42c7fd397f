"""Records are written whole or not at all, read back equal, and a corrupt one is named and skipped."""

import errno
import json

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
    "metrics": {"completed": 1, "p99_itl_ms": None},
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


@pytest.mark.parametrize("damage", [damage_json, damage_keys, damage_version, damage_parquet], ids=lambda f: f.__name__)
def test_a_corrupt_record_is_named_skipped_and_counted(damage, tmp_path, capsys):
    write(tmp_path / "good")
    damage(write(tmp_path / "bad"))
    with pytest.raises(UserError, match="bad"):
        records.read_record(tmp_path / "bad")
    found, skipped = records.read_records(tmp_path)
    assert [record.path.name for record in found] == ["good"] and skipped == 1
    assert "warning: skipped" in capsys.readouterr().err


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
