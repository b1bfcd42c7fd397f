"""Records: what a run leaves on disk, whole or not at all. The format is described in SCHEMA.md and versioned.

<results_dir>/<experiment>/<system>-<hash>/record.json       who, what, where, summary metrics
                                           requests.parquet  one row a request
                                           series.parquet    pages in use over time
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from runner.observation import PoolRow, RequestRow
from serving.errors import UserError

SCHEMA_VERSION = 1
RECORD_FILE, REQUESTS_FILE, SERIES_FILE = "record.json", "requests.parquet", "series.parquet"
COMPLETE, INTERRUPTED, FAILED = "complete", "interrupted", "failed"
_REQUIRED = (
    "schema_version",
    "run_id",
    "config_hash",
    "status",
    "config",
    "system",
    "backend",
    "metrics",
    "provenance",
)

_REQUEST_SCHEMA = pa.schema(
    [
        ("request_id", pa.int64()),
        ("model", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("output_tokens", pa.int32()),
        ("planned_ns", pa.int64()),
        ("submitted_ns", pa.int64()),
        ("admitted_ns", pa.int64()),
        ("ended_ns", pa.int64()),
        ("outcome", pa.string()),
        ("reason", pa.string()),
        ("preemptions", pa.int32()),
        ("token_times_ns", pa.list_(pa.int64())),
        ("token_ids", pa.list_(pa.int32())),
    ]
)
_SERIES_SCHEMA = pa.schema(
    [
        ("time_ns", pa.int64()),
        ("pool", pa.string()),
        ("model", pa.string()),
        ("pages_in_use", pa.int32()),
        ("page_budget", pa.int32()),
        ("page_bytes", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Record:
    """A record as read back: its directory, and `record.json` as a dict. Rows are read when asked for."""

    path: Path
    content: dict[str, Any]

    @property
    def status(self) -> str:
        return self.content["status"]

    @property
    def metrics(self) -> dict[str, float | None]:
        return self.content["metrics"]

    def requests(self) -> pa.Table:
        return pq.read_table(self.path / REQUESTS_FILE)

    def series(self) -> pa.Table:
        return pq.read_table(self.path / SERIES_FILE)


def write_record(
    directory: Path, content: dict[str, Any], requests: Sequence[RequestRow], pools: Sequence[PoolRow]
) -> Path:
    """Write a record to `directory`, replacing an older one of the same run. Raises UserError, leaving nothing
    half-written, where the disk is full or the place cannot be written."""
    partial: Path | None = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        partial.chmod(0o755)
        _write_rows(partial / REQUESTS_FILE, requests, _REQUEST_SCHEMA)
        _write_rows(partial / SERIES_FILE, pools, _SERIES_SCHEMA)
        with (partial / RECORD_FILE).open("w") as file:
            json.dump({"schema_version": SCHEMA_VERSION, **content}, file, indent=1, sort_keys=True, default=str)
            file.flush()
            os.fsync(file.fileno())
        _swap_in(partial, directory)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else (error.strerror or str(error))
        raise UserError(f"record {directory}: cannot be written: {what}; nothing was kept of this run") from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return directory


def _write_rows(path: Path, rows: Sequence[RequestRow] | Sequence[PoolRow], schema: pa.Schema) -> None:
    columns = {name: [getattr(row, name) for row in rows] for name in schema.names}
    pq.write_table(pa.table(columns, schema=schema), path, compression="zstd")


def _swap_in(partial: Path, directory: Path) -> None:
    """Put `partial` in the place of `directory`; whoever reads meanwhile sees the old record or the new one."""
    old = None
    if directory.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{directory.name}-old-", dir=directory.parent)) / "record"
        directory.rename(old)
    try:
        partial.rename(directory)
    except OSError:
        # Another process wrote the same run in between; its record is as good as this one.
        if not (directory / RECORD_FILE).exists():
            raise
    finally:
        if old is not None:
            shutil.rmtree(old.parent, ignore_errors=True)


def read_record(directory: str | Path) -> Record:
    """Read a record back. Raises UserError naming the file for one that is missing, corrupt or of another version."""
    directory = Path(directory)
    path = directory / RECORD_FILE
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such record") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is corrupt ({error})") from None
    missing = [key for key in _REQUIRED if not isinstance(content, dict) or key not in content]
    if missing:
        raise UserError(f"{path}: is corrupt (missing {', '.join(missing)})")
    if content["schema_version"] != SCHEMA_VERSION:
        raise UserError(f"{path}: has schema version {content['schema_version']}, this code reads {SCHEMA_VERSION}")
    for name in (REQUESTS_FILE, SERIES_FILE):
        try:
            pq.read_metadata(directory / name)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{directory / name}: is corrupt ({str(error).splitlines()[0]})") from None
    return Record(directory, content)


def record_directories(root: str | Path) -> Iterator[Path]:
    """Directories below `root` that hold a record, in order of name."""
    for path in sorted(Path(root).rglob(RECORD_FILE)):
        if not any(part.startswith(".") for part in path.relative_to(root).parts):
            yield path.parent


def read_records(root: str | Path) -> tuple[list[Record], int]:
    """All records below `root`, and how many were skipped; each skipped one is named on standard error."""
    records, skipped = [], 0
    for directory in record_directories(root):
        try:
            records.append(read_record(directory))
        except UserError as error:
            print(f"warning: skipped {error}", file=sys.stderr)
            skipped += 1
    return records, skipped


def plain(value: Any) -> dict[str, Any]:
    """A dataclass as plain data, for `record.json`."""
    return asdict(value)
