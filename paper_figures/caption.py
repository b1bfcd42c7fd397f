"""The sentence under a figure that says what produced it: backend, hardware, runs, and what is missing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from paper_figures.exhibit import Exhibit
from paper_figures.records import Run
from paper_figures.selection import differing, flatten, scenario, variants

_BACKENDS = {"real": "Measured", "sim": "SIMULATED (cost model, virtual clock)", "offline": "Calculated"}

_MOST_FOR_OTHERS = 0.1
_MOST_HARDWARE = 4
_IN_SHORT = {"real": "measured", "sim": "simulated", "offline": "calculated"}


def caption(exhibit: Exhibit, runs: Sequence[Run]) -> str:
    """One paragraph. Runs that failed are named with their reason, so that an empty cell is never read as zero."""
    parts = [exhibit.title + "."]
    if exhibit.paper:
        parts.append(f"Compare the paper's {exhibit.paper}.")
    if not runs:
        return " ".join([*parts, "From the models' shapes; nothing was run."])
    for backend in sorted({run.backend for run in runs}):
        of_backend = [run for run in runs if run.backend == backend]
        hardware = _hardware(of_backend)
        if len(hardware) > _MOST_HARDWARE:
            hardware = [hardware[0], f"and {len(hardware) - 1} more, which the records name"]
        parts.append(f"{_BACKENDS.get(backend, backend)} on {'; '.join(hardware)}.")
    if exhibit.study:
        commands = dict.fromkeys(run.command for run in runs if run.command)
        return " ".join([*parts, *(f"Made by: {command}." for command in commands)])
    parts.append(f"{len(runs)} run{'s' * (len(runs) > 1)}, n = {_seeds(runs)}.")
    labels = variants(runs)
    for run in runs:
        if not run.ok:
            parts.append(f"Could not run: {labels[run.run_id]} ({run.reason or run.status}).")
    others = max((run.metrics.get("other_cpu_share") or 0.0 for run in runs), default=0.0)
    if others > _MOST_FOR_OTHERS:
        parts.append(f"The machine was not quiet: other programs took up to {others:.0%} of its cores during a run.")
    if all(run.shipped for run in runs):
        parts.append("Records that ship with the repository.")
    if any(run.dirty for run in runs):
        parts.append("Some runs were made from a modified working tree.")
    return " ".join(parts)


def _seeds(runs: Sequence[Run]) -> str:
    """How many seeds, and which: only of those choices that were seeded differently; and how often each was run."""
    seeds = [flatten((run.config.get("workload") or {}).get("seeds") or {}) for run in runs]
    count = len({run.seed for run in runs})
    told = "; ".join(
        f"{key} {', '.join(sorted({str(found.get(key)) for found in seeds}, key=lambda s: (len(s), s)))}"
        for key in differing(seeds)
    )
    repeats = len({run.repeat for run in runs})
    times = f", {repeats} times" if repeats > 1 else ""
    return (f"{count} seeds ({told})" if told else f"1 seed ({runs[0].seed})") + times


def _hardware(runs: Sequence[Run]) -> list[str]:
    """What computed or was modelled, each once; where only calibrations differ, how many there are."""
    alike = defaultdict(list)
    for run in runs:
        alike[_but_for_calibration(run, "")].append(run)
    told = []
    for first, *others in alike.values():
        count = len({_calibration(run) for run in (first, *others)})
        told.append(_but_for_calibration(first, f"hardware by {count} calibrations") if count > 1 else first.hardware)
    return sorted(told)


def _calibration(run: Run) -> str:
    return (run.config.get("backend") or {}).get("calibration") or ""


def _but_for_calibration(run: Run, instead: str) -> str:
    """The hardware of `run` in words, with `instead` for its calibration, if it has one."""
    path = _calibration(run)
    return run.hardware.replace(f"; simulated {path}", "").replace(path, instead) if path else run.hardware


def _in_short(hardware: str) -> str:
    """`hardware` as it is where there is room for it, else its name and the number of its devices."""
    name, _, devices = hardware.partition(" [")
    return hardware if len(hardware) <= 60 else f"{name[:45]} [{devices.count('MiB')} devices]"


def stamp(runs: Sequence[Run]) -> str:
    """The caption in a few words, for inside the figure: what a picture cut out of its page must still say."""
    if not runs:
        return "from model shapes, no run"
    backends = "+".join(sorted({_IN_SHORT.get(run.backend, run.backend) for run in runs}))
    hardware = _hardware([run for run in runs if run.backend == "real"] or runs)
    more = f" and {len(hardware) - 1} more" if len(hardware) > 1 else ""
    number = f"; n = {_runs_of_a_cell(runs)}" if any(run.config for run in runs) else ""
    return f"{backends} on {_in_short(hardware[0])}{more}{number}"


def _runs_of_a_cell(runs: Sequence[Run]) -> str:
    """By how many seeds and repetitions a cell was run: one system, one scenario. Where that differs, least and most."""
    labels, cells = variants(runs), defaultdict(set)
    for run in runs:
        cells[labels[run.run_id], str(sorted(scenario(run, ("backend.",)).items()))].add((run.seed, run.repeat))
    least, most = min(map(len, cells.values())), max(map(len, cells.values()))
    return str(most) if least == most else f"{least} to {most}"
