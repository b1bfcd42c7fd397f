"""`bench.py` as people use it: presets compose, a run leaves its record and its W&B mirror, bad input is one line."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from runner.config import bench_from_dict
from runner.records import read_record, read_records
from serving.registry import create
from workloads.config import workload_from_dict

pytestmark = pytest.mark.cpu

REPOSITORY = Path(__file__).resolve().parents[2]
PRESETS = sorted(path.stem for path in (REPOSITORY / "conf" / "conf").glob("*.yaml"))
GROUPS = [
    f"{group}={path.stem}"
    for group in ("system", "model", "cluster", "workload", "backend", "tracking")
    for path in sorted((REPOSITORY / "conf" / group).glob("*.yaml"))
]
QUICK = [
    "workload.duration_s=1",
    "workload.arrivals.rate_rps=4",
    "workload.lengths.prompt_max=20",
    "workload.lengths.output_min=2",
    "workload.lengths.output_max=5",
]


def compose(*overrides):
    with hydra.initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose("bench", list(overrides)), resolve=True)


def environment(tmp_path):
    return {
        **os.environ,
        "CROSSPOOL_CHECKPOINTS": str(tmp_path / "checkpoints"),
        "WANDB_SILENT": "true",
        "WANDB_DIR": str(tmp_path),
    }


def bench(tmp_path, *arguments):
    command = [sys.executable, "bench.py", *arguments, f"results_dir={tmp_path}/results"]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment(tmp_path), capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.parametrize("overrides", [[f"conf={name}"] for name in PRESETS] + [[group] for group in GROUPS], ids=str)
def test_every_preset_and_group_composes_into_a_valid_run(overrides):
    config = bench_from_dict(compose(*overrides))
    workload_from_dict(config.workload)
    create(config.system.name, config.system.options)


def test_the_command_line_beats_a_preset_which_beats_the_groups():
    assert compose()["workload"]["popularity"]["alpha"] == 0.0
    assert compose("conf=skew0.9")["workload"]["popularity"]["alpha"] == 0.9
    assert compose("conf=skew0.9", "workload.popularity.alpha=0.3")["workload"]["popularity"]["alpha"] == 0.3


def test_every_preset_says_how_to_run_it():
    for name in PRESETS:
        assert f"conf={name}" in (REPOSITORY / "conf" / "conf" / f"{name}.yaml").read_text().split("\nexperiment")[0]


def test_a_sweep_records_mirrors_and_resumes(tmp_path):
    first = bench(tmp_path, "-m", "system=crosspool,static", *QUICK)
    assert first.returncode == 0, first.stderr
    assert "2 of 2 cells done, 0 failed" in first.stdout
    found, skipped = read_records(tmp_path / "results")
    assert sorted(r.content["system"] for r in found) == ["crosspool", "static"] and not skipped
    assert len({r.content["trace"]["digest"] for r in found}) == 1
    for record in found:
        content = record.content
        assert content["status"] == "complete" and content["metrics"]["completed"] == content["metrics"]["num_requests"]
        assert content["provenance"]["packages"]["torch"] and content["seeds"] and content["placement"]
        assert_mirrored_in_wandb(record)
    second = bench(tmp_path, "-m", "system=crosspool,static", *QUICK)
    assert second.returncode == 0 and second.stdout.count("done already") == 2
    assert [read_record(r.path).content["ended_at"] for r in found] == [r.content["ended_at"] for r in found]


def wandb_entries(data):
    """Entries of a `.wandb` file: after 7 bytes of file header, LevelDB's log format (32 KiB blocks of chunks, each with
    4 bytes of checksum, 2 of length, 1 of kind: whole, first, middle, last)."""
    position, parts = 7, []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def assert_mirrored_in_wandb(record):
    """Read the offline run back from its own file and find the record's numbers in it."""
    from wandb.proto import wandb_internal_pb2

    summaries = {}
    for path in record.path.parent.glob("wandb/offline-run-*/*.wandb"):
        summary, name = {}, ""
        for data in wandb_entries(path.read_bytes()):
            entry = wandb_internal_pb2.Record()
            entry.ParseFromString(data)
            name = entry.run.display_name or name
            summary |= {item.key: json.loads(item.value_json) for item in entry.summary.update}
        summaries[name] = summary
    mirrored = summaries[record.content["run_id"]]
    for key in ("completed", "p99_itl_ms", "median_ttft_ms", "output_throughput"):
        assert mirrored[key] == pytest.approx(record.metrics[key]), key


ERRORS = {
    "unknown preset": (["conf=nothing"], "Could not find 'conf/nothing'"),
    "unknown system": (["system=magic"], "Could not find 'system/magic'"),
    "unknown key": (["speed=1"], "Could not override 'speed'"),
    "zero rate": (["workload.arrivals.rate_rps=0"], "workload.arrivals.rate_rps is 0"),
    "negative slo": (["slo.ttft_ms=-1"], "slo.ttft_ms is -1"),
    "no such checkpoint": (["models=[{name: m, checkpoint: /nowhere}]"], "/nowhere/config.json: no such file"),
    "does not fit": (["devices.0.memory_mib=1"], "bytes"),
    "bad option": (["system.options.lanes=0"], "option lanes is 0"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_one_clear_line(case, tmp_path):
    arguments, words = ERRORS[case]
    done = bench(tmp_path, *arguments, "tracking=disabled")
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2
    assert words in lines[-1] and lines[-1].startswith("error: ") and "Traceback" not in done.stderr


def test_a_failing_cell_does_not_end_the_sweep(tmp_path):
    done = bench(tmp_path, "-m", "system=crosspool", "devices.0.memory_mib=1,64", "tracking=disabled", *QUICK)
    assert done.returncode == 2
    assert "1 of 2 cells done, 1 failed" in done.stdout
    found, _ = read_records(tmp_path / "results")
    assert sorted(record.status for record in found) == ["complete", "failed"]


def test_an_interrupt_keeps_what_was_seen_and_leaves_no_process(tmp_path):
    command = [
        sys.executable,
        "bench.py",
        f"results_dir={tmp_path}/results",
        "tracking=disabled",
        "workload.duration_s=600",
    ]
    run = subprocess.Popen(command, cwd=REPOSITORY, env=environment(tmp_path), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not _serving(run.pid):
        time.sleep(0.2)
    time.sleep(4)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130 and "interrupted" in errors and "Traceback" not in errors
    (record,), _ = read_records(tmp_path / "results")
    assert record.status == "interrupted"
    assert not _serving(None, since=str(tmp_path))


def _serving(pid, since=""):
    """Worker processes of `pid`, or any whose environment names `since`."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline", "ppid"]):
        if "serving.workers" in (process.info["cmdline"] or []):
            try:
                ours = (
                    process.info["ppid"] == pid if pid else since in process.environ().get("CROSSPOOL_CHECKPOINTS", "")
                )
            except psutil.Error:
                continue
            if ours:
                found.append(process)
    return found


def test_help_shows_what_can_be_set():
    done = subprocess.run(
        [sys.executable, "bench.py", "--help"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0
    for words in ("conf=skew0.9", "system: ", "skew2.1", "rate_rps", "ttft_ms"):
        assert words in done.stdout
