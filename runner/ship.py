"""`python -m runner.ship pack|verify`: the records that come with the repository, from which figures redraw anywhere.

    python -m runner.ship pack                    what engines computed in ./run_all.sh, from results/local into results/shipped
    python -m runner.ship pack EXPERIMENT...      these experiments, measured, simulated or calculated
    python -m runner.ship verify                  every file is the manifest's, every record reads

A shipped record says so in its own `shipped` key: paper_figures never draws it beside one that was made here unless told to.
Rows that nothing draws are thinned: token ids are left out, token times are those of 125 requests at most, series keep every n-th time. Metrics stay those of all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from runner.experiments import EXPERIMENTS
from runner.provenance import provenance
from runner.records import (
    COMPLETE,
    FAILED,
    RECORD_FILE,
    REQUESTS_FILE,
    SCHEMA_VERSION,
    SERIES_FILE,
    STUDY_FILE,
    TIMELINE_FILE,
    Record,
    read_record,
    record_directories,
)
from serving.errors import UserError, command

_REPOSITORY = Path(__file__).resolve().parents[1]
LOCAL, SHIPPED = _REPOSITORY / "results" / "local", _REPOSITORY / "results" / "shipped"
MANIFEST = "manifest.json"
_MOST_TIMED_REQUESTS, _MOST_SERIES_ROWS, _MOST_TIMELINE_ROWS, _MOST_SYSTEM_SAMPLES = 125, 1_000, 2_000, 60
_REFERENCES = (".png", ".md", ".caption.txt")  # what is looked at; the rest is redrawn in a minute
_DRAWN = {  # of scenarios that are no experiment of the artifact
    "validation": ("validation",),
    "paper-skew": ("skew",),
    "paper-bursts": ("tbt_by_model", "kv_pages_over_time", "outcomes", "summary"),
    "paper-quantile": ("outcomes", "summary"),
    "paper-models": ("model_count", "outcomes", "summary"),
    "paper-context-decode": ("rate_by_context", "outcomes", "summary"),
}
_TIMES = "token_times_ns.list.element"


def pack(source: Path, target: Path, experiments: Sequence[str]) -> int:
    """Ship the complete and failed records, and the studies, of `experiments`; returns how many. What was shipped of them
    before goes. Raises UserError for an experiment that has none."""
    for name in experiments:
        found = [read_record(directory) for directory in record_directories(source / name)]
        records = [record for record in found if record.status in (COMPLETE, FAILED)]
        studies = sorted((source / name).glob(f"*/{STUDY_FILE}"))
        if not records and not studies:
            raise UserError(f"{source / name}: holds no record to ship")
        shutil.rmtree(target / name, ignore_errors=True)
        for record in records:
            _pack_record(record, target / name / record.path.name)
        for path in studies:
            (target / name / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name / path.parent.name / STUDY_FILE)
    files = _files(target)
    content = {
        "schema_version": SCHEMA_VERSION,
        "packed_at": datetime.now(UTC).isoformat(),
        "git": provenance()["git"],
        "files": {str(path.relative_to(target)): _sha256(path) for path in files},
    }
    (target / MANIFEST).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    return sum(path.name in (RECORD_FILE, STUDY_FILE) for path in files)


def measured(source: Path) -> list[str]:
    """The artifact's experiments of which `source` holds records, all of them measured. Raises UserError where there are
    none. What was simulated ships by name only: a quick simulation must not replace a thorough one by accident."""
    found = []
    for experiment in EXPERIMENTS:
        records = [read_record(directory) for directory in record_directories(source / experiment.name)]
        if records and all(record.content["backend"] == "real" for record in records):
            found.append(experiment.name)
    if not found:
        raise UserError(f"{source}: holds no measured experiment of the artifact; make some with: ./run_all.sh fast")
    return found


def draw_references(target: Path, experiments: Sequence[str]) -> None:
    """Draw what `experiments` show from their shipped records, to compare with, beside them. Raises UserError."""
    known = {experiment.name: experiment for experiment in EXPERIMENTS}
    for name in experiments:
        shown = known[name].drawn if name in known else _DRAWN.get(name, ())
        references = target / "figures" / name
        with tempfile.TemporaryDirectory() as folder:
            roots = ["--records", str(target), "--out", folder, "--experiment", name]
            command = [sys.executable, "-m", "paper_figures", *shown, *roots]
            if subprocess.run(command, cwd=_REPOSITORY, stdout=subprocess.DEVNULL, check=False).returncode:
                raise UserError(f"{target / name}: is packed, and cannot be drawn; above it says why")
            shutil.rmtree(references, ignore_errors=True)
            references.mkdir(parents=True)
            for path in sorted(Path(folder).glob("*/*")):
                if path.name.endswith(_REFERENCES):
                    shutil.copyfile(path, references / path.name)


def _pack_record(record: Record, target: Path) -> None:
    target.mkdir(parents=True)
    content = dict(record.content)
    content["shipped"] = {"thinned": ["token_ids", "token_times_ns", SERIES_FILE, TIMELINE_FILE, "system_series"]}
    content["config"] = {**content["config"], "results_dir": "results/local"}  # no path of the machine that made it
    content["command"] = " ".join(word for word in content["command"].split() if not word.startswith("results_dir="))
    samples = content.get("system_series") or []
    content["system_series"] = samples[:: max(1, -(-len(samples) // _MOST_SYSTEM_SAMPLES))]
    (target / RECORD_FILE).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    _write(_without_tokens(record.requests()), target / REQUESTS_FILE)
    _write(_thinned(record.series(), _MOST_SERIES_ROWS), target / SERIES_FILE)
    if (record.path / TIMELINE_FILE).is_file():
        spans = pq.read_table(record.path / TIMELINE_FILE).sort_by("start_ns")
        first = max(0, (len(spans) - _MOST_TIMELINE_ROWS) // 2)
        _write(spans.slice(first, _MOST_TIMELINE_ROWS), target / TIMELINE_FILE)


def _without_tokens(requests: pa.Table) -> pa.Table:
    """All requests, none with its token ids, and evenly spread ones with the times of their tokens."""
    every = max(1, -(-len(requests) // _MOST_TIMED_REQUESTS))
    times = requests["token_times_ns"].to_pylist()
    kept = {
        "token_ids": [[] for _ in times],
        "token_times_ns": [found if number % every == 0 else [] for number, found in enumerate(times)],
    }
    for name, values in kept.items():
        index = requests.schema.get_field_index(name)
        field = requests.schema.field(index)
        requests = requests.set_column(index, field, pa.array(values, field.type))
    return requests


def _thinned(series: pa.Table, most: int) -> pa.Table:
    """At every n-th time, and the last, what has changed since the one before: at most `most` rows that say what `series` says
    of those times."""
    every = 1
    while len(series) > most:
        every *= 2
        shorter = _at_every(series, every)
        if len(shorter) <= most or every >= len(series):
            return shorter
    return series


def _at_every(series: pa.Table, every: int) -> pa.Table:
    times = series["time_ns"].to_numpy()
    kept = np.unique(times)[::-1][::every][::-1]
    last_of: dict[tuple[int, str, str], int] = {}  # row by kept time, pool and model
    places, pools, models = np.searchsorted(kept, times), series["pool"].to_pylist(), series["model"].to_pylist()
    for row in np.argsort(times, kind="stable").tolist():
        last_of[int(places[row]), pools[row], models[row]] = row
    rows = sorted(last_of.values(), key=lambda row: (places[row], row))
    stamped = pa.array(kept[places[rows]], pa.int64())
    return series.take(rows).set_column(series.schema.get_field_index("time_ns"), "time_ns", stamped)


def _write(table: pa.Table, path: Path) -> None:
    encoding = {"use_dictionary": False, "column_encoding": {_TIMES: "DELTA_BINARY_PACKED"}}
    timed = "token_times_ns" in table.schema.names
    pq.write_table(table, path, compression="zstd", **(encoding if timed else {}))


def verify(target: Path) -> tuple[int, list[str]]:
    """How many records are there, and everything that is wrong: a file that is missing, new or changed, a record that does
    not read or does not say that it is shipped."""
    path = target / MANIFEST
    try:
        listed: dict[str, Any] = json.loads(path.read_text())["files"]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; no records are shipped") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is corrupt ({error})") from None
    found = {str(file.relative_to(target)): file for file in _files(target)}
    wrong = [f"{target / name}: is in the manifest and not there" for name in sorted(set(listed) - set(found))]
    wrong += [f"{target / name}: is not in the manifest" for name in sorted(set(found) - set(listed))]
    wrong += [
        f"{file}: is not what was shipped (its checksum differs)"
        for name, file in found.items()
        if name in listed and _sha256(file) != listed[name]
    ]
    for directory in record_directories(target):
        try:
            record = read_record(directory)
        except UserError as error:
            wrong.append(str(error))
            continue
        if not record.content.get("shipped"):
            wrong.append(f"{directory}: does not say that it is shipped")
    return sum(file.name in (RECORD_FILE, STUDY_FILE) for file in found.values()), wrong


def _files(target: Path) -> list[Path]:
    """What the manifest lists: everything below but itself, pages that describe, and reference figures."""
    return sorted(
        path
        for path in target.rglob("*")
        if path.is_file() and path.parent != target and "figures" not in path.relative_to(target).parts
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m runner.ship", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="ship records of these experiments")
    packing.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help="default: all that are measured")
    packing.add_argument("--source", type=Path, default=LOCAL, help="default: results/local")
    for each in (packing, commands.add_parser("verify", help="check what is shipped")):
        each.add_argument("--shipped", type=Path, default=SHIPPED, help="default: results/shipped")
    arguments = parser.parse_args(argv)
    if arguments.command == "pack":
        experiments = arguments.experiments or measured(arguments.source)
        count = pack(arguments.source, arguments.shipped, experiments)
        draw_references(arguments.shipped, experiments)
        size_kib = sum(path.stat().st_size for path in _files(arguments.shipped)) / 1024
        print(
            f"{count} records and studies, {size_kib:.0f} KiB, in {arguments.shipped}; packed: {', '.join(experiments)}"
        )
        return 0
    count, wrong = verify(arguments.shipped)
    for line in wrong:
        print(f"error: {line}")
    print(f"{count} shipped records and studies, {len(wrong)} problems")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
