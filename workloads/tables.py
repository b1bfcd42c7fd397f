"""Reads columns from CSV and JSON lines: fast where the file is good, and with file and line named where it is not.

Good files go through Arrow's readers, which say little about a bad row. When they object, or a value is missing or negative,
the file is read again line by line until the row is found."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json

from workloads.errors import WorkloadError

TOKENS, SECONDS, STAMP, TOKEN_LISTS, NAME = "tokens", "seconds", "stamp", "token lists", "name"
_ARROW = {
    TOKENS: pa.int64(),
    SECONDS: pa.float64(),
    STAMP: pa.timestamp("ns"),
    TOKEN_LISTS: pa.list_(pa.int64()),
    NAME: pa.string(),
}
_NUMPY = {
    pa.int32(): np.int32,
    pa.int64(): np.int64,
    pa.float64(): np.float64,
    pa.timestamp("ns"): np.dtype("datetime64[ns]"),
}
_JSON_BLOCK_BYTES = 4 << 20
MOST_TOKENS = 2**31 - 1


def read_csv(path: Path, fields: Mapping[str, str]) -> pa.Table:
    """The columns `fields` (name to kind) of a CSV with a header. Raises WorkloadError that names file and line."""
    types = {name: _ARROW[kind] for name, kind in fields.items()}
    options = pyarrow.csv.ConvertOptions(
        column_types=types, include_columns=list(fields), strings_can_be_null=True, null_values=[""]
    )
    _not_empty(path)
    try:
        table = pyarrow.csv.read_csv(path, convert_options=options)
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        _find(path, _csv_rows(path, fields), fields)
        raise WorkloadError(f"{path}: cannot be read as CSV ({_brief(error)})") from None
    return _checked(path, table, fields, _csv_rows)


def read_jsonl(path: Path, fields: Mapping[str, str], skip_lines: int = 0) -> pa.Table:
    """The columns `fields` of a file of one JSON object a line, past the first `skip_lines`. Raises WorkloadError that
    names file and line."""
    schema = pa.schema([(name, _ARROW[kind]) for name, kind in fields.items()])
    parse = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    _not_empty(path)
    try:
        with path.open("rb") as file:
            for _ in range(skip_lines):
                file.readline()
            options = pyarrow.json.ReadOptions(block_size=_JSON_BLOCK_BYTES)
            table = pyarrow.json.read_json(file, read_options=options, parse_options=parse)
    except pa.ArrowInvalid as error:
        _find(path, _json_rows(path, fields, skip_lines), fields)
        raise WorkloadError(f"{path}: cannot be read as JSON lines ({_brief(error)})") from None
    return _checked(path, table, fields, _json_rows, skip_lines)


def numpy_column(table: pa.Table, name: str) -> np.ndarray:
    """One column without nulls as an array."""
    return numbers(table.column(name).combine_chunks())


def numbers(array: pa.Array) -> np.ndarray:
    """Numbers without nulls, as they lie in Arrow's memory. Arrow's own conversion imports pandas first, 0.3 s."""
    if not len(array):
        return np.empty(0, dtype=_NUMPY[array.type])
    values = np.frombuffer(array.buffers()[1], dtype=_NUMPY[array.type])
    return values[array.offset : array.offset + len(array)]


def line_of_row(path: Path, row: int, skip_lines: int) -> int:
    """The line, counted from 1, on which data row `row`, counted from 0, stands; blank lines are no rows."""
    with path.open("rb") as file:
        seen = -1
        for number, line in enumerate(file, 1):
            if number > skip_lines and line.strip():
                seen += 1
                if seen == row:
                    return number
    raise IndexError(row)


def _not_empty(path: Path) -> None:
    try:
        if path.stat().st_size == 0:
            raise WorkloadError(f"{path}: the file is empty")
    except OSError as error:
        raise WorkloadError(f"{path}: cannot be read ({error.strerror})") from None


def _checked(path: Path, table: pa.Table, fields: Mapping[str, str], rows: Any, *skip: int) -> pa.Table:
    if not table.num_rows:
        raise WorkloadError(f"{path}: the file has no rows")
    for name, kind in fields.items():
        column = table.column(name)
        if column.null_count or not _in_range(column, kind):
            _find(path, rows(path, fields, *skip), fields)
            raise WorkloadError(f"{path}: column {name} has missing or impossible values")
    return table


def _in_range(column: pa.ChunkedArray, kind: str) -> bool:
    if kind not in (TOKENS, SECONDS):
        return True
    values = numbers(column.combine_chunks())
    most = MOST_TOKENS if kind == TOKENS else np.finfo(float).max
    return bool(((values >= 0) & (values <= most)).all())


def _csv_rows(path: Path, fields: Mapping[str, str]) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        missing = [name for name in fields if name not in (reader.fieldnames or ())]
        if missing:
            raise WorkloadError(f"{path}:1: no column {', '.join(missing)}; the header is {reader.fieldnames}")
        for row in reader:
            if None in row or None in row.values():
                raise WorkloadError(f"{path}:{reader.line_num}: the row has not {len(reader.fieldnames)} fields")
            yield reader.line_num, row


def _json_rows(path: Path, fields: Mapping[str, str], skip: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if number <= skip or not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise WorkloadError(f"{path}:{number}: no JSON ({error})") from None
            if not isinstance(row, dict):
                raise WorkloadError(f"{path}:{number}: a JSON object is wanted, got {type(row).__name__}")
            yield number, row


def _find(path: Path, rows: Iterator[tuple[int, dict[str, Any]]], fields: Mapping[str, str]) -> None:
    """Raises WorkloadError for the first bad row, if there is one."""
    for number, row in rows:
        for name, kind in fields.items():
            value = row.get(name)
            if value is None or value == "":
                raise WorkloadError(f"{path}:{number}: no {name}")
            if not _good(value, kind):
                raise WorkloadError(f"{path}:{number}: {name} is {value!r}; {_WANTED[kind]}")


_WANTED = {
    TOKENS: "a whole number of 0 or more is wanted",
    SECONDS: "a number of 0 or more is wanted",
    STAMP: "a time like 2023-11-16 18:15:46.68 is wanted",
    TOKEN_LISTS: "a list of whole numbers is wanted",
    NAME: "a name is wanted",
}


def _good(value: Any, kind: str) -> bool:
    """Whether one value, from JSON or as text from CSV, is of its kind."""
    if kind == TOKEN_LISTS:
        return isinstance(value, list) and all(type(item) is int for item in value)
    if kind == NAME:
        return isinstance(value, str)
    try:
        if kind == STAMP:
            return not np.isnat(np.datetime64(value))
        if isinstance(value, bool):
            return False
        number = int(value) if kind == TOKENS and not isinstance(value, float) else float(value)
    except (TypeError, ValueError):
        return False
    if kind == TOKENS:
        return isinstance(number, int) and 0 <= number <= MOST_TOKENS
    return math.isfinite(number) and number >= 0


def _brief(error: Exception) -> str:
    return str(error).split("\n")[0][:160]
