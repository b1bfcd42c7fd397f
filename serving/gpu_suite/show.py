"""`python -m serving.gpu_suite.show DIR`: the tables of a suite's results, as Markdown, from its files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serving.errors import UserError, command


def _rows(path: Path) -> list[dict]:
    try:
        return [row for row in _measured(path) if "error" not in row]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a result of python -m serving.gpu_suite") from None


def _measured(path: Path) -> Any:
    """What was measured; a file of the first runs holds nothing else."""
    content = json.loads(path.read_text())
    return content["rows"] if "hardware" in content else content


def engine_table(rows: Sequence[dict]) -> str:
    """Median TBT by control, and what lowering and leaving the host out are worth, a line a model, lanes and batch."""
    tbt = {(r["model"], r["lanes"], r["batch"], r["control"]): r["tbt_s"] for r in rows}
    lines = [
        "| model | lanes | batch | fused ms | lowered ms | host ms | resident ms | lowered / fused | host / lowered |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, lanes, batch in dict.fromkeys(key[:3] for key in tbt):
        fused, lowered, host, resident = (
            tbt.get((model, lanes, batch, control)) for control in ("fused", "lowered", "host", "resident")
        )
        cells = [f"{value * 1e3:.2f}" if value else "" for value in (fused, lowered, host, resident)]
        ratios = [f"{a / b:.2f}" if a and b else "" for a, b in ((lowered, fused), (host, lowered))]
        lines.append(f"| {model} | {lanes} | {batch} | {' | '.join(cells + ratios)} |")
    return "\n".join(lines)


def serve_table(rows: Sequence[dict]) -> str:
    lines = [
        "| system | req/s | TBT mean ms | TBT P99 ms | TTFT mean ms | TTFT P99 ms | tok/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = " | ".join(
            f"{row[name] * 1e3:.1f}" for name in ("tbt_mean_s", "tbt_p99_s", "ttft_mean_s", "ttft_p99_s")
        )
        lines.append(f"| {row['system']} | {row['rate_rps']:g} | {times} | {row['tokens_per_s']:.0f} |")
    return "\n".join(lines)


def elastic_table(rows: Sequence[dict]) -> str:
    """As above, with the KV that all systems had, and by model the P99 TBT over that of the first system."""
    models = sorted({model for row in rows for model in row["p99_over"]})
    head = ["system", "KV GiB", "req/s", "TBT P99 ms", "TTFT mean ms", "TTFT P99 ms", "preempted"]
    head += [f"P99 over {rows[0]['system']}, {model}" for model in models]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        times = " | ".join(f"{row[name] * 1e3:.1f}" for name in ("tbt_p99_s", "ttft_mean_s", "ttft_p99_s"))
        over = " | ".join(f"{row['p99_over'][model]:.2f}" for model in models)
        first = f"{row['system']} | {row['kv_gib']:g} | {row['rate_rps']:g}"
        lines.append(f"| {first} | {times} | {row['preemptions']} | {over} |")
    return "\n".join(lines)


def memory_table(rows: dict[str, dict[str, float]]) -> str:
    lines = ["| | what | value |", "|---|---|---|"]
    for name, values in rows.items():
        lines.extend(f"| {name} | {what} | {value:.1f} |" for what, value in values.items())
    return "\n".join(lines)


def render(folder: Path) -> str:
    """All tables of `folder`. Raises UserError where a file is missing or no result."""
    memory = _measured(folder / "memory.json") if (folder / "memory.json").exists() else {}
    tables = [engine_table(_rows(folder / "engine.json")), serve_table(_rows(folder / "serve.json"))]
    if (folder / "elastic.json").exists():
        tables.append(elastic_table(_rows(folder / "elastic.json")))
    return "\n\n".join([*tables, *([memory_table(memory)] if memory else [])])


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving.gpu_suite.show", description=__doc__)
    parser.add_argument("folder", type=Path)
    print(render(parser.parse_args(argv).folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
