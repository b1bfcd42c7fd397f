"""A cell of a sweep, and the table at its end. A cell that fails is recorded and counted; the sweep goes on.

Cells may run in other processes (joblib, SLURM, Ray), so each appends one line to a log that the command reads at the end.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.config import bench_from_dict
from serving.errors import UserError, one_line
from workloads.errors import WorkloadError

if TYPE_CHECKING:
    from runner.records import Record

LOG_VARIABLE = "CROSSPOOL_SWEEP_LOG"
_UNSAID = ("results_dir=", "tracking", "force=", "experiment=", "hydra")  # of no use to tell cells apart
_OTHERS, _MOST_FOR_OTHERS = "other_cpu_share", 0.1
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


def run_cell(content: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Run one configuration, which `overrides` chose, and log what became of it. Only an interrupt leaves this function: a
    bug is told with its traceback and costs its own cell."""
    from runner.run import execute  # two seconds of packages, which neither help nor a wrong word should cost

    cell = _identified(content, overrides)
    command = shlex.join(["python", "bench.py", *overrides])
    try:
        outcome = execute(bench_from_dict(content), command)
    except (UserError, WorkloadError) as error:
        _log({**cell, "state": FAILED, "why": one_line(error)})
    except Exception as error:  # noqa: BLE001 - a bug in one cell must not cost the others
        traceback.print_exc()
        _log({**cell, "state": FAILED, "why": one_line(f"{type(error).__name__}: {error} (a bug; see above)")})
    else:
        _log({**cell, **_seen(outcome.record), "state": REUSED if outcome.reused else DONE, "why": outcome.untracked})


def log_lost(content: Mapping[str, Any], overrides: Sequence[str], why: str) -> None:
    """Log a cell that could not say itself what became of it: its process or its node died, or none could take it."""
    _log({**_identified(content, overrides), "state": FAILED, "why": why})


def _identified(content: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    system = content.get("system")
    name = f"{content.get('experiment')} {system.get('name') if isinstance(system, Mapping) else system}"
    return {"name": name, "overrides": [part for part in overrides if not part.startswith(_UNSAID)]}


def _seen(record: Record) -> dict[str, Any]:
    names = [name for name, _, _ in _SHOWN] + [_OTHERS]
    trace = record.content["trace"]
    clipped = trace.get("summary", {}).get("clipped", 0)
    return {
        "path": str(record.path),
        "requests": trace.get("requests"),
        "metrics": {name: record.metrics.get(name) for name in names},
        "clipped": clipped,
    }


def _log(row: dict[str, Any]) -> None:
    # One write of one line: appends of several processes do not mix.
    fd = os.open(os.environ[LOG_VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(fd, (json.dumps(row) + "\n").encode())
    finally:
        os.close(fd)


def report(log: Path) -> int:
    """Print what became of every cell; the exit status is 2 when any failed or could not be tracked."""
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if not rows:
        return 0
    _label(rows)
    failed = [row for row in rows if row["state"] == FAILED]
    good = [row for row in rows if row["state"] != FAILED]
    if good:
        print(_table(good))
        print("times in ms; records:")
        for row in good:
            print(f"  {row['state']:<12} {row['path']}")
        _warn_of_nothing(good)
        _warn_of_clipping(good)
        _warn_of_others(good)
    complaints = [row for row in rows if row["why"]]
    for row in complaints:
        print(f"error: {row['label']}: {row['why']}", file=sys.stderr)
    if len(rows) > 1:
        print(f"{len(good)} of {len(rows)} cells done, {len(failed)} failed")
    return 2 if complaints else 0


def _label(rows: list[dict[str, Any]]) -> None:
    """Give each row what tells its cell from the others."""
    common = set.intersection(*(set(row["overrides"]) for row in rows)) if len(rows) > 1 else set()
    for row in rows:
        own = [part for part in row["overrides"] if part not in common] if len(rows) > 1 else []
        row["label"] = " ".join(own) or row["name"]


def _warn_of_nothing(rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        if row["requests"] == 0:
            print(
                f"note: {row['label']}: no request arrived, so nothing was measured; a longer workload.duration_s or a higher "
                "workload.rate brings some",
                file=sys.stderr,
            )


def _warn_of_clipping(rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        if row["clipped"]:
            print(
                f"note: {row['label']}: {row['clipped']} requests were longer than their model's context and were cut to it",
                file=sys.stderr,
            )


def _warn_of_others(rows: Sequence[Mapping[str, Any]]) -> None:
    shares = [row["metrics"][_OTHERS] or 0.0 for row in rows if row["state"] == DONE]
    if shares and max(shares) > _MOST_FOR_OTHERS:
        print(
            f"note: other programs took up to {max(shares):.0%} of the devices' cores; these are not the times of a quiet "
            f"machine ({_OTHERS} in each record)",
            file=sys.stderr,
        )


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
