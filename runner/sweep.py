"""A cell of a sweep, and the table at its end. A cell that fails is recorded and counted; the sweep goes on.

Cells may run in other processes (joblib, SLURM, Ray), so each appends one line to a log that the command reads at the end.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runner.config import BenchConfig
from runner.records import Record
from runner.run import execute
from serving.errors import UserError, one_line
from workloads.errors import WorkloadError

LOG_VARIABLE = "CROSSPOOL_SWEEP_LOG"
DONE, REUSED, FAILED = "done", "done already", "FAILED"
_SHOWN = (
    ("completed", "completed", "{:.0f}"),
    ("rejected", "rejected", "{:.0f}"),
    ("failed", "failed", "{:.0f}"),
    ("median_ttft_ms", "TTFT p50", "{:.1f}"),
    ("p99_ttft_ms", "TTFT p99", "{:.1f}"),
    ("median_itl_ms", "TBT p50", "{:.2f}"),
    ("p99_itl_ms", "TBT p99", "{:.2f}"),
    ("output_throughput", "tok/s", "{:.1f}"),
    ("slo_attainment", "SLO", "{:.2f}"),
    ("peak_kv_share", "KV peak", "{:.2f}"),
)


def run_cell(parse: Callable[[Mapping[str, Any]], BenchConfig], content: Mapping[str, Any]) -> None:
    """Run one configuration and log what became of it. Only an interrupt leaves this function."""
    label = str(content.get("experiment", "run"))
    try:
        config = parse(content)
        label = f"{config.experiment} {config.system.name}"
        outcome = execute(config)
    except (UserError, WorkloadError) as error:
        _log({"label": label, "state": FAILED, "why": one_line(error)})
        return
    _log(_row(outcome.record, REUSED if outcome.reused else DONE))


def _row(record: Record, state: str) -> dict[str, Any]:
    content = record.content
    return {
        "label": f"{content['experiment']} {content['run_id']}",
        "state": state,
        "path": str(record.path),
        "metrics": {name: content["metrics"].get(name) for name, _, _ in _SHOWN},
    }


def _log(row: dict[str, Any]) -> None:
    # One write of one line: appends of several processes do not mix.
    fd = os.open(os.environ[LOG_VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(fd, (json.dumps(row) + "\n").encode())
    finally:
        os.close(fd)


def report(log: Path) -> int:
    """Print what became of every cell; the exit status is 2 when any failed."""
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if not rows:
        return 0
    failed = [row for row in rows if row["state"] == FAILED]
    good = [row for row in rows if row["state"] != FAILED]
    if good:
        print(_table(good))
        print("times in ms; records:")
        for row in good:
            print(f"  {row['state']:<12} {row['path']}")
    for row in failed:
        print(f"error: {row['label']}: {row['why']}", file=sys.stderr)
    if len(rows) > 1:
        print(f"{len(good)} of {len(rows)} cells done, {len(failed)} failed")
    return 2 if failed else 0


def _table(rows: list[dict[str, Any]]) -> str:
    cells = [["run", *(title for _, title, _ in _SHOWN)]]
    for row in rows:
        metrics = row["metrics"]
        values = [form.format(metrics[name]) if metrics[name] is not None else "-" for name, _, form in _SHOWN]
        cells.append([row["label"], *values])
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = []
    for line in cells:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]))
    return "\n".join(lines)
