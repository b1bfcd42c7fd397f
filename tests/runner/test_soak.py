"""The soak: its judgements fail on what leaks, a system's shutdown is seen for what it leaves, and short ones run and pass."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner import soak
from runner.footprint import Footprint, held_shared_memory, left_in_shared_memory, shared_memory_names
from runner.soak_judges import FLAT, Left, judge, second_half

pytestmark = pytest.mark.cpu

COUNTS = {"sent": 100, "completed": 90, "rejected": 4, "cancelled": 6, "too_long": 4, "asked_to_cancel": 6}
STEADY = {"memory_bytes": [1e9] * 40, "descriptors": [50] * 40, "threads": [7] * 40}
NOTHING = Left((), 0, 0)


def failed(counts=COUNTS, series=STEADY, pages=(("cpu:0 a", 0),), left=NOTHING, wrong=""):
    return [j.name for j in judge(counts, series, dict(pages), left, wrong) if not j.passed]


def test_a_run_that_leaves_nothing_passes():
    assert failed() == []


@pytest.mark.parametrize("growth", [0.2, -0.2])
def test_memory_that_moves_on_fails_and_a_warm_up_does_not(growth):
    moving = [1e9 * (1 + growth * sample / 40) for sample in range(40)]
    assert failed(series={**STEADY, "memory_bytes": moving}) == ["memory"]
    warming = [min(1e9, 1e9 * (0.5 + sample / 40)) for sample in range(40)]
    assert failed(series={**STEADY, "memory_bytes": warming}) == []


@given(st.integers(2, 400), st.floats(0.0, 0.3))
def test_growth_is_told_from_flat_by_the_stated_formula(count, growth):
    """A straight line from half-time to the end by `growth` fails exactly where its two medians say so."""
    half = count // 2
    values = [1e6 * (1 + growth * max(0, i - half) / max(1, count - 1 - half)) for i in range(count)]
    middle, end = second_half(values)
    assert (failed(series={**STEADY, "memory_bytes": values}) == ["memory"]) == (abs(end / middle - 1) > FLAT)
    assert count < 20 or growth < 1.3 * FLAT or end / middle - 1 > FLAT


@pytest.mark.parametrize("name", ["descriptors", "threads"])
def test_one_more_descriptor_or_thread_at_the_end_fails(name):
    assert failed(series={**STEADY, name: [5] * 30 + [6] * 10}) == [name]


@pytest.mark.parametrize(
    "changed",
    [
        {"completed": 89},
        {"completed": 91},
        {"rejected": 5, "completed": 89},
        {"cancelled": 5, "completed": 91},
        {"sent": 0},
    ],
)
def test_requests_that_are_not_accounted_for_fail(changed):
    assert failed(counts={**COUNTS, **changed}) == ["requests"]


def test_what_is_left_fails_by_name():
    assert failed(pages={"cpu:0 a": 0, "cpu:1 b": 1}) == ["KV pages"] and failed(pages={}) == ["KV pages"]
    assert failed(left=Left(["leak"], 0, 0)) == ["shared memory"]
    assert failed(left=Left((), 1, 0)) == ["processes"] and failed(left=Left((), 0, 2)) == ["descriptors left"]
    assert failed(wrong="worker died") == ["run"]
    assert failed(series={}) == ["memory", "descriptors", "threads"]


def test_a_footprint_sees_memory_descriptors_and_shared_memory_that_come_and_go():
    names, before = shared_memory_names(), Footprint.now()
    path = Path("/dev/shm") / f"soak-test-{os.getpid()}"
    with path.open("wb") as file:
        try:
            file.write(bytes(1 << 20))
            held = bytearray(os.urandom(1 << 24))
            now = Footprint.now()
            assert now.memory_bytes - before.memory_bytes > len(held) // 2
            assert now.descriptors == before.descriptors + 1 and now.processes >= 1
            assert path.name in held_shared_memory()
            assert left_in_shared_memory(names, ()) == [path.name] and not left_in_shared_memory(
                [*names, path.name], ()
            )
        finally:
            path.unlink()
    assert left_in_shared_memory(names, [path.name]) == [] and Footprint.now().descriptors == before.descriptors


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "runner.soak", *arguments],
        capture_output=True, text=True, env={**os.environ, **environment}, cwd=Path(__file__).resolve().parents[2],
        timeout=200, check=False,
    )  # fmt: skip


def test_a_short_soak_of_two_systems_passes_and_leaves_records(tmp_path):
    done = run("--systems", "crosspool", "swap", "--requests", "60", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASS") == 2
    for name in ("crosspool", "swap"):
        record = json.loads((tmp_path / f"{name}.json").read_text())
        counts = record["counts"]
        assert counts["completed"] + counts["rejected"] + counts["cancelled"] == counts["sent"] == 60
        assert counts["rejected"] == 2 and counts["cancelled"] > 0 and record["passed"]
        assert len(record["series"]["memory_bytes"]) == len(record["series"]["ended"]) > 10
        assert max(record["series"]["kv_pages"]) > 0
    assert soak.ship(tmp_path, tmp_path / "shipped.json") == 2
    shipped = json.loads((tmp_path / "shipped.json").read_text())["systems"]
    assert [one["system"] for one in shipped] == ["crosspool", "swap"] and "series" not in shipped[0]
    assert soak.table(soak.shipped(tmp_path / "shipped.json")) == done.stdout.partition("\nrecords:")[0]


def test_a_failed_judgement_is_told_and_the_command_fails(tmp_path, monkeypatch, capsys):
    judgements = [asdict(one) for one in judge(COUNTS, STEADY, {"cpu:0 a": 3}, NOTHING)]

    def leaking(name, total, in_flight):
        return {
            "system": name, "counts": COUNTS, "judgements": judgements, "passed": False, "took_s": 1.0, "series": STEADY
        }  # fmt: skip

    monkeypatch.setattr(soak, "soak", leaking)
    assert soak.main(["--systems", "static", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "FAILED: static: KV pages: cpu:0 a: 3" in printed and "+0.00%  FAILED" in printed
    assert json.loads((tmp_path / "static.json").read_text())["passed"] is False


def test_what_is_shipped_is_readable_and_passed():
    records = soak.shipped(soak.SHIPPED)
    assert {record["system"] for record in records} <= set(soak.systems())
    for record in records:
        assert record["passed"] and record["counts"]["sent"] >= 10_000
        assert record["provenance"]["git"]["revision"] and not record["provenance"]["git"]["dirty"]


def test_a_wrong_system_or_number_is_one_line(tmp_path, capsys):
    for arguments, said in ((("--systems", "nosuch"), "unknown system 'nosuch'"), (("--requests", "0"), "at least 1")):
        assert soak.main([*arguments, "--out", str(tmp_path)]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and said in printed and printed.count("\n") == 1
