"""`./run_all.sh smoke|fast|full [experiments]`, and `figures [names]`: the artifact, from preflight to the table at the end.

Experiments run through `bench.py`, which skips what is done; figures and claims are drawn from the records it leaves. A
failed experiment does not stop the others. The status is non-zero when anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from runner import ship, tracking
from runner.children import run_child
from runner.config import TRACKING_MODES, Tracking
from runner.experiment import Experiment
from runner.experiments import MODES, of_mode
from runner.machine import cards_here
from runner.short import is_short
from serving import doctor
from serving.errors import UserError, command

ROOT = Path(__file__).resolve().parents[1]
LOCAL, SHIPPED = ROOT / "results" / "local", ROOT / "results" / "shipped"
GPU_STUDIES = ROOT / "results" / "h200"  # kernels, measured once on a GPU
PASS, DIFFERENT, SKIPPED, FAILED = "PASS", "DIFFERENT", "SKIPPED", "FAILED"


@dataclass(frozen=True)
class Line:
    """One line of the table at the end. `note` says why, where it did not pass."""

    name: str
    verdict: str
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class GPU:
    """One of the machine's."""

    name: str
    memory_gib: float


@dataclass(frozen=True)
class Machine:
    """What the preflight looks at."""

    cores: int
    memory_gib: float
    disk_gib: float
    gpus: tuple[GPU, ...]
    findings: tuple[doctor.Finding, ...] = ()

    @classmethod
    def here(cls) -> Machine:
        memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        disk = shutil.disk_usage(ROOT).free / 2**30
        # In a process that ends: whoever has looked at a card keeps some of its memory, or all of it where cards are exclusive.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
            findings, cards = apart.submit(doctor.examine), apart.submit(cards_here)
            gpus = tuple(GPU(card.name, card.memory_mib / 1024) for card in cards.result())
            return cls(len(os.sched_getaffinity(0)), memory_bytes / 2**30, disk, gpus, tuple(findings.result()))


def why_skipped(experiment: Experiment, machine: Machine) -> str:
    """Why `machine` cannot run `experiment`; empty where it can."""
    if not experiment.present:
        return f"no system {', '.join(experiment.absent)}"
    large = [gpu for gpu in machine.gpus if gpu.memory_gib >= experiment.gpu_gib]
    if len(large) < experiment.gpus:
        size = f" of {experiment.gpu_gib:g} GiB" if experiment.gpu_gib else ""
        return f"needs {experiment.gpus} NVIDIA GPU{'s' if experiment.gpus > 1 else ''}{size}, {len(large)} are there"
    if experiment.memory_gib > machine.memory_gib:
        return f"needs {experiment.memory_gib:g} GiB of memory, {machine.memory_gib:.1f} are there"
    if experiment.disk_gib > machine.disk_gib:
        return f"needs {experiment.disk_gib:g} GiB of disk, {machine.disk_gib:.1f} are free"
    return ""


def chosen(mode: str, names: Sequence[str] = ()) -> list[Experiment]:
    """The experiments to run in `mode`: all of it, or those of `names`. Raises UserError for a name that it does not have."""
    experiments = of_mode(mode)
    known = [experiment.name for experiment in experiments]
    for name in names:
        if name not in known:
            raise UserError(f"mode {mode} has no experiment {name!r}; it has {', '.join(known)}")
    wanted = [experiment for experiment in experiments if not names or experiment.name in names]
    return wanted[:1] if is_short() else wanted


def preflight(mode: str, experiments: Sequence[Experiment], machine: Machine) -> None:
    """Say what there is, what of `experiments` will run and for how long, and what will not. Raises UserError where nothing can."""
    gpus = ", ".join(gpu.name for gpu in machine.gpus) or "none"
    print(
        f"Machine: {machine.cores} cores, {machine.memory_gib:.0f} GiB of memory, {machine.disk_gib:.0f} GiB of disk free, "
        f"GPU: {gpus}"
    )
    if machine.disk_gib < 0.5:
        raise UserError(f"{ROOT} has {machine.disk_gib:.2f} GiB of disk free; records and figures need 0.5 GiB")
    _require_writable(LOCAL)
    findings = [finding for finding in machine.findings if finding.verdict != doctor.OK]
    for finding in findings:
        print(f"  {finding.verdict}: {finding.what}: {finding.detail}")
    load = os.getloadavg()[0]
    if load > 0.5 * machine.cores:
        print(
            f"  note: load average {load:.1f}: other processes run here, and slow CrossPool most, which needs every core"
        )
    missing = [f"{finding.what}: {finding.detail}" for finding in findings if finding.verdict == doctor.MISSING]
    if missing:
        raise UserError(f"this machine cannot run the CPU backend: {'; '.join(missing)}")
    total = 0.0
    for experiment in experiments:
        why = why_skipped(experiment, machine)
        minutes = 0.0 if why else experiment.minutes(mode)
        total += minutes
        plan = f"SKIPPED ({why})" if why else f"{experiment.cells(mode):3} runs, about {minutes:4.1f} min"
        without = f" Without {', '.join(experiment.absent)}: not in this version." if experiment.absent else ""
        print(f"  {experiment.name:<16} {plan:<28} {experiment.question}{without}")
    print(f"{mode}: about {total + 0.5:.0f} minutes on two cores at most; runs that are done already take none")


def _require_writable(directory: Path) -> None:
    """Raises UserError unless files can be made in `directory`."""
    probe = directory / f".write-test-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}") from None
    probe.unlink()


def run_experiment(experiment: Experiment, mode: str) -> Line:
    """Run the cells (or make the studies) that are missing, then draw the experiment's exhibits."""
    commands = [["-m", "runner.study", *study] for study in experiment.studies] or [
        ["bench.py", *experiment.arguments(mode)]
    ]
    print(f"\n== {experiment.name}: {experiment.question}")
    begun, status = time.monotonic(), 0
    for arguments in commands:
        print(f"$ {shlex.join(['python', *arguments])}", flush=True)
        ended = run_child(arguments, ROOT)
        if ended in (130, -2):
            raise KeyboardInterrupt
        status = status or ended
    drawn = draw(LOCAL, LOCAL / "figures", experiment.drawn, [experiment.name]) if experiment.drawn else 0
    _publish(experiment.name)
    seconds = time.monotonic() - begun
    if status:
        return Line(
            experiment.name, FAILED, seconds, f"{arguments[0]} ended with status {status}; above it says which run"
        )
    if drawn and is_short():
        return Line(experiment.name, PASS, seconds, "one short cell; exhibits that need more are not drawn")
    if drawn:
        return Line(experiment.name, FAILED, seconds, f"paper_figures ended with status {drawn}")
    return Line(experiment.name, PASS, seconds)


def _publish(name: str) -> None:
    """Log the experiment's figures and tables to W&B as bench.py logs its runs (WANDB_MODE=disabled: not). A refusal is
    told and costs nothing else."""
    exhibits = sorted(path for path in (LOCAL / "figures" / name).glob("[!.]*.*") if path.is_file())
    mode = os.environ.get("WANDB_MODE", "offline")
    try:
        tracking.publish(exhibits, name, Tracking(mode=mode if mode in TRACKING_MODES else "offline"), LOCAL / name)
    except UserError as error:
        print(f"note: {error}", file=sys.stderr)


def draw(records: Path, out: Path, names: Sequence[str], experiments: Sequence[str] = ()) -> int:
    """Draw exhibits by the command that a person would use; its exit status."""
    selected = [argument for name in experiments for argument in ("--experiment", name)]
    roots = ["--records", str(records), "--records", str(GPU_STUDIES)]
    arguments = [*names, *roots, "--out", str(out), *selected, "--print"]
    return run_child(["-m", "paper_figures", *arguments], ROOT)


def claims(records: Path, out: Path, expected: Sequence[str]) -> tuple[int, dict[str, list[str]]]:
    """Print the claims table; its exit status, and the claims that came out different by experiment."""
    report = out / "claims.json"
    flags = [argument for name in expected for argument in ("--expect", name)]
    arguments = ["--records", str(records), "--json", str(report), *flags]
    status = run_child(["-m", "paper_figures.claims", *arguments], ROOT)
    different: dict[str, list[str]] = {}
    if report.exists():
        for claim in json.loads(report.read_text()):
            if claim["verdict"] == "different":
                different.setdefault(claim["experiment"] or "models", []).append(claim["name"])
    return status, different


def table(lines: Sequence[Line]) -> int:
    """Print the table of verdicts; the exit status of the artifact."""
    print("\n" + "=" * 100)
    for line in lines:
        note = f" ({line.note})" if line.note else ""
        print(f"{line.name:<16} {line.seconds:6.0f} s  {line.verdict}{note}")
    failed = sum(line.verdict == FAILED for line in lines)
    print(f"{sum(line.verdict == PASS for line in lines)} of {len(lines)} passed, {failed} failed")
    print(f"Figures, tables and claims: {LOCAL / 'figures'}")
    return 1 if failed else 0


def run_mode(mode: str, experiments: Sequence[Experiment]) -> int:
    """Run `experiments` as `mode` has them, draw, check claims, and say how each came out."""
    machine = Machine.here()
    preflight(mode, experiments, machine)
    lines: list[Line] = []
    interrupted = False
    for experiment in experiments:
        why = why_skipped(experiment, machine)
        if interrupted:
            lines.append(Line(experiment.name, SKIPPED, 0, "interrupted; start again to go on where it stopped"))
        elif why:
            lines.append(Line(experiment.name, SKIPPED, 0, why))
        else:
            try:
                lines.append(run_experiment(experiment, mode))
            except KeyboardInterrupt:
                interrupted = True
                lines.append(Line(experiment.name, SKIPPED, 0, "interrupted; finished runs are kept"))
    if interrupted:
        table(lines)
        return 130
    print("\n== Exhibits that need no run, and claims", flush=True)
    begun = time.monotonic()
    drawn = draw(LOCAL, LOCAL / "figures", ["kv_share", "model_table"])
    expected = [] if is_short() else [line.name for line in lines if line.verdict != SKIPPED]
    status, different = claims(LOCAL, LOCAL / "figures", expected)
    lines = [_compared(line, different.get(line.name, [])) for line in lines]
    if status or drawn:
        lines.append(Line("claims", FAILED, time.monotonic() - begun, "something that should have run did not"))
    else:
        lines.append(_compared(Line("claims", PASS, time.monotonic() - begun), different.get("models", [])))
    return table(lines)


def _compared(line: Line, different: Sequence[str]) -> Line:
    """`line`, DIFFERENT where it ran and a claim that rests on it did not come out as in the paper."""
    if line.verdict != PASS or not different:
        return line
    return Line(line.name, DIFFERENT, line.seconds, f"not as in the paper: {', '.join(different)}")


def run_figures(names: Sequence[str]) -> int:
    """Redraw from the records that ship with the repository and, apart from them, from local ones. Nothing is run."""
    sources = [
        (label, root, out)
        for label, root, out in (
            ("shipped", SHIPPED, LOCAL / "figures-shipped"),
            ("local", LOCAL, LOCAL / "figures"),
        )
        if next(root.glob("*/*/record.json"), None)
    ]
    lines = []
    for label, root, out in sources:
        print(f"\n== Figures from {label} records in {root}", flush=True)
        begun = time.monotonic()
        _, wrong = ship.verify(root) if label == "shipped" else (0, [])
        if wrong:
            lines.append(Line(label, FAILED, time.monotonic() - begun, f"{len(wrong)} problems, first: {wrong[0]}"))
            continue
        status = draw(root, out, names)
        if status and names:
            return status  # a name that is wrong, or nothing to draw it from: said in one line already
        if not status and not names:
            status, _ = claims(root, out, [])
        verdict, note = (FAILED, f"status {status}") if status else (PASS, f"in {out}")
        lines.append(Line(label, verdict, time.monotonic() - begun, note))
    if not sources:
        raise UserError(f"no records in {SHIPPED} or {LOCAL}; make some with: ./run_all.sh smoke")
    return table(lines)


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./run_all.sh", description=__doc__.splitlines()[0])
    parser.add_argument("mode", nargs="?", default="fast", choices=[*MODES, "figures"])
    parser.add_argument("names", nargs="*", help="experiments, or with figures which of them (default: all)")
    parser.add_argument("--plan", action="store_true", help="say what would run and stop")
    arguments = parser.parse_args(argv)
    if arguments.mode == "figures":
        return run_figures(arguments.names)
    experiments = chosen(arguments.mode, arguments.names)
    if arguments.plan:
        preflight(arguments.mode, experiments, Machine.here())
        return 0
    return run_mode(arguments.mode, experiments)


if __name__ == "__main__":
    raise SystemExit(main())
