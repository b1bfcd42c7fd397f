"""Weights & Biases: offline by default, online or disabled by configuration. The record on disk is the truth; this mirrors it.

Runs are grouped by experiment (or `tracking.group`) with the system as job type; the resolved configuration, the summary
metrics under the record's names, the pages in use over time and the record's files as an artifact go along.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from runner.config import Tracking
from runner.records import Record
from serving.errors import UserError, one_line

_MOST_SERIES_POINTS = 500


def track(record: Record, tracking: Tracking, directory: Path) -> Path | None:
    """Log `record` to W&B under `directory`; returns the run's folder, or None when disabled. Raises UserError, one line,
    when W&B refuses (a wrong key, no network while online); the record itself is not touched."""
    if tracking.mode == "disabled":
        return None
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    content = record.content
    directory.mkdir(parents=True, exist_ok=True)
    try:
        run = wandb.init(
            project=tracking.project,
            entity=tracking.entity or None,
            group=tracking.group or content["experiment"],
            job_type=content["system"],
            name=content["run_id"],
            config=content["config"],
            mode=tracking.mode,
            dir=str(directory),
            settings=wandb.Settings(console="off", x_stats_sampling_interval=5.0),
        )
        run.define_metric("time_s")
        run.define_metric("kv_pages/*", step_metric="time_s")
        for point in _pages_over_time(record):
            run.log(point)
        run.summary.update({key: value for key, value in content["metrics"].items() if value is not None})
        run.summary.update({"config_hash": content["config_hash"], "status": content["status"]})
        artifact = wandb.Artifact(f"record-{content['run_id']}", type="record")
        artifact.add_dir(str(record.path))
        run.log_artifact(artifact)
        folder = Path(run.dir).parent
        run.finish()
    except (wandb.Error, OSError, ValueError) as error:
        raise UserError(f"W&B ({tracking.mode}): {one_line(error)}; the record is kept at {record.path}") from None
    return folder


def _pages_over_time(record: Record) -> list[dict[str, Any]]:
    """Pages in use by model, thinned to a few hundred points."""
    rows = record.series().to_pylist()
    rows.sort(key=lambda row: row["time_ns"])
    points: dict[int, dict[str, Any]] = {}
    for row in rows:
        point = points.setdefault(row["time_ns"], {"time_s": row["time_ns"] / 1e9})
        point[f"kv_pages/{row['model']}"] = row["pages_in_use"]
    ordered = list(points.values())
    return ordered[:: max(1, len(ordered) // _MOST_SERIES_POINTS)]
