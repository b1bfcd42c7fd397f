"""`python -m paper_figures [NAME...]`: redraw exhibits from records, engines untouched.

Every experiment below the records' root gets a folder of its own with what its runs can show; exhibits that need no run go
to `models`. An exhibit asked for by name that has nothing to show is an error; otherwise it is left out and said so.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from paper_figures import export
from paper_figures.drawing import Drawn, draw_folders
from paper_figures.exhibit import Exhibit, NothingToDraw
from paper_figures.records import Records, Run, read_records
from paper_figures.registry import EXHIBITS

_REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_ROOT = _REPOSITORY / "results" / "local"
GPU_STUDIES = _REPOSITORY / "results" / "h200"  # measured once, elsewhere
SHAPES_FOLDER = "models"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m paper_figures", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of: {', '.join(EXHIBITS)} (default: all)")
    parser.add_argument(
        "--records", action="append", type=Path, metavar="ROOT", help="where records are (default: results/local)"
    )
    parser.add_argument("--experiment", action="append", metavar="NAME", help="only this one; repeatable")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: figures/ below the first records' root")
    parser.add_argument("--together", action="store_true", help="draw shipped and local records in one figure")
    parser.add_argument("--print", action="store_true", help="also print each table drawn")
    return parser.parse_args(argv)


def unknown(names: Sequence[str]) -> str | None:
    """One line about names that are no exhibit, or None."""
    wrong = [name for name in names if name not in EXHIBITS]
    if not wrong:
        return None
    near = difflib.get_close_matches(wrong[0], EXHIBITS, n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    return f"unknown figure {', '.join(wrong)}{meant}; known: {', '.join(EXHIBITS)}"


def draw_all(records: Records, arguments: argparse.Namespace, out: Path) -> int:
    """Draw what was asked for; returns the number of exhibits drawn, and raises NothingToDraw where a named one cannot be.
    Folders are drawn side by side, a process a core, where everything is drawn: nearly all time goes into writing figures."""
    names = arguments.names or list(EXHIBITS)
    groups = records.experiments()
    if arguments.experiment:
        groups = {name: runs for name, runs in groups.items() if name in arguments.experiment}
    tasks: dict[str, list[tuple[str, Sequence[Run]]]] = {}
    for name in names:
        for folder, runs in _sources(EXHIBITS[name], groups, records):
            tasks.setdefault(folder, []).append((name, runs))
    processes = 1 if arguments.names else min(len(tasks), len(os.sched_getaffinity(0)))
    told: list[Drawn] = []
    for drawn in draw_folders(tasks, out, processes):
        for one in drawn:
            told.append(one)
            if one.kinds:
                print(f"{one.folder}/{one.name}: {', '.join(one.kinds)}")
                if arguments.print and one.text:
                    print(one.text)
    for name in arguments.names:
        mine = [one for one in told if one.name == name]
        if not any(one.kinds for one in mine):
            reasons = "; ".join(f"{one.folder}: {one.reason}" for one in mine)
            raise NothingToDraw(reasons or f"{name}: no records were found")
    return sum(bool(one.kinds) for one in told)


def _sources(exhibit: Exhibit, groups: dict[str, list[Run]], records: Records) -> list[tuple[str, Sequence[Run]]]:
    """(folder, what `exhibit` is drawn from): each experiment's runs, all studies of its kind, or nothing."""
    if exhibit.study:
        studies = [study for study in records.studies if study.kind == exhibit.study]
        return [(exhibit.study, studies)] if studies else []
    return list(groups.items()) if exhibit.needs_runs else [(SHAPES_FOLDER, [])]


def index(out: Path) -> str:
    """Every exhibit, and where below `out` it was drawn or what it would need: nothing is missing in silence."""
    lines = ["# Exhibits", "", "| exhibit | paper | drawn |", "|---|---|---|"]
    for name, exhibit in EXHIBITS.items():
        found = sorted(path.parent.name for path in out.glob(f"*/{name}.caption.txt"))
        drawn = ", ".join(f"[{folder}]({folder}/{name}.caption.txt)" for folder in found)
        lines.append(f"| `{name}` | {exhibit.paper or '-'} | {drawn or '**no records**' + _wanted(exhibit)} |")
    return "\n".join(lines) + "\n"


def _wanted(exhibit: Exhibit) -> str:
    return f": `{exhibit.needs}`" if exhibit.needs else ""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_args(argv)
    wrong = unknown(arguments.names)
    if wrong:
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    roots = arguments.records or [DEFAULT_ROOT, GPU_STUDIES]
    absent = [str(root) for root in roots[: len(arguments.records or [1])] if not root.is_dir()]
    if absent and (arguments.records or any(EXHIBITS[name].needs_runs for name in arguments.names)):
        print(f"error: no records at {', '.join(absent)}; make some with: python bench.py conf=smoke", file=sys.stderr)
        return 2
    out = arguments.out or roots[0] / "figures"
    records = read_records([root for root in roots if root.is_dir()])
    if len({run.shipped for run in records.runs}) > 1 and not arguments.together:
        print(
            "error: records that ship with the repository and records made here are not drawn together; name one of them "
            "with --records, or say --together",
            file=sys.stderr,
        )
        return 2
    try:
        drawn = draw_all(records, arguments, out)
        if not arguments.names:
            export.write_text(out / "INDEX.md", index(out))
    except NothingToDraw as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: figures cannot be written to {out}: {error.strerror}", file=sys.stderr)
        return 2
    skipped = f"; {records.skipped} records skipped" if records.skipped else ""
    print(f"{drawn} exhibits from {len(records.runs)} runs in {out}{skipped}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
