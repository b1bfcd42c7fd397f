"""`python -m runner.study KIND`: measurements that are no run of a system, kept beside the records as studies.

    python -m runner.study kernels                              this machine's kernels (kernels.bench)
    python -m runner.study card                                 decode steps on a GPU (serving.gpu_suite.engine)
    python -m runner.study planner-overflow conf/planner/cpu2.yaml
    python -m runner.study rate-estimate                        Fig. 6 as the paper estimates it (runner.estimate)

Each calls the command that a person would, keeps what it wrote, and says how to get it again (SCHEMA.md, `study.json`).
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runner.provenance import provenance
from runner.records import SCHEMA_VERSION, STUDY_FILE, require_writable
from serving.errors import UserError, command

_REPOSITORY = Path(__file__).resolve().parents[1]


def _kernels(arguments: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Rows of `python -m kernels.bench`, and what they were measured on."""
    with tempfile.TemporaryDirectory() as folder:
        _call(["kernels.bench", *arguments, "--out", folder])
        content = json.loads((Path(folder) / "kernels.json").read_text())
    rows = content.pop("rows")
    own = provenance()["hardware"]["cpu"] if content["device"] == platform.machine() else None
    return {"backend": "real", "hardware": own or content["device"], "measured_with": content}, rows


def _card(arguments: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Rows of `python -m serving.gpu_suite.engine`, and what they were measured on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "engine.json"
        _call(["serving.gpu_suite.engine", *arguments, "--out", str(path)])
        content = json.loads(path.read_text())
    rows = content.pop("rows")
    return {"backend": "real", "hardware": ", ".join(content["hardware"]), "measured_with": content}, rows


def _planner_overflow(arguments: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Promised and resulting overflow of a plan's budgets."""
    if not arguments:
        raise UserError("planner-overflow: name a configuration; examples lie in conf/planner")
    with tempfile.TemporaryDirectory() as folder:
        _call(["crosspool.planner", *arguments, "--out", folder], fine=(0, 2))  # 2: the plan does not fit, and is drawn
        path = Path(folder) / "overflow.csv"
        if not path.is_file():
            raise UserError(f"planner-overflow: python -m crosspool.planner {shlex.join(arguments)} made no plan")
        with path.open(newline="") as file:
            rows = [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return {"backend": "offline", "hardware": "Monte Carlo"}, rows


def _rate_estimate(arguments: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Rates by bin of context, estimated from placement and KV memory alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rates.csv"
        _call(["runner.estimate", *arguments, "--csv", str(path)])
        with path.open(newline="") as file:
            rows = [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return {"backend": "offline", "hardware": "the placement's KV memory"}, rows


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _call(arguments: Sequence[str], fine: Sequence[int] = (0,)) -> None:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=_REPOSITORY, check=False)
    if done.returncode not in fine:
        raise UserError(f"python -m {shlex.join(arguments)} ended with status {done.returncode}")


KINDS: dict[str, Callable[[Sequence[str]], tuple[dict[str, Any], list[dict[str, Any]]]]] = {
    "kernels": _kernels,
    "card": _card,
    "planner-overflow": _planner_overflow,
    "rate-estimate": _rate_estimate,
}


def study_directory(root: Path, kind: str, arguments: Sequence[str]) -> Path:
    """Where a study lies: one a kind and a file that it is of."""
    named = [Path(word).stem for word in arguments if not word.startswith("-")]
    return root / kind / "-".join([kind, *named])


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m runner.study", description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("--results", type=Path, default=_REPOSITORY / "results" / "local")
    parser.add_argument("--force", action="store_true", help="measure again although it is there")
    arguments, rest = parser.parse_known_args(argv)
    directory = study_directory(arguments.results, arguments.kind, rest)
    path = directory / STUDY_FILE
    if path.exists() and not arguments.force:
        print(f"done already {path}")
        return 0
    require_writable(directory)
    told, rows = KINDS[arguments.kind](rest)
    content = {
        "schema_version": SCHEMA_VERSION,
        "kind": arguments.kind,
        "name": directory.name,
        "command": shlex.join(["python", "-m", "runner.study", arguments.kind, *rest]),
        "provenance": provenance(),
        "ended_at": datetime.now(UTC).isoformat(),
        **told,
        "rows": rows,
    }
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
    print(f"{len(rows)} rows in {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
