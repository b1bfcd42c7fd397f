"""`python -m runner.table [ROOT]`: every record below ROOT as one table, on the terminal and as parquet."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from runner.records import COMPLETE, Record, read_records
from serving.errors import UserError, command

_FIRST = ["experiment", "system", "backend", "status"]
_SHOWN = ["completed", "rejected", "failed", "p99_itl_ms", "p99_ttft_ms", "output_throughput", "slo_attainment"]
_UNSAID = (
    "config.experiment",
    "config.system.",
    "config.backend.",
    "config.results_dir",
    "config.force",
    "config.tracking.",
)
_MOST_SETTINGS = 6


def row_of(record: Record) -> dict[str, Any]:
    """One record as one flat row: identity, every scalar of its configuration (`config.a.b`), every metric."""
    content = record.content
    row = {
        key: content.get(key) for key in ("experiment", "system", "run_id", "status", "backend", "hardware", "error")
    }
    row["path"] = str(record.path)
    row |= _flat("config", content["config"])
    return row | content["metrics"]


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {key: v for k, child in value.items() for key, v in _flat(f"{prefix}.{k}", child).items()}
    return {} if isinstance(value, list) else {prefix: value}


def table_of(root: str | Path) -> tuple[pd.DataFrame, int]:
    """All records below `root` as a frame, and how many were skipped as corrupt."""
    found, skipped = read_records(root)
    return pd.DataFrame([row_of(record) for record in found]), skipped


def settings_that_differ(frame: pd.DataFrame) -> list[str]:
    """Columns of the configuration in which the runs of one system differ: what was swept."""
    columns = [name for name in frame if name.startswith("config.") and not name.startswith(_UNSAID)]
    options = [name for name in frame if name.startswith("config.system.options.")]
    swept = []
    for name in columns + options:
        values = frame.groupby("system")[name].nunique(dropna=False)
        if (values > 1).any():
            swept.append(name)
    return swept


def for_reading(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns that tell runs apart, and the metrics that matter most. A run that failed has none."""
    swept = settings_that_differ(frame)[:_MOST_SETTINGS]
    shown = frame.reindex(columns=[*_FIRST, *swept, *_SHOWN]).sort_values([*_FIRST, *swept], kind="stable")
    return shown.rename(columns={name: ".".join(name.split(".")[-2:]) for name in swept})


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m runner.table", description=__doc__)
    parser.add_argument("root", nargs="?", default="results", help="directory to search (default: results)")
    parser.add_argument("--out", type=Path, help="write the whole table to this parquet file")
    args = parser.parse_args(argv)
    if not Path(args.root).is_dir():
        raise UserError(f"{args.root}: no such directory")
    frame, skipped = table_of(args.root)
    if frame.empty:
        raise UserError(f"{args.root}: holds no readable record ({skipped} skipped)")
    print(for_reading(frame).to_string(index=False, float_format="{:.2f}".format, na_rep="-"))
    _print_failures(frame)
    print(f"{len(frame)} records, {skipped} skipped")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        frame.to_parquet(args.out)
        print(args.out)
    return 0


def _print_failures(frame: pd.DataFrame) -> None:
    for run in frame[frame["status"] != COMPLETE].itertuples():
        print(f"{run.status}: {run.path}: {run.error}")


if __name__ == "__main__":
    raise SystemExit(main())
