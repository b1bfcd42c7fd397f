"""Traces as files: JSON lines (a header, then a request a line) or Parquet, written and read back bit for bit.

Columns are kept, and of prompts what they are made from: a million requests are some 90 MB of JSON lines or 15 MB of
Parquet. Token ids stand in the file where they cannot be made again from a seed, that is where prompts are text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from workloads.columnar import ModelLimits, Trace
from workloads.errors import WorkloadError
from workloads.prompts import PromptPlan, Ragged
from workloads.tables import NAME, SECONDS, TOKEN_LISTS, TOKENS, line_of_row, numbers, numpy_column, read_jsonl

SUFFIXES = (".jsonl", ".parquet")
_VERSION = 1
_METADATA_KEY = b"crosspool_trace"
_FIELDS = {"arrival_s": SECONDS, "model": NAME, "prompt_tokens": TOKENS, "output_tokens": TOKENS}
_RAGGED = {"hash_ids": "hashes", "prompt_ids": "prompt_ids"}  # column of the file, attribute of the trace
_ROWS_AT_ONCE = 1 << 16


def write_trace(trace: Trace, path: Path) -> str:
    """Write `trace` to a .jsonl or .parquet file, whole or not at all. Returns its digest. Raises WorkloadError."""
    _check_suffix(path)
    header = {
        "version": _VERSION,
        "digest": trace.digest,
        "requests": len(trace),
        "duration_s": trace.duration_s,
        "models": [asdict(limits) for limits in trace.models],
        "prompts": asdict(trace.prompts),
        "ragged": [column for column, attribute in _RAGGED.items() if getattr(trace, attribute) is not None],
        "keyed": trace.prompt_keys is not None,
        "made": dict(trace.made),
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            (_write_parquet if path.suffix == ".parquet" else _write_jsonl)(trace, header, partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise WorkloadError(f"{path}: cannot be written ({error.strerror or error})") from None
    return header["digest"]


def read_trace(path: Path) -> Trace:
    """The trace of a file that :func:`write_trace` wrote. Raises WorkloadError where it is not one, or not whole, or not
    what its digest says."""
    _check_suffix(path)
    if not path.is_file():
        raise WorkloadError(f"{path}: no such trace file")
    if path.suffix == ".parquet":
        header, table, skip = *_read_parquet(path), None
    else:
        header = _jsonl_header(path)
        fields = _FIELDS | dict.fromkeys(header["ragged"], TOKEN_LISTS)
        fields |= {"prompt_key": TOKENS} if header["keyed"] else {}
        table, skip = (read_jsonl(path, fields, skip_lines=1) if header["requests"] else None), 1
    trace = _trace(path, header, table, skip)
    if trace.digest != header["digest"]:
        raise WorkloadError(f"{path}: its digest is {trace.digest[:16]}..., the header says {header['digest'][:16]}...")
    return trace


def trace_for(path: Path, models: Sequence[ModelLimits]) -> Trace:
    """The trace of a file, for systems that serve `models`: each asked model must be served and hold what is asked.
    Raises WorkloadError."""
    trace = read_trace(path)
    served = {limits.name: limits for limits in models}
    longest = np.zeros(len(trace.models), dtype=np.int64)
    np.maximum.at(longest, trace.model, trace.prompt_tokens.astype(np.int64) + trace.output_tokens)
    for limits, most in zip(trace.models, longest.tolist(), strict=True):
        if most == 0:
            continue
        if limits.name not in served:
            raise WorkloadError(f"{path}: unknown model {limits.name!r}; served: {', '.join(served)}")
        mine = served[limits.name]
        if most > mine.max_context_tokens:
            raise WorkloadError(
                f"{path}: model {limits.name} is asked for {most} tokens; its context is {mine.max_context_tokens}"
            )
        if trace.prompts.kind != "none" and mine.vocab_size != limits.vocab_size:
            raise WorkloadError(
                f"{path}: prompts were made for a vocabulary of {limits.vocab_size}; model {limits.name} has "
                f"{mine.vocab_size}"
            )
    return trace


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise WorkloadError(f"{path}: a trace file ends in {' or '.join(SUFFIXES)}")


def _write_jsonl(trace: Trace, header: dict[str, Any], path: Path) -> None:
    names = [json.dumps(limits.name) for limits in trace.models]
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"crosspool_trace": header}) + "\n")
        for start in range(0, len(trace), _ROWS_AT_ONCE):
            stop = min(start + _ROWS_AT_ONCE, len(trace))
            columns = [trace.arrival_s, trace.model, trace.prompt_tokens, trace.output_tokens]
            rows = zip(*(column[start:stop].tolist() for column in columns), _extras(trace, start, stop), strict=True)
            file.writelines(
                f'{{"arrival_s":{arrival!r},"model":{names[model]},"prompt_tokens":{prompt},"output_tokens":{output}'
                f"{extra}}}\n"
                for arrival, model, prompt, output, extra in rows
            )


def _extras(trace: Trace, start: int, stop: int) -> Iterator[str]:
    """What stands at the end of each line: the lists of a request, where the trace has them."""
    for index in range(start, stop):
        parts = "" if trace.prompt_keys is None else f',"prompt_key":{trace.prompt_keys[index]}'
        for column, attribute in _RAGGED.items():
            ragged: Ragged | None = getattr(trace, attribute)
            if ragged is not None:
                items = ragged.values[ragged.offsets[index] : ragged.offsets[index + 1]].tolist()
                parts += f',"{column}":{json.dumps(items, separators=(",", ":"))}'
        yield parts


def _write_parquet(trace: Trace, header: dict[str, Any], path: Path) -> None:
    import pyarrow.parquet

    columns: dict[str, Any] = {
        "arrival_s": trace.arrival_s,
        "model": pa.DictionaryArray.from_arrays(pa.array(trace.model), [limits.name for limits in trace.models]),
        "prompt_tokens": trace.prompt_tokens,
        "output_tokens": trace.output_tokens,
    }
    if trace.prompt_keys is not None:
        columns["prompt_key"] = trace.prompt_keys
    for column, attribute in _RAGGED.items():
        ragged: Ragged | None = getattr(trace, attribute)
        if ragged is not None:
            columns[column] = pa.LargeListArray.from_arrays(ragged.offsets, pa.array(ragged.values))
    table = pa.table(columns).replace_schema_metadata({_METADATA_KEY: json.dumps(header).encode()})
    pyarrow.parquet.write_table(table, path)


def _read_parquet(path: Path) -> tuple[dict[str, Any], pa.Table]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        header = json.loads(table.schema.metadata[_METADATA_KEY])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise WorkloadError(f"{path}: no trace file ({str(error).splitlines()[0][:120]})") from None
    return _checked_header(path, header), table


def _jsonl_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        first = file.readline()
    if not first:
        raise WorkloadError(f"{path}: the file is empty")
    try:
        header = json.loads(first)["crosspool_trace"]
    except (ValueError, KeyError, TypeError):
        raise WorkloadError(f"{path}:1: no trace header; the file was not written by `workloads generate`") from None
    return _checked_header(path, header)


def _checked_header(path: Path, header: Any) -> dict[str, Any]:
    wanted = ("version", "digest", "requests", "duration_s", "models", "prompts", "ragged", "keyed", "made")
    missing = [key for key in wanted if not isinstance(header, dict) or key not in header]
    if missing:
        raise WorkloadError(f"{path}:1: the trace header has no {', '.join(missing)}")
    if header["version"] != _VERSION:
        raise WorkloadError(f"{path}:1: the trace is of version {header['version']}; this reads version {_VERSION}")
    return header


def _trace(path: Path, header: dict[str, Any], table: pa.Table | None, skip: int | None) -> Trace:
    def at(row: int) -> str:
        return f"{path}: row {row + 1}" if skip is None else f"{path}:{line_of_row(path, row, skip)}"

    models = tuple(ModelLimits(**limits) for limits in header["models"])
    rows = table.num_rows if table is not None else 0
    if rows != header["requests"]:
        raise WorkloadError(f"{path}: {rows} requests, the header says {header['requests']}: the file is not whole")
    if table is None:
        table = pa.table({name: pa.array([], pa.string() if name == "model" else pa.float64()) for name in _FIELDS})
    model = _model_indices(table, [limits.name for limits in models], at)
    arrival_s = numpy_column(table, "arrival_s").astype(np.float64)
    backwards = np.flatnonzero(np.diff(arrival_s) < 0)
    if len(backwards):
        raise WorkloadError(f"{at(int(backwards[0]) + 1)}: requests must be in order of arrival")
    lengths = [numpy_column(table, name).astype(np.int32) for name in ("prompt_tokens", "output_tokens")]
    ragged = {_RAGGED[name]: _ragged(table, name) for name in header["ragged"]}
    keys = numpy_column(table, "prompt_key").astype(np.int64) if header["keyed"] else None
    return Trace(
        models, header["duration_s"], arrival_s, model, *lengths, PromptPlan(**header["prompts"]), **ragged,
        prompt_keys=keys, made=header["made"],
    )  # fmt: skip


def _model_indices(table: pa.Table, names: list[str], at: Any) -> np.ndarray:
    encoded = table.column("model").combine_chunks()
    if not pa.types.is_dictionary(encoded.type):
        encoded = encoded.dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0) if encoded.num_chunks else pa.array([], pa.string()).dictionary_encode()
    own = encoded.dictionary.to_pylist()
    indices = numbers(encoded.indices).astype(np.int32)
    place = {name: index for index, name in enumerate(names)}
    for code, name in enumerate(own):
        if name not in place and (indices == code).any():
            row = int(np.flatnonzero(indices == code)[0])
            raise WorkloadError(f"{at(row)}: unknown model {name!r}; the header knows {', '.join(names)}")
    return np.array([place.get(name, 0) for name in own] or [0], dtype=np.int32)[indices]


def _ragged(table: pa.Table, column: str) -> Ragged:
    """One list column; hashes are 64 bit, token ids 32 bit, as they were."""
    lists = table.column(column).combine_chunks()
    offsets = numbers(lists.offsets).astype(np.int64)
    return Ragged(offsets - offsets[0], numbers(lists.flatten()).astype(np.int64 if column == "hash_ids" else np.int32))
