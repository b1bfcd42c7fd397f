"""Records of soaks: one JSON file a system, a small one of all that ships with the repository, and the table of either."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runner.soak_judges import second_half
from serving.errors import UserError

SCHEMA_VERSION = 1


def write(record: dict[str, Any], out: Path) -> Path:
    path = out / f"{record['system']}.json"
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(record) + "\n")
    partial.replace(path)
    return path


def ship(out: Path, target: Path) -> int:
    """Put what `out` holds, without series, into one file, and say how many systems that is. Raises UserError for none."""
    records = [json.loads(path.read_text()) for path in sorted(out.glob("[!.]*.json"))]
    if not records:
        raise UserError(f"{out}: holds no record of a soak; make some with: python -m runner.soak")
    kept = [
        {
            **{key: value for key, value in record.items() if key not in ("series", "config")},
            "memory_bytes": _end(record),
        }
        for record in records
    ]
    target.write_text(json.dumps({"schema_version": SCHEMA_VERSION, "systems": kept}, indent=1) + "\n")
    return len(records)


def shipped(path: Path) -> list[dict[str, Any]]:
    """The records that :func:`ship` has put there. Raises UserError."""
    try:
        content = json.loads(path.read_text())
        if content["schema_version"] != SCHEMA_VERSION:
            raise UserError(f"{path}: has schema version {content['schema_version']}, this reads {SCHEMA_VERSION}")
        return content["systems"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: holds no shipped soak ({type(error).__name__})") from None


def table(records: Sequence[dict[str, Any]]) -> str:
    """One line a system, for reading; what did not pass stands in capitals and is told below."""
    rows = [
        ["system", "sent", "completed", "rejected", "cancelled", "preempted", "minutes", "memory MiB", "growth", ""]
    ]
    for record in records:
        counts, memory = record["counts"], next(j for j in record["judgements"] if j["name"] == "memory")
        grown, end_bytes = memory["value"], _end(record)
        rows.append(
            [
                record["system"],
                *(str(counts.get(name, 0)) for name in ("sent", "completed", "rejected", "cancelled", "preempted")),
                f"{record['took_s'] / 60:.1f}",
                f"{end_bytes / 2**20:.0f}" if end_bytes is not None else "-",
                f"{grown:+.2%}" if grown is not None else "-",
                "PASS" if record["passed"] else "FAILED",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    aligned = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def _end(record: dict[str, Any]) -> float | None:
    """Bytes of memory at the end, as they were judged; None where none were sampled."""
    if "memory_bytes" in record:  # shipped
        return record["memory_bytes"]
    values = record["series"].get("memory_bytes")
    return second_half(values)[1] if values else None
