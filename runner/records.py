"""Records: what a run leaves on disk, whole or not at all. The format is described in SCHEMA.md and versioned.

<results_dir>/<experiment>/<system>-<hash>/record.json       who, what, where, summary metrics
                                           requests.parquet  one row a request
                                           series.parquet    pages in use over time
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from runner.observation import PoolRow, RequestRow
from serving.errors import UserError

SCHEMA_VERSION = 1
RECORD_FILE, REQUESTS_FILE, SERIES_FILE = "record.json", "requests.parquet", "series.parquet"
TIMELINE_FILE, STUDY_FILE = "timeline.parquet", "study.json"
COMPLETE, INTERRUPTED, FAILED = "complete", "interrupted", "failed"
STATUSES = (COMPLETE, INTERRUPTED, FAILED)
_TYPES = {
    "schema_version": int,
    "run_id": str,
    "config_hash": str,
    "status": str,
    "error": str,
    "experiment": str,
    "system": str,
    "backend": str,
    "hardware": str,
    "config": dict,
    "provenance": dict,
    "metrics": dict,
}
_TYPES_OF_COMPLETE = {"metrics_by_model": dict, "seeds": dict, "trace": dict, "placement": list}

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
        """One row a request. Raises UserError where the file is damaged."""
        return _read_rows(self.path / REQUESTS_FILE)

    def series(self) -> pa.Table:
        """Pages in use over time. Raises UserError where the file is damaged."""
        return _read_rows(self.path / SERIES_FILE)


def write_record(
    directory: Path,
    content: dict[str, Any],
    requests: Sequence[RequestRow],
    pools: Sequence[PoolRow],
    timeline: pa.Table | None = None,
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
        if timeline is not None:
            pq.write_table(timeline, partial / TIMELINE_FILE, compression="zstd")
        with (partial / RECORD_FILE).open("w") as file:
            json.dump({"schema_version": SCHEMA_VERSION, **content}, file, indent=1, sort_keys=True, default=str)
            file.flush()
            os.fsync(file.fileno())
        _swap_in(partial, directory)
    except (OSError, pa.ArrowException) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else (getattr(error, "strerror", None) or str(error))
        raise UserError(f"record {directory}: cannot be written: {what}; nothing was kept of this run") from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return directory


def _write_rows(path: Path, rows: Sequence[RequestRow] | Sequence[PoolRow], schema: pa.Schema) -> None:
    columns = [
        pa.array([getattr(row, field.name) for row in rows], field.type) for field in schema
    ]  # one list at a time
    pq.write_table(pa.table(columns, schema=schema), path, compression="zstd")


def _swap_in(partial: Path, directory: Path) -> None:
    """Put `partial` in the place of `directory`; an older record is left in `partial`, for the caller to remove. Whoever
    reads meanwhile sees the old record or the new one, where the file system can exchange two directories."""
    try:
        partial.rename(directory)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if not _exchange(partial, directory):
        old = partial.with_name(f"{partial.name}-old")
        directory.rename(old)
        partial.rename(directory)
        old.rename(partial)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    at_fdcwd, rename_exchange = -100, 2
    return renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0


def require_writable(directory: Path) -> None:
    """Raises UserError unless records can be written below `directory`: better before a run than after it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(f"results directory {directory} cannot be written: {error.strerror or error}") from None


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
    wrong = _what_is_wrong(content)
    if wrong:
        raise UserError(f"{path}: {wrong}")
    for name, schema in ((REQUESTS_FILE, _REQUEST_SCHEMA), (SERIES_FILE, _SERIES_SCHEMA)):
        try:
            found = pq.read_schema(directory / name)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{directory / name}: is corrupt ({str(error).splitlines()[0]})") from None
        if not found.equals(schema):
            raise UserError(f"{directory / name}: is corrupt (its columns are not those of the schema)")
    return Record(directory, content)


def _what_is_wrong(content: Any) -> str:
    """What keeps `content` of a record.json from being one; empty where nothing does."""
    if not isinstance(content, dict):
        return "is corrupt (no mapping)"
    if content.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        return f"has schema version {content['schema_version']}, this code reads {SCHEMA_VERSION}"
    types = _TYPES | (_TYPES_OF_COMPLETE if content.get("status") == COMPLETE else {})
    missing = [key for key in types if key not in content]
    if missing:
        return f"is corrupt (missing {', '.join(missing)})"
    wrong = [key for key, kind in types.items() if not isinstance(content[key], kind)]
    if wrong or content["status"] not in STATUSES:
        return f"is corrupt ({', '.join(wrong) or 'status'} makes no sense)"
    return ""


def _read_rows(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: is corrupt ({str(error).splitlines()[0]})") from None


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
