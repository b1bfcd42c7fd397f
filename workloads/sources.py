"""Real traces as columns: Azure, Mooncake, BurstGPT, plain lengths; text data sets by :mod:`workloads.text`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from workloads.config import Source
from workloads.errors import WorkloadError
from workloads.known import known_by_checksum
from workloads.prompts import Ragged
from workloads.tables import (
    SECONDS,
    STAMP,
    TOKEN_LISTS,
    TOKENS,
    line_of_row,
    numbers,
    numpy_column,
    read_csv,
    read_jsonl,
)
from workloads.validate import TEXT_FORMATS

if TYPE_CHECKING:
    from workloads.text import TextRows

DIRECTORY_VARIABLE = "WORKLOAD_TRACES"


@dataclass(frozen=True, eq=False)
class SourceRows:
    """What a file holds [R]. `arrival_s` (from the file's own zero) and `hashes` where it has them; `texts` where lengths
    depend on who counts. `identity` goes into the record."""

    identity: dict[str, Any]
    arrival_s: np.ndarray | None
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    hashes: Ragged | None = None
    texts: TextRows | None = None


def load_source(source: Source) -> SourceRows:
    """Read what `source` names. Raises WorkloadError that names the file and, for a bad row, its line."""
    if source.format in TEXT_FORMATS:
        from workloads.text import load_texts

        texts = load_texts(source, find_file(source, required=False))
        none = np.empty(0, dtype=np.int64)
        return SourceRows(texts.identity, None, none, none, texts=texts)
    path = find_file(source)
    with ThreadPoolExecutor(1) as beside:  # hashing takes a third of the time of reading
        identified = beside.submit(file_identity, path)
        rows, dropped = _READERS[source.format](path)
    if source.max_rows:
        rows = _head(rows, source.max_rows)
    if rows.arrival_s is not None:
        _check_order(path, rows.arrival_s, skip_lines=0 if source.format == "mooncake" else 1)
    identity = identified.result() | {"format": source.format, "rows": len(rows.prompt_tokens), "dropped_rows": dropped}
    return SourceRows(identity, rows.arrival_s, rows.prompt_tokens, rows.output_tokens, rows.hashes)


def find_file(source: Source, required: bool = True) -> Path | None:
    """Where the source's file lies. Raises WorkloadError that lists where it was looked for, None if not `required`."""
    directories = [source.directory or os.environ.get(DIRECTORY_VARIABLE, ""), ""]
    places = [Path(directory) / source.path for directory in dict.fromkeys(directories)]
    for place in places:
        if place.is_file():
            return place
    if not required:
        return None
    raise WorkloadError(
        f"workload.source.path: no file {source.path} (looked at {', '.join(map(str, places))}); "
        f"set workload.source.directory or {DIRECTORY_VARIABLE} to the directory of the traces"
    )


def file_identity(path: Path) -> dict[str, Any]:
    """Name and checksum, and whether this is one of the files whose statistics are known."""
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    known = known_by_checksum(checksum)
    return {"file": path.name, "sha256": checksum, "published_as": known.file if known else None}


def _azure(path: Path) -> tuple[SourceRows, int]:
    table = read_csv(path, {"TIMESTAMP": STAMP, "ContextTokens": TOKENS, "GeneratedTokens": TOKENS})
    stamps = numpy_column(table, "TIMESTAMP").astype("datetime64[ns]").astype(np.int64)
    return _rows((stamps - stamps[0]) / 1e9, table, "ContextTokens", "GeneratedTokens"), 0


def _lengths(path: Path) -> tuple[SourceRows, int]:
    table = read_csv(path, {"ContextTokens": TOKENS, "GeneratedTokens": TOKENS})
    return _rows(None, table, "ContextTokens", "GeneratedTokens"), 0


def _mooncake(path: Path) -> tuple[SourceRows, int]:
    fields = {"timestamp": SECONDS, "input_length": TOKENS, "output_length": TOKENS, "hash_ids": TOKEN_LISTS}
    table = read_jsonl(path, fields)
    lists = table.column("hash_ids").combine_chunks()
    offsets = numbers(lists.offsets).astype(np.int64)
    hashes = Ragged(offsets - offsets[0], numbers(lists.flatten()))
    return _rows(numpy_column(table, "timestamp") / 1e3, table, "input_length", "output_length", hashes), 0


def _burstgpt(path: Path) -> tuple[SourceRows, int]:
    """Failed requests, which have no response tokens in this data set, are dropped and counted."""
    table = read_csv(path, {"Timestamp": SECONDS, "Request tokens": TOKENS, "Response tokens": TOKENS})
    answered = numpy_column(table, "Response tokens") > 0
    if not answered.any():
        raise WorkloadError(f"{path}: no row has response tokens")
    kept = table.filter(pa.array(answered))
    rows = _rows(numpy_column(kept, "Timestamp"), kept, "Request tokens", "Response tokens")
    return rows, int((~answered).sum())


_READERS: dict[str, Callable[[Path], tuple[SourceRows, int]]] = {
    "azure": _azure,
    "lengths": _lengths,
    "mooncake": _mooncake,
    "burstgpt": _burstgpt,
}


def _rows(
    arrival_s: np.ndarray | None, table: pa.Table, prompt: str, output: str, hashes: Ragged | None = None
) -> SourceRows:
    return SourceRows({}, arrival_s, numpy_column(table, prompt), numpy_column(table, output), hashes)


def _head(rows: SourceRows, count: int) -> SourceRows:
    hashes = rows.hashes and rows.hashes.take(np.arange(min(count, len(rows.prompt_tokens))))
    arrival_s = None if rows.arrival_s is None else rows.arrival_s[:count]
    return SourceRows(rows.identity, arrival_s, rows.prompt_tokens[:count], rows.output_tokens[:count], hashes)


def _check_order(path: Path, arrival_s: np.ndarray, skip_lines: int) -> None:
    backwards = np.flatnonzero(np.diff(arrival_s) < 0)
    if len(backwards):
        row = int(backwards[0]) + 1
        raise WorkloadError(
            f"{path}:{line_of_row(path, row, skip_lines)}: the timestamp lies {arrival_s[row - 1] - arrival_s[row]:g} s before the one above it; "
            "rows must be in order of time"
        )
