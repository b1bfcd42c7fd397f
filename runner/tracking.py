"""Weights & Biases: offline by default, online or disabled by configuration. The record on disk is the truth; this mirrors it.

Runs are grouped by experiment (or `tracking.group`) with the system as job type; the resolved configuration, the summary
metrics under the record's names, the pages in use and the machine's own load over time, and the record's files as an artifact
go along. Exhibits go to a run of job type `figures` of the same group. What offline runs leave is below one
folder, artifacts included, for `wandb sync` later.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from runner.config import Tracking
from runner.records import Record
from serving.errors import UserError, one_line

_MOST_SERIES_POINTS = 500
_INIT_TIMEOUT_S = 30.0
_FOLDERS = ("WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR", "WANDB_CACHE_DIR")


def track(record: Record, tracking: Tracking, directory: Path) -> Path | None:
    """Log `record` to W&B under `directory`; returns the run's folder, or None when disabled. Raises UserError, one line,
    when W&B refuses (a wrong key, no network while online) or dies; the record itself is not touched."""
    if tracking.mode == "disabled":
        return None
    content = record.content
    names = {"name": content["run_id"], "job_type": content["system"], "config": content["config"]}
    with _run(tracking, content["experiment"], directory, f"the record is kept at {record.path}", **names) as run:
        run.define_metric("time_s")
        run.define_metric("kv_pages/*", step_metric="time_s")
        run.define_metric("machine/*", step_metric="time_s")
        for point in sorted(_pages_over_time(record) + _machine_over_time(record), key=lambda point: point["time_s"]):
            run.log(point)
        run.summary.update({key: value for key, value in content["metrics"].items() if value is not None})
        run.summary.update({"config_hash": content["config_hash"], "status": content["status"]})
        _attach(run, f"record-{content['run_id']}", "record", sorted(record.path.iterdir()))
        return Path(run.dir).parent


def publish(exhibits: Sequence[Path], experiment: str, tracking: Tracking, directory: Path) -> Path | None:
    """Log the files of an experiment's exhibits: pictures to look at, and all of them as one artifact. As :func:`track`."""
    if tracking.mode == "disabled" or not exhibits:
        return None
    import wandb

    folder = exhibits[0].parent
    with _run(
        tracking,
        experiment,
        directory,
        f"the figures are kept at {folder}",
        name=f"figures-{experiment}",
        job_type="figures",
    ) as run:
        for path in exhibits:
            if path.suffix == ".png":
                run.log({f"figures/{path.stem}": wandb.Image(str(path))})
        _attach(run, f"figures-{experiment}", "figures", exhibits)
        return Path(run.dir).parent


@contextmanager
def _run(tracking: Tracking, group: str, directory: Path, kept: str, **names: Any) -> Iterator[Any]:
    """A W&B run below `directory`, finished at the end. Raises UserError that ends with what is `kept` all the same."""
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    directory.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(console="off", x_disable_stats=True, init_timeout=_INIT_TIMEOUT_S)
    try:
        with _kept_beside(directory):
            run = wandb.init(
                project=tracking.project,
                entity=tracking.entity or None,
                group=tracking.group or group,
                mode=tracking.mode,
                dir=str(directory),
                settings=settings,
                **names,
            )
            yield run
            run.finish()
    except Exception as error:  # noqa: BLE001 - W&B raises what its service died of; no run may be lost for its mirror
        raise UserError(f"W&B ({tracking.mode}): {_why(error)}; {kept}") from None


def _why(error: Exception) -> str:
    """W&B's message without its advice, and what to do about the usual two."""
    text = one_line(error).split(" Consider increasing")[0]
    hint = " (check the key: wandb login --relogin)" if "401" in text or "API key" in text else ""
    hint = (
        " (no answer: check the network, or use tracking=offline and `wandb sync` later)"
        if "imed out" in text
        else hint
    )
    return f"{text}{hint}"


@contextmanager
def _kept_beside(directory: Path) -> Iterator[None]:
    """Let W&B keep copies of artifacts' files beside its runs, not in the user's home: an offline run is then whole."""
    before = {name: os.environ.get(name) for name in _FOLDERS}
    for name in _FOLDERS:
        os.environ.setdefault(name, str(directory / "wandb"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


def _attach(run: Any, name: str, kind: str, paths: Sequence[Path]) -> None:
    import wandb

    artifact = wandb.Artifact(name, type=kind)
    for path in paths:
        artifact.add_file(str(path), name=path.name)
    run.log_artifact(artifact)


def _pages_over_time(record: Record) -> list[dict[str, Any]]:
    """Pages in use by model, thinned to a few hundred points. A model that a sample does not name has what it had."""
    series = record.series()
    times = series["time_ns"].to_numpy()
    order = np.argsort(times, kind="stable")
    distinct = np.unique(times)
    kept = set(distinct[:: max(1, len(distinct) // _MOST_SERIES_POINTS)].tolist())
    latest: dict[str, int] = {}
    points: dict[int, dict[str, Any]] = {}
    models, pages = series["model"].take(order).to_pylist(), series["pages_in_use"].take(order).to_pylist()
    for time_ns, model, in_use in zip(times[order].tolist(), models, pages, strict=True):
        latest[f"kv_pages/{model}"] = in_use
        if time_ns in kept:
            points[time_ns] = {"time_s": time_ns / 1e9, **latest}
    return list(points.values())


def _machine_over_time(record: Record) -> list[dict[str, Any]]:
    """Load of the cores, memory and GPUs, as sampled during the run."""
    return [
        {name if name == "time_s" else f"machine/{name}": value for name, value in sample.items()}
        for sample in record.content.get("system_series", [])
    ]
