"""`python -m serving.gpu_suite.show DIR`: the tables of a suite's results, as Markdown, from its files."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serving.cost.cards import stages_on
from serving.cost.hardware import load_hardware
from serving.errors import UserError, command
from serving.gpu_suite.seeded import seeded
from serving.gpu_suite.steps_table import group_steps_table, side_by_side_table, steps_table


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


def sides_table(rows: Sequence[dict]) -> str:
    """Two batches in flight under lowered control against what each side's step takes alone: at best the slower side never
    waits, and a batch ends as often as it can compute one."""
    lines = [
        "| model | batch | attention alone ms | FFN alone ms | tok/s | slower side alone tok/s | reached |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "ffn_s" in row and row["lanes"] == 2:
            bound = row["batch"] / max(row["attention_s"], row["ffn_s"])
            lines.append(
                f"| {row['model']} | {row['batch']} | {row['attention_s'] * 1e3:.2f} | {row['ffn_s'] * 1e3:.2f} | "
                f"{row['tokens_per_s']:.0f} | {bound:.0f} | {row['tokens_per_s'] / bound:.2f} |"
            )
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


_CARD = "h200"
_CONTEXT_TOKENS = 560  # mean of the timed steps of serving.gpu_suite.engine


def predicted_table(rows: Sequence[dict]) -> str:
    """The simulator's decode steps beside the measured ones, one batch in flight: a whole graph, and one with two crossings a
    layer. Its costs were fitted to other people's kernels on such a card, none of these steps among them."""
    lines = [
        "| model | control | batch | measured ms | simulated ms | simulated / measured |",
        "|---|---|---|---|---|---|",
    ]
    hardware = load_hardware(_CARD)
    for row in rows:
        if row["control"] not in ("fused", "lowered") or row["lanes"] != 1:
            continue
        stages = stages_on(_CARD, *seeded([row["model"]]))
        predicted_s = stages.launched_s(stages.decode_step(row["batch"], row["batch"] * _CONTEXT_TOKENS))
        if row["control"] == "lowered":
            predicted_s += 2 * stages.spec.num_layers * hardware.crossing_lowered_s
        lines.append(
            f"| {row['model']} | {row['control']} | {row['batch']} | {row['tbt_s'] * 1e3:.2f} | {predicted_s * 1e3:.2f} | "
            f"{predicted_s / row['tbt_s']:.2f} |"
        )
    return "\n".join(lines)


def elastic_table(rows: Sequence[dict]) -> str:
    """As above, with the KV that all systems had (or the card that it is what weights leave of), and by model the P99 TBT over that of the first system: means over loads,
    and least to most where there are several."""
    cells: dict[tuple[str, str, float], list[dict]] = {}
    for row in rows:
        kv = f"of {row['card_gb']:g} GB" if "card_gb" in row else f"{row['kv_gib']:g}"
        cells.setdefault((row["system"], kv, row.get("rate_rps", 0.0)), []).append(row)
    models = sorted({model for row in rows for model in row.get("p99_over", {})})
    head = [
        "system",
        "KV GiB",
        "req/s",
        "TBT mean ms",
        "TBT P99 ms",
        "TTFT mean ms",
        "TTFT P99 ms",
        "preempted",
        "swaps",
    ]
    head += [f"P99 over {rows[0]['system']}, {model}" for model in models]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for (system, kv, rate_rps), same in cells.items():
        if refused := [row["error"] for row in same if "error" in row]:
            lines.append(f"| {system} | {kv} | {refused[0].replace('|', '/')} |" + " |" * (len(head) - 3))
            continue
        times = [
            f"{statistics.fmean(row[name] for row in same) * 1e3:.1f}"
            for name in ("tbt_mean_s", "tbt_p99_s", "ttft_mean_s", "ttft_p99_s")
        ]
        happened = [f"{statistics.fmean(row.get(what, 0) for row in same):g}" for what in ("preemptions", "swaps")]
        over = [
            _range([row["p99_over"][model] for row in same if model in row.get("p99_over", {})]) for model in models
        ]
        lines.append(f"| {' | '.join([system, kv, f'{rate_rps:g}', *times, *happened, *over])} |")
    return "\n".join(lines)


def _range(values: Sequence[float]) -> str:
    if not values:
        return ""
    least, most = f"{min(values):.2f}", f"{max(values):.2f}"
    return least if least == most else f"{least} to {most}"


def swap_table(rows: Sequence[dict]) -> str:
    """Loads of a model beside one that stays: medians over rounds, and least to most of the shares."""
    lines = [
        "| stays | comes | GiB | load GB/s | plain copy GB/s | of the copy | hidden | mapping ms | evict ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for pair in dict.fromkeys((row["stays"], row["comes"]) for row in rows):
        same = [row for row in rows if (row["stays"], row["comes"]) == pair]
        middle = {
            name: statistics.median(row[name] for row in same) for name, value in same[0].items() if value not in pair
        }
        lines.append(
            f"| {pair[0]} | {pair[1]} | {middle['image_bytes'] / 2**30:.1f} | {middle['load_gbps']:.1f} | {middle['plain_gbps']:.1f} | "
            f"{_range([row['of_plain'] for row in same])} | {_range([row['hidden'] for row in same])} | "
            f"{middle['mapping_s'] * 1e3:.0f} | {middle['evict_s'] * 1e3:.0f} |"
        )
    return "\n".join(lines)


def memory_table(rows: dict[str, dict[str, float]]) -> str:
    lines = ["| | what | value |", "|---|---|---|"]
    for name, values in rows.items():
        lines.extend(f"| {name} | {what} | {value:.1f} |" for what, value in values.items())
    return "\n".join(lines)


def render(folder: Path) -> str:
    """All tables of `folder`. Raises UserError where there is no engine.json, or a file is no result."""
    memory = _measured(folder / "memory.json") if (folder / "memory.json").exists() else {}
    engine = _rows(folder / "engine.json")
    tables = [engine_table(engine), predicted_table(engine)]
    if any("ffn_s" in row for row in engine):
        tables.append(sides_table(engine))
    if (folder / "steps.json").exists():
        tables.append(steps_table(_rows(folder / "steps.json")))
    if (folder / "group_steps.json").exists():
        tables.append(group_steps_table(_rows(folder / "group_steps.json")))
    if (folder / "side_by_side.json").exists():
        tables.append(side_by_side_table(_rows(folder / "side_by_side.json")))
    if (folder / "serve.json").exists():
        tables.append(serve_table(_rows(folder / "serve.json")))
    if (folder / "swap.json").exists():
        tables.append(swap_table(_rows(folder / "swap.json")))
    for name in ("elastic.json", "elastic_seeds.json", "mixtral.json", "capped.json"):
        if (folder / name).exists():
            tables.append(elastic_table(_measured(folder / name)))
    return "\n\n".join([*tables, *([memory_table(memory)] if memory else [])])


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving.gpu_suite.show", description=__doc__)
    parser.add_argument("folder", type=Path)
    print(render(parser.parse_args(argv).folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
