"""The artifact's command: what it plans, what it skips and why, and what its table and status say."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path

import pytest

from runner import artifact
from runner.experiment import Experiment
from runner.experiments import EXPERIMENTS, of_mode

pytestmark = pytest.mark.cpu

SMOKE = EXPERIMENTS[0]
BIG = artifact.Machine(cores=2, memory_gib=64, disk_gib=100, gpus=())


def changed(**fields) -> Experiment:
    return dataclasses.replace(SMOKE, **fields)


@pytest.mark.parametrize(
    ("experiment", "machine", "why"),
    [
        (SMOKE, BIG, ""),
        (changed(gpus=1), BIG, "needs 1 NVIDIA GPU, 0 are there"),
        (changed(gpus=1), dataclasses.replace(BIG, gpus=(artifact.GPU("small", 40),)), ""),
        (
            changed(gpus=2, gpu_gib=80),
            dataclasses.replace(BIG, gpus=(artifact.GPU("small", 40), artifact.GPU("large", 140))),
            "needs 2 NVIDIA GPUs of 80 GiB, 1 are there",
        ),
        (changed(memory_gib=65), BIG, "needs 65 GiB of memory, 64.0 are there"),
        (changed(disk_gib=101), BIG, "needs 101 GiB of disk, 100.0 are free"),
        (changed(systems=("crosspool", "no-such")), BIG, ""),
        (changed(systems=("no-such",)), BIG, "no system no-such"),
    ],
)
def test_what_a_machine_cannot_run_is_skipped_with_the_reason(experiment, machine, why):
    assert artifact.why_skipped(experiment, machine) == why


def test_a_mode_holds_what_the_smaller_one_does():
    names = {mode: [experiment.name for experiment in of_mode(mode)] for mode in ("smoke", "fast", "full")}
    assert set(names["smoke"]) < set(names["fast"]) < set(names["full"])
    assert SMOKE.present[:2] == ("crosspool", "static") and not set(SMOKE.present) & set(SMOKE.absent)
    assert sum(experiment.minutes("smoke") for experiment in of_mode("smoke")) <= 6
    assert sum(experiment.minutes("fast") for experiment in of_mode("fast")) <= 18


def test_fast_has_room_for_every_system_that_its_experiments_name():
    """A baseline that arrives must not push the mode beyond what it promises."""
    whole = 0.0
    for experiment in of_mode("fast"):
        named = experiment.sweeps["fast"].get("system", experiment.systems)
        share = 1 if experiment.studies else len(named) / len(experiment.run_by("fast"))
        whole += experiment.minutes("fast") * share
    assert whole <= 18


class Commands:
    """Stands for the commands that the artifact calls; `failing` is a word of the one that fails."""

    def __init__(self, failing: str = "", different: tuple[str, ...] = ()) -> None:
        self.failing, self.different, self.called = failing, different, []

    def run(self, command, _directory):
        self.called.append(command)
        if "paper_figures.claims" in command:
            report = Path(command[command.index("--json") + 1])
            report.parent.mkdir(parents=True, exist_ok=True)
            names = ", ".join(
                f'{{"name": "claim-of-{name}", "verdict": "different", "experiment": "{name}"}}'
                for name in self.different
            )
            report.write_text(f"[{names}]")
        failed = any(self.failing in word for word in command) if self.failing else False
        return 2 if failed else 0


@pytest.fixture
def ran(monkeypatch, tmp_path):
    def mode(*arguments: str, **kwargs) -> tuple[int, Commands]:
        commands = Commands(**kwargs)
        monkeypatch.setattr(artifact, "LOCAL", tmp_path)
        monkeypatch.setattr(artifact, "run_child", commands.run)
        monkeypatch.setattr(artifact.Machine, "here", classmethod(lambda cls: BIG))
        return artifact.main(arguments), commands

    return mode


def test_a_failed_experiment_does_not_stop_the_others_and_makes_the_status_nonzero(ran, capsys):
    status, commands = ran("fast", failing="experiment=rate")
    out = capsys.readouterr().out
    assert status == 1
    ran_at_all = sum("bench.py" in command or "runner.study" in command for command in commands.called)
    assert ran_at_all == sum(len(experiment.studies) or 1 for experiment in of_mode("fast"))
    assert "FAILED (bench.py ended with status 2" in out
    assert f"{len(of_mode('fast'))} of {len(of_mode('fast')) + 1} passed, 1 failed" in out


def test_different_is_said_and_is_no_failure(ran, capsys):
    status, _ = ran("smoke", different=("smoke",))
    assert status == 0
    assert "DIFFERENT (not as in the paper: claim-of-smoke)" in capsys.readouterr().out


def test_exhibits_that_one_short_cell_cannot_fill_are_no_failure(ran, capsys, monkeypatch):
    assert ran("smoke", failing="paper_figures")[0] == 1
    monkeypatch.setenv("CROSSPOOL_SHORT", "1")
    capsys.readouterr()
    ran("smoke", failing="--experiment")
    assert "PASS (one short cell; exhibits that need more are not drawn)" in capsys.readouterr().out


def test_what_a_machine_cannot_run_at_all_is_one_clear_line(ran, capsys, monkeypatch):
    lacking = dataclasses.replace(
        BIG, findings=(artifact.doctor.Finding("torch", artifact.doctor.MISSING, "not installed"),)
    )
    ran("smoke", "--plan")  # sets the others up
    monkeypatch.setattr(artifact.Machine, "here", classmethod(lambda cls: lacking))
    capsys.readouterr()
    assert artifact.main(["smoke"]) == 2
    assert capsys.readouterr().err == "error: this machine cannot run the CPU backend: torch: not installed\n"


def test_the_machine_is_looked_at_by_a_process_that_ends():
    machine = artifact.Machine.here()
    assert machine.cores >= 1 and machine.memory_gib > 0
    assert {"python", "torch", "cores"} <= {finding.what for finding in machine.findings}


def test_claims_expect_what_ran(ran):
    _, commands = ran("smoke")
    claims = next(command for command in commands.called if "paper_figures.claims" in command)
    assert claims[-2:] == ["--expect", "smoke"]


def test_named_experiments_are_all_that_runs(ran, capsys):
    status, commands = ran("fast", "skew", "rate")
    assert status == 0
    measured = [word for command in commands.called if "bench.py" in command for word in command]
    assert [word for word in measured if word.startswith("experiment=")] == ["experiment=rate", "experiment=skew"]
    claims = next(command for command in commands.called if "paper_figures.claims" in command)
    assert claims[-4:] == ["--expect", "rate", "--expect", "skew"]
    capsys.readouterr()
    status, commands = ran("fast", "skew", "--plan")
    planned = capsys.readouterr().out
    assert status == 0 and not commands.called
    assert "  skew " in planned and "  rate " not in planned


def test_an_experiment_that_the_mode_has_not_is_one_clear_line(ran, capsys):
    status, commands = ran("smoke", "gpu-one")
    assert status == 2 and not commands.called
    assert capsys.readouterr().err == "error: mode smoke has no experiment 'gpu-one'; it has smoke\n"


def test_figures_without_records_is_one_clear_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(artifact, "LOCAL", tmp_path / "a")
    monkeypatch.setattr(artifact, "SHIPPED", tmp_path / "b")
    assert artifact.main(["figures"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no records in ")
    assert error.count("\n") == 1


def test_a_results_directory_that_cannot_be_written_is_one_clear_line(ran, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    status, commands = ran("smoke")
    assert status == 2
    assert not commands.called
    assert "cannot be written: Read-only file system" in capsys.readouterr().err
