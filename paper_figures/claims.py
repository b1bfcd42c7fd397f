"""`python -m paper_figures.claims`: the paper's claims beside what the records here say.

A verdict is `reproduced` (ours lies within the tolerance that paper.yaml states), `different`, or `not run` with the reason.
The status is non-zero only when something that should have run did not: an experiment whose records are there but hold no
complete run, or one named with `--expect`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from paper_figures import export
from paper_figures.checks import CHECKS, Measured, NotRun
from paper_figures.paper import paper
from paper_figures.records import BadRecord, Run, read_records

REPRODUCED, DIFFERENT, NOT_RUN = "reproduced", "different", "not run"
_REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Verdict:
    """One claim, judged. `overdue` marks one that should have run."""

    name: str
    exhibit: str
    statement: str
    paper: float | None
    ours: float | None
    accepted: str
    verdict: str
    why: str
    backend: str
    hardware: str
    n: int
    experiment: str
    command: str
    overdue: bool


def judge(claim: Mapping[str, Any], groups: Mapping[str, Sequence[Run]], expected: Sequence[str]) -> Verdict:
    """The verdict on one claim of paper.yaml, from runs by experiment."""
    experiment = claim.get("experiment", "")
    runs = groups.get(experiment, ())
    try:
        measured = _measure(claim, experiment, runs)
    except (NotRun, BadRecord) as reason:
        overdue = experiment in expected or getattr(reason, "expected", True)
        return _verdict(claim, None, NOT_RUN, str(reason), overdue)
    if not math.isfinite(measured.value):
        return _verdict(claim, None, NOT_RUN, "the records hold no number for it", True)
    # Bounds are the paper's; the slack is for the last bit of a float.
    inside = claim["low"] - 1e-9 <= measured.value <= claim["high"] + 1e-9
    return _verdict(claim, measured, REPRODUCED if inside else DIFFERENT, "", False)


def _measure(claim: Mapping[str, Any], experiment: str, runs: Sequence[Run]) -> Measured:
    if "not_run" in claim:
        raise NotRun(claim["not_run"])
    if experiment and not runs:
        raise NotRun(f"no records of experiment {experiment}")
    return CHECKS[claim["check"]](_one_backend(runs), **claim.get("arguments", {}))


def _one_backend(runs: Sequence[Run]) -> list[Run]:
    """Measured runs where any is complete, else simulated ones: a number never rests on both."""
    if any(run.backend == "offline" for run in runs):
        return list(runs)
    measured = [run for run in runs if run.backend == "real"]
    return measured if any(run.ok for run in measured) else [run for run in runs if run.backend != "real"] or measured


def _verdict(claim: Mapping[str, Any], measured: Measured | None, verdict: str, why: str, overdue: bool) -> Verdict:
    runs = measured.runs if measured else ()
    commands = list(dict.fromkeys(f"python {run.command.removeprefix('python ')}" for run in runs if run.command))
    return Verdict(
        name=claim["name"],
        exhibit=claim["exhibit"],
        statement=claim["statement"],
        paper=claim.get("paper"),
        ours=measured.value if measured else None,
        accepted=f"{claim['low']:g}..{claim['high']:g}" if "low" in claim else "",
        verdict=verdict,
        why=why,
        backend="+".join(sorted({run.backend for run in runs})) or ("formula" if measured else ""),
        hardware="; ".join(sorted({run.hardware for run in runs})),
        n=len(runs),
        experiment=claim.get("experiment", ""),
        command=(measured.command if measured else "") or "; ".join(commands),
        overdue=overdue,
    )


def as_table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """What a person reads: one row a claim."""
    return pd.DataFrame(
        {
            "claim": verdict.name,
            "exhibit": verdict.exhibit,
            "paper": _number(verdict.paper),
            "accepted": verdict.accepted or "-",
            "ours": _number(verdict.ours),
            "backend": verdict.backend or "-",
            "runs": verdict.n,
            "verdict": verdict.verdict + (f": {verdict.why}" if verdict.why else ""),
        }
        for verdict in verdicts
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m paper_figures.claims", description=__doc__.splitlines()[0])
    parser.add_argument("--records", action="append", type=Path, metavar="ROOT", help="default: results/local")
    parser.add_argument("--expect", action="append", default=[], metavar="EXPERIMENT", help="must have run; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every field of every verdict")
    arguments = parser.parse_args(argv)
    roots = arguments.records or [_REPOSITORY / "results" / "local"]
    records = read_records([root for root in roots if root.is_dir()])
    groups = records.experiments() | {
        kind: [study for study in records.studies if study.kind == kind] for kind in {s.kind for s in records.studies}
    }
    verdicts = [judge(claim, groups, arguments.expect) for claim in paper()["claims"]]
    print(export.plain(as_table(verdicts)))
    for command in dict.fromkeys(verdict.command for verdict in verdicts if verdict.command):
        named = ", ".join(verdict.name for verdict in verdicts if verdict.command == command)
        print(f"\n{named}:\n  $ {command}".replace("; python", "\n  $ python"))
    if arguments.json:
        content = json.dumps([asdict(verdict) for verdict in verdicts], indent=1) + "\n"
        try:
            export.write_text(arguments.json, content)
        except OSError as error:
            print(f"error: {arguments.json}: cannot be written ({error.strerror})", file=sys.stderr)
            return 2
    overdue = [verdict.name for verdict in verdicts if verdict.overdue]
    if overdue:
        print(f"error: should have run and did not: {', '.join(overdue)}", file=sys.stderr)
    return 1 if overdue else 0


if __name__ == "__main__":
    raise SystemExit(main())
