"""`bench.py` as people use it: presets compose, a run leaves its record and its W&B mirror, bad input is one line."""

import base64
import hashlib
import json
import os
import runpy
import shlex
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import runner.publish
import runner.run
from runner.config import bench_from_dict
from runner.records import read_record, read_records
from runner.run import execute
from serving.errors import UserError
from serving.registry import create
from workloads.config import workload_from_dict

pytestmark = pytest.mark.cpu

REPOSITORY = Path(__file__).resolve().parents[2]
PRESETS = sorted(path.stem for path in (REPOSITORY / "conf" / "conf").glob("*.yaml"))
GROUPS = [
    f"{group}={path.stem}"
    for group in ("system", "model", "cluster", "workload", "backend", "tune", "tracking")
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


@pytest.fixture(scope="module", autouse=True)
def checkpoints(tmp_path_factory):
    """Made once for all runs of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CROSSPOOL_CHECKPOINTS", str(tmp_path_factory.mktemp("checkpoints")))
        patch.delenv("WANDB_MODE", raising=False)
        yield


def environment(tmp_path):
    return {
        **os.environ,
        "WANDB_SILENT": "true",
        "WANDB_DIR": str(tmp_path),
        "TMPDIR": str(tmp_path),  # where cores are locked: a test does not wait for somebody's long run
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


def test_the_real_backend_refuses_models_without_weights(tmp_path):
    config = compose("model=paper", f"results_dir={tmp_path}")
    with pytest.raises(UserError, match="model Qwen3-30B-A3B: only its published configuration is here"):
        execute(bench_from_dict(config))


def test_a_sweep_records_mirrors_and_resumes(tmp_path, bench_here):
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
    status, printed = bench_here("-m", "system=crosspool,static", *QUICK, f"results_dir={tmp_path}/results")
    assert status == 0 and printed.out.count("done already") == 2
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

    mirrored = {}
    for path in record.path.parent.glob("wandb/offline-run-*/*.wandb"):
        seen = {"summary": {}, "config": {}, "pages": [], "machine": [], "artifacts": [], "copies": []}
        for data in wandb_entries(path.read_bytes()):
            entry = wandb_internal_pb2.Record()
            entry.ParseFromString(data)
            if entry.run.display_name:
                mirrored[entry.run.display_name] = seen
                seen["group"], seen["job"] = entry.run.run_group, entry.run.job_type
                seen["config"] |= {item.key: json.loads(item.value_json) for item in entry.run.config.update}
            seen["summary"] |= {item.key: json.loads(item.value_json) for item in entry.summary.update}
            keys = ["/".join(item.nested_key) or item.key for item in entry.history.item]
            seen["pages"] += [key for key in keys if key.startswith("kv_pages/")]
            seen["machine"] += [key for key in keys if key.startswith("machine/core")]
            for artifact in (entry.request.log_artifact.artifact, entry.artifact):
                seen["artifacts"] += [file.path for file in artifact.manifest.contents]
                seen["copies"] += list(artifact.manifest.contents)
    run = mirrored[record.content["run_id"]]
    for key in ("completed", "p99_itl_ms", "median_ttft_ms", "output_throughput"):
        assert run["summary"][key] == pytest.approx(record.metrics[key]), key
    assert (run["group"], run["job"]) == (record.content["experiment"], record.content["system"])
    assert run["config"]["workload"] == record.content["config"]["workload"]
    assert run["pages"], "no pages over time"
    assert record.content["backend"] == "sim" or run["machine"], "no load of the machine over time"
    assert_sync_has_all_it_wants(record.path.parent, run["copies"])
    assert {"record.json", "requests.parquet", "series.parquet"} <= set(run["artifacts"])


def test_figures_go_to_wandb_as_an_artifact_of_the_experiment(tmp_path, capsys):
    import wandb
    from matplotlib.figure import Figure

    folder = tmp_path / "made-up"
    folder.mkdir()
    Figure().savefig(folder / "tbt_cdf.png")
    (folder / "tbt_cdf.csv").write_text("system,latency_ms\n")
    assert runner.publish.main([str(folder)]) == 0
    wandb.teardown()  # as at the end of the command: what its service writes is on disk afterwards
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    seen = {"group": "", "job": "", "artifacts": {}, "images": []}
    for data in wandb_entries(path.read_bytes()):
        from wandb.proto import wandb_internal_pb2

        entry = wandb_internal_pb2.Record()
        entry.ParseFromString(data)
        seen["group"], seen["job"] = entry.run.run_group or seen["group"], entry.run.job_type or seen["job"]
        seen["images"] += ["/".join(item.nested_key) or item.key for item in entry.history.item]
        if entry.artifact.type == "figures":
            seen["artifacts"] = {file.path: file for file in entry.artifact.manifest.contents}
    assert (seen["group"], seen["job"]) == ("made-up", "figures")
    assert set(seen["artifacts"]) == {"tbt_cdf.png", "tbt_cdf.csv"} and "figures/tbt_cdf/sha256" in seen["images"]
    assert_sync_has_all_it_wants(folder, seen["artifacts"].values())
    assert runner.publish.main([str(tmp_path / "none")]) == 2
    assert "holds no figures" in capsys.readouterr().err


def assert_sync_has_all_it_wants(folder, copies):
    """`wandb sync` uploads the `.wandb` file, the run's `files/` and what its artifacts' manifests name, by MD5."""
    for copy in copies:
        data = Path(copy.local_path).read_bytes()
        assert Path(copy.local_path).is_relative_to(folder), "a copy lies outside the results"
        assert base64.b64encode(hashlib.md5(data).digest()).decode() == copy.digest, copy.path
    done = subprocess.run(
        [str(Path(sys.executable).with_name("wandb")), "sync", "--dry-run", *map(str, folder.glob("wandb/offline-run-*"))],
        env={**os.environ, "WANDB_API_KEY": "a" * 40}, cwd=folder, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for path in folder.glob("wandb/offline-run-*/*.wandb"):
        assert path.parent.name in done.stderr + done.stdout


@pytest.fixture
def bench_here(tmp_path, monkeypatch, capsys):
    """`bench.py` in this process, for what ends before anything is served: its status, and what it printed."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(REPOSITORY / "bench.py"), run_name="__main__")
        return ended.value.code or 0, capsys.readouterr()

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)
    GlobalHydra.instance().clear()


TOO_SMALL = ["devices.0.memory_mib=1", "devices.1.memory_mib=1", "model=four-tiny"]
ERRORS = {
    "unknown preset": (["conf=skew0.8"], "unknown conf 'skew0.8' (did you mean 'skew0.9'?); known: ablation"),
    "unknown system": (["system=magic"], "unknown system 'magic'; known: crosspool, "),
    "unknown system in a sweep": (["-m", "system=crosspool,magic"], "unknown system 'magic'"),
    "unknown key": (["speed=1"], "unknown key 'speed'; known in the configuration: system, models,"),
    "unknown nested key": (["workload.arrivals.rat=1"], "known in workload.arrivals: kind, rate_rps"),
    "unknown option of a system": (["system=static", "system.options.lanes=2"], "known in system.options: "),
    "no such device": (["devices.4.index=1"], "devices has 2 entries, numbered from 0"),
    "part of a value": (["slo.ttft_ms.p99=1"], "slo.ttft_ms is one value and has no parts"),
    "no value": (["workload.rate"], "missing EQUAL"),
    "no group": (["workload=null"], "must be a string or a list"),
    "zero rate": (["workload.arrivals.rate_rps=0"], "workload.arrivals.rate_rps is 0"),
    "zero rate, short": (["workload.rate=0"], "workload.arrivals.rate_rps is 0"),
    "negative slo": (["slo.ttft_ms=-1"], "slo.ttft_ms is -1"),
    "no such checkpoint": (["models=[{name: m, checkpoint: /nowhere}]"], "/nowhere/config.json: no such file"),
    "unknown architecture": (
        ["models=[{name: m, make: {arch: gpt, size: tiny}}]"],
        "unknown architecture 'gpt'; known: ",
    ),
    "unknown size": (["models=[{name: m, make: {arch: mixtral, size: big}}]"], "unknown size 'big'; known: tiny"),
    "does not fit": (["devices.0.memory_mib=1"], "bytes"),
    "bad option": (["system.options.lanes=0"], "option lanes is 0"),
    "quotas beyond the pool": (
        ["system=quota", "+system.options.quotas={mixtral-tiny: 0.7, qwen3-moe-tiny: 0.6}"],
        "shares of the pool are above 0 and sum to at most 1, these to 1.3",
    ),
    "a negative interval": (
        ["system=quota", "system.options.adapt_every_s=-1"],
        "adapt_every_s is -1; it must be 0 or",
    ),
    "a host cache below the largest model": (
        ["system=swap", "system.options.host_cache_bytes=1000"],
        "the host cache of 1000 B cannot hold mixtral-tiny",
    ),
    "a link of no bandwidth": (["system=swap-token", "system.options.link_gbps=0"], "link_gbps is 0: no weights"),
    "a negative idle time": (["system=swap", "system.options.keep_alive_s=-1"], "keep_alive_s is -1; it must be 0 or"),
    "an idle time that is none": (["system=swap", "system.options.keep_alive_s=soon"], "'soon'; it must be a number"),
    "a negative wait": (["system=elastic", "system.options.queue_deadline_s=-1"], "queue_deadline_s is -1; it must be"),
    "an unknown rule": (["system=elastic-placement", "system.options.admission=all"], "known: optimistic, cap"),
    "larger than a device": (["system=static", *TOO_SMALL], "cpu:0: "),
    "larger than all devices": (["system=static-searched", *TOO_SMALL], "infeasible: "),
    "larger than a shared device": (["system=elastic", *TOO_SMALL], "cpu:0: weights and workspaces of "),
    "larger than a placed device": (["system=elastic-placement", *TOO_SMALL], "no device has room for mixtral-tiny"),
    "larger than an engine's device": (["system=quota", *TOO_SMALL], "cpu:0: weights and workspace"),
    "larger than any device": (["system=swap", *TOO_SMALL], "cpu:0: mixtral-tiny needs "),
    "not this hardware": (["devices.0.kind=cuda", "devices.0.index=99"], "cpu:0: is card 99, and torch sees "),
    "unknown card": (["backend=sim", "backend.card=b200"], "unknown hardware 'b200'; known: "),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_one_clear_line(case, tmp_path, bench_here):
    arguments, words = ERRORS[case]
    status, printed = bench_here(*arguments, "tracking=disabled", f"results_dir={tmp_path}/results")
    assert status == 2
    *before, line = printed.err.strip().splitlines()
    assert words in line and line.startswith("error: ") and "Traceback" not in printed.err
    assert not [word for word in before if "error" in word]  # checkpoints may be made before, with a progress bar


def test_a_place_for_records_that_cannot_be_written_is_said_before_the_run(tmp_path, bench_here):
    (tmp_path / "file").write_text("")
    status, printed = bench_here("tracking=disabled", f"results_dir={tmp_path}/file/results")
    assert status == 2 and "cannot be written" in printed.err and len(printed.err.splitlines()) == 1


def test_a_bug_costs_its_own_cell_and_is_recorded(tmp_path, bench_here, monkeypatch):
    real = runner.run.build_trace
    monkeypatch.setattr(runner.run, "build_trace", lambda w, m: real(w, m) if w.duration_s == 1 else 1 / 0)
    quick = [word for word in QUICK if "duration" not in word]
    arguments = [
        "workload.duration_s=2,1",
        "backend=sim",
        *quick,
        "tracking=disabled",
        f"results_dir={tmp_path}/results",
    ]
    status, printed = bench_here(*arguments, "-m")
    assert status == 2 and "1 of 2 cells done, 1 failed" in printed.out
    assert "error: workload.duration_s=2: ZeroDivisionError: division by zero (a bug; see above)" in printed.err
    found, _ = read_records(tmp_path / "results")
    assert sorted((r.status, r.content["error"]) for r in found) == [
        ("complete", ""),
        ("failed", "ZeroDivisionError: division by zero"),
    ]


def test_the_command_of_a_record_runs_that_cell_again(tmp_path, bench_here):
    common = ["backend=sim", *QUICK, "tracking=disabled", f"results_dir={tmp_path}/results"]
    assert bench_here("-m", "conf=skew0.9", "system=crosspool,static", *common)[0] == 0
    found, _ = read_records(tmp_path / "results")
    for record in found:
        python, script, *arguments = shlex.split(record.content["command"])
        assert (python, script) == ("python", "bench.py") and "-m" not in arguments
        status, printed = bench_here(*arguments)
        assert status == 0 and f"done already {record.path}" in printed.out


def test_a_run_without_requests_says_that_nothing_was_measured(tmp_path, bench_here):
    common = ["backend=sim", *QUICK, "tracking=disabled", f"results_dir={tmp_path}/results"]
    status, printed = bench_here(*common, "workload.rate=0.001")
    assert status == 0 and "no request arrived, so nothing was measured" in printed.err
    status, printed = bench_here(*common)
    assert status == 0 and "nothing was measured" not in printed.err


def test_a_run_whose_wandb_dies_is_done_and_says_so(tmp_path, bench_here, monkeypatch):
    import wandb

    def dies(**_):
        raise RuntimeError("the service is gone")

    monkeypatch.setattr(wandb, "init", dies)
    status, printed = bench_here("backend=sim", *QUICK, "tracking=offline", f"results_dir={tmp_path}/results")
    assert status == 2 and "W&B (offline): the service is gone; the record is kept" in printed.err
    (record,), _ = read_records(tmp_path / "results")
    assert record.status == "complete" and "Traceback" not in printed.err


def test_a_run_that_wandb_refuses_is_done_and_says_so(tmp_path, bench_here, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "wrong")
    status, printed = bench_here("backend=sim", *QUICK, "tracking=online", f"results_dir={tmp_path}/results")
    assert (
        status == 2
        and "error: default crosspool: W&B (online): " in printed.err
        and "the record is kept" in printed.err
    )
    (record,), _ = read_records(tmp_path / "results")
    assert record.status == "complete" and str(record.path) in printed.out


@pytest.mark.parametrize("ends", [KeyboardInterrupt, UserError("a made-up failure")], ids=["interrupt", "failure"])
def test_a_forced_run_that_does_not_finish_leaves_the_complete_record(ends, tmp_path, bench_here, monkeypatch):
    arguments = ["backend=sim", *QUICK, "tracking=disabled", f"results_dir={tmp_path}/results"]
    assert bench_here(*arguments)[0] == 0
    (before,), _ = read_records(tmp_path / "results")

    def end(_):
        raise ends

    monkeypatch.setattr(runner.run, "_observe", end)
    status, printed = bench_here(*arguments, "force=true")
    assert status == (130 if ends is KeyboardInterrupt else 2)
    (after,), skipped = read_records(tmp_path / "results")
    assert after.content == before.content and not skipped
    assert ends is KeyboardInterrupt or "a made-up failure" in printed.err


def test_more_devices_than_cores_compute_only_when_asked_and_the_record_says_so(tmp_path, bench_here):
    cores = len(os.sched_getaffinity(0))
    devices = ",".join(f"{{name: 'cpu:{i}', kind: cpu, index: {i}, memory_mib: 64}}" for i in range(cores + 1))
    arguments = [
        f"devices=[{devices}]",
        "system=static",
        *QUICK,
        "tracking=disabled",
        f"results_dir={tmp_path}/results",
    ]
    status, printed = bench_here(*arguments)
    assert status == 2 and "backend.oversubscribe=true lets devices share cores" in printed.err
    assert bench_here(*arguments, "backend.oversubscribe=true")[0] == 0
    found, _ = read_records(tmp_path / "results")
    (record,) = [record for record in found if record.status == "complete"]
    assert record.content["oversubscribed"] and f"sharing {cores} cores" in record.content["hardware"]


def test_two_sweeps_at_once_share_the_work_and_spoil_nothing(tmp_path):
    command = [sys.executable, "bench.py", "-m", "system=crosspool,static", "backend=sim", *QUICK, "tracking=disabled"]
    command += [f"results_dir={tmp_path}/results"]
    sweeps = [
        subprocess.Popen(
            [*command, *launcher], cwd=REPOSITORY, env=environment(tmp_path), stdout=subprocess.PIPE, text=True
        )
        for launcher in ([], ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"])
    ]
    printed = [sweep.communicate(timeout=240)[0] for sweep in sweeps]
    assert [sweep.returncode for sweep in sweeps] == [0, 0], printed
    assert all("2 of 2 cells done, 0 failed" in text for text in printed)
    assert sum(text.count("done already") for text in printed) == 2
    found, skipped = read_records(tmp_path / "results")
    assert [record.status for record in found] == ["complete"] * 2 and not skipped


def test_a_failing_cell_does_not_end_the_sweep(tmp_path, bench_here):
    arguments = [
        "devices.0.memory_mib=1,64",
        "backend=sim",
        "tracking=disabled",
        f"results_dir={tmp_path}/results",
        *QUICK,
    ]
    status, printed = bench_here("-m", *arguments)
    assert status == 2
    assert "1 of 2 cells done, 1 failed" in printed.out and "error: devices.0.memory_mib=1: " in printed.err
    found, _ = read_records(tmp_path / "results")
    assert sorted(record.status for record in found) == ["complete", "failed"]


@pytest.mark.alone
@pytest.mark.parametrize("moment", ["interrupted while starting", "terminated while serving"])
def test_an_interrupt_keeps_what_was_seen_and_leaves_no_process(moment, tmp_path):
    command = [
        sys.executable,
        "bench.py",
        f"results_dir={tmp_path}/results",
        "tracking=disabled",
        "workload.duration_s=600",
    ]
    run = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment(tmp_path),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_take_interrupts,  # noqa: PLW1509  one call, before exec
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not _serving(run.pid):
        time.sleep(0.05)
    if moment == "terminated while serving":
        time.sleep(4)
        run.terminate()
    else:
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does it: to the workers too
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130 and "interrupted" in errors and "Traceback" not in errors
    (record,), _ = read_records(tmp_path / "results")
    assert (record.status, record.content["error"]) == ("interrupted", "interrupted")
    assert {row["outcome"] for row in record.requests().to_pylist()} <= {"completed", "failed"}
    assert not _serving(None, since=str(tmp_path))


def _take_interrupts():
    """As a terminal's job has it: a suite that runs in the background was started with interrupts ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _serving(pid, since=""):
    """Worker processes of `pid`, or any whose environment names `since`."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline", "ppid"]):
        if "serving.workers" in (process.info["cmdline"] or []):
            try:
                ours = process.info["ppid"] == pid if pid else since in process.environ().get("WANDB_DIR", "")
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


@pytest.mark.parametrize("words", [["conf=soak", "--cfg", "job"], ["--cfg", "job", "conf=soak"]])
def test_the_composed_configuration_can_be_looked_at(words, bench_here):
    code, said = bench_here(*words)
    assert code == 0
    assert "experiment: soak" in said.out
