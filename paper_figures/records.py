"""Reads records (runner/SCHEMA.md) from files. It knows the format and no code of the runner.

A record that cannot be read is named in a warning, counted and left out: one bad file costs one run, not the figures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet

from paper_figures.naming import named

SCHEMA_VERSION = 1
_MOST_DEVICES_NAMED = 8
_REQUIRED = ("run_id", "status", "config", "system", "backend", "metrics", "provenance")


class BadRecord(Exception):
    """A record that cannot be used. The message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Run:
    """One record. Rows are read from its files when first asked for; times in them are nanoseconds from the start."""

    path: Path
    content: dict[str, Any]

    @property
    def run_id(self) -> str:
        return self.content["run_id"]

    @property
    def experiment(self) -> str:
        return self.content.get("experiment") or self.path.parent.name

    @property
    def system(self) -> str:
        return self.content["system"]

    @property
    def named(self) -> str:
        """What the system goes by with the options of this run."""
        return named(self.system, self.options)

    @property
    def options(self) -> dict[str, Any]:
        """Of the system; none where the record tells none."""
        return (self.config.get("system") or {}).get("options") or {}

    @property
    def backend(self) -> str:
        return self.content["backend"]

    @property
    def status(self) -> str:
        return self.content["status"]

    @property
    def ok(self) -> bool:
        """Whether the run went through; one that failed or was interrupted gives no numbers."""
        return self.status == "complete"

    @property
    def reason(self) -> str:
        return self.content.get("error") or ""

    @property
    def config(self) -> dict[str, Any]:
        return self.content["config"]

    @property
    def command(self) -> str:
        return self.content.get("command") or ""

    @property
    def placement(self) -> list[dict[str, Any]]:
        """By device: role, weights by model, KV and quotas in bytes."""
        return self.content.get("placement") or []

    @property
    def metrics(self) -> dict[str, float | None]:
        return self.content["metrics"]

    @property
    def metrics_by_model(self) -> dict[str, dict[str, float | None]]:
        return self.content.get("metrics_by_model") or {}

    @property
    def dirty(self) -> bool:
        return bool((self.content["provenance"].get("git") or {}).get("dirty"))

    @property
    def shipped(self) -> bool:
        """Whether the record came with the repository, instead of being made here."""
        return bool(self.content.get("shipped"))

    @property
    def seed(self) -> str:
        """All seeds of the workload as one word; runs that differ in it alone repeat one another."""
        seeds = (self.config.get("workload") or {}).get("seeds") or {}
        values = [str(seeds[key]) for key in sorted(seeds)]
        return "/".join(values if len(set(values)) > 1 else values[:1]) or "none"

    @property
    def repeat(self) -> int:
        """Which of several runs of the same configuration, seeds too, this is."""
        return self.config.get("repeat") or 0

    @property
    def hardware(self) -> str:
        """What computed, in words: GPUs where devices are GPUs, else the CPU; then the devices and their budgets."""
        machine = self.content["provenance"].get("hardware") or {}
        kinds = {device.get("kind", "cpu") for device in self.config.get("devices") or [{}]}
        devices = self.content.get("hardware", "")
        if self.backend != "real":
            _, _, card = devices.partition("; simulated ")  # of the devices, which may state their own
            return f"modelled {card or 'hardware'} [{_told_together(devices)}]"
        if "cuda" in kinds:
            names = sorted({gpu.split(",")[0].strip() for gpu in machine.get("gpus") or []})
            return f"{', '.join(names) or 'GPU'} [{devices}]"
        return f"{' '.join((machine.get('cpu') or 'CPU').split())} [{devices}]"

    def metric(self, name: str) -> float:
        """A summary metric; NaN where the run failed or the metric is undefined."""
        value = self.metrics.get(name) if self.ok else None
        return float("nan") if value is None else float(value)

    @cached_property
    def requests(self) -> pd.DataFrame:
        return self._table("requests.parquet")

    @cached_property
    def timeline(self) -> pd.DataFrame:
        """What workers did; empty where the run was not asked for it."""
        return self._table("timeline.parquet") if (self.path / "timeline.parquet").is_file() else pd.DataFrame()

    @cached_property
    def series(self) -> pd.DataFrame:
        return self._table("series.parquet")

    @cached_property
    def pages_by_model(self) -> pd.DataFrame:
        """KV pages in use, a row a sampled time (ns) and a column a model, summed over pools; what a sample does not name is as
        it was."""
        wide = self.series.pivot_table(
            index="time_ns", columns=["pool", "model"], values="pages_in_use", aggfunc="last"
        )
        return wide.sort_index().ffill().fillna(0).T.groupby(level="model").sum().T

    def _table(self, name: str) -> pd.DataFrame:
        try:
            return pyarrow.parquet.read_table(self.path / name).to_pandas()
        except (OSError, pyarrow.ArrowException) as error:
            raise BadRecord(f"{self.path / name}: {str(error).splitlines()[0]}") from None

    def completed(self) -> pd.DataFrame:
        """Completed requests of which token times are kept: of a shipped record, some of them."""
        rows = self.requests
        return rows[(rows["outcome"] == "completed") & (rows["token_times_ns"].str.len() > 0)]

    def ttft_ms(self) -> np.ndarray:
        """First token from the planned arrival, of completed requests."""
        rows = self.completed()
        first = np.array([times[0] for times in rows["token_times_ns"]], dtype=np.int64)
        return (first - rows["planned_ns"].to_numpy()) / 1e6

    def itl_ms(self) -> np.ndarray:
        """Gaps between tokens of completed requests (TBT), pooled."""
        gaps = [np.diff(times) for times in self.completed()["token_times_ns"]]
        return np.concatenate(gaps or [np.empty(0)]) / 1e6


@dataclass(frozen=True)
class Study:
    """Something measured apart from any run of a system: its rows, and what a caption says of it as of a run."""

    path: Path
    content: dict[str, Any]

    ok = True
    dirty = shipped = False
    reason = status = system = ""
    seed = "none"
    repeat = 0
    config: ClassVar[dict[str, Any]] = {}

    @property
    def kind(self) -> str:
        return self.content["kind"]

    @property
    def run_id(self) -> str:
        return self.content["name"]

    @property
    def backend(self) -> str:
        return self.content["backend"]

    @property
    def hardware(self) -> str:
        return self.content["hardware"]

    @property
    def command(self) -> str:
        return self.content.get("command") or ""

    @property
    def rows(self) -> pd.DataFrame:
        return pd.DataFrame(self.content["rows"])


@dataclass(frozen=True)
class Records:
    """What was read below a root: runs and studies in the order of their paths, and how many records were skipped."""

    runs: tuple[Run, ...]
    studies: tuple[Study, ...] = ()
    skipped: int = 0

    def experiments(self) -> dict[str, list[Run]]:
        groups: dict[str, list[Run]] = {}
        for run in self.runs:
            groups.setdefault(run.experiment, []).append(run)
        return dict(sorted(groups.items()))


def read_run(directory: Path) -> Run:
    """Read one record. Raises :class:`BadRecord` for one that is corrupt, partial or of another schema version."""
    path = directory / "record.json"
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadRecord(f"{path}: cannot be read ({error})") from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise BadRecord(f"{path}: schema version {version!r}, and these figures read version {SCHEMA_VERSION}")
    missing = [key for key in _REQUIRED if key not in content]
    if missing:
        raise BadRecord(f"{path}: no {', '.join(missing)}")
    run = Run(directory, content)
    for name in ("requests.parquet", "series.parquet") if run.ok else ():
        try:
            pyarrow.parquet.read_metadata(directory / name)
        except (OSError, pyarrow.ArrowException) as error:
            raise BadRecord(f"{directory / name}: cannot be read ({str(error).splitlines()[0]})") from None
    return run


def read_study(path: Path) -> Study:
    """Read one study.json, or a `kernels.json` as the kernels' bench writes it. Raises :class:`BadRecord`."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadRecord(f"{path}: cannot be read ({error})") from None
    if isinstance(content, dict) and path.name == "kernels.json" and "rows" in content:
        named = {key: content.get(key) for key in ("device", "torch", "ceilings")}
        told = {"kind": "kernels", "name": path.parent.name, "backend": "real", "hardware": str(content.get("device"))}
        content = {"schema_version": SCHEMA_VERSION, **told, "measured_with": named, "rows": content["rows"]}
    missing = [key for key in ("kind", "name", "backend", "hardware", "rows") if key not in content]
    if content.get("schema_version") != SCHEMA_VERSION or missing:
        raise BadRecord(
            f"{path}: is no study of schema version {SCHEMA_VERSION} (missing: {', '.join(missing) or 'none'})"
        )
    return Study(path.parent, content)


def _directories(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("record.json")):
        if not any(part.startswith(".") for part in path.relative_to(root).parts):
            yield path.parent


def read_records(roots: Sequence[Path]) -> Records:
    """All records and studies below `roots`."""
    runs, studies, skipped = [], [], 0
    for root in roots:
        for path in sorted([*root.rglob("study.json"), *root.rglob("kernels.json")]):
            try:
                studies.append(read_study(path))
            except BadRecord as error:
                print(f"warning: skipped {error}", file=sys.stderr)
                skipped += 1
        for directory in _directories(root):
            try:
                runs.append(read_run(directory))
            except BadRecord as error:
                print(f"warning: skipped {error}", file=sys.stderr)
                skipped += 1
    return Records(tuple(runs), tuple(studies), skipped)


def _told_together(devices: str) -> str:
    """Many devices of one size as their number; others as they are."""
    listed, mark, rest = devices.partition("; ")
    sizes = [device.partition(" (")[2].rstrip(")") for device in listed.split(", ")]
    if len(sizes) <= _MOST_DEVICES_NAMED or len(set(sizes)) > 1:
        return devices
    return f"{len(sizes)} devices of {sizes[0]}{mark}{rest}"
