"""Rows of :mod:`serving.gpu_suite.steps` as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def steps_table(rows: Sequence[Row]) -> str:
    """Milliseconds of steps: chunks of one prompt by rows and past; decode batches by context; and steps of several parts
    beside the sum of what their parts take as steps of their own."""
    prompts = [row for row in rows if row["chunks"] == 1 and not row["batch"]]
    decodes = [row for row in rows if not row["chunks"]]
    grids = [
        _grid(prompts, ("rows", "past"), "rows of a prompt", "after"),
        _grid(decodes, ("batch", "context"), "sequences that decode", "at"),
    ]
    return "\n\n".join([*(grid for grid in grids if grid), *_parted(rows)])


def _grid(rows: Sequence[Row], keys: tuple[str, str], title: str, column: str) -> str:
    """A line a model, control and size; a column a number of tokens that are there; what each side takes alone with the
    fewest of them."""
    if not rows:
        return ""
    size, there = keys
    columns = sorted({row[there] for row in rows})
    head = ["model", "control", title, *(f"{column} {count} tokens ms" for count in columns)]
    head += ["attention alone ms", "FFN alone ms"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    found = {(row["model"], row["control"], row[size], row[there]): row for row in rows}
    for model, control, count in dict.fromkeys(key[:3] for key in found):
        mine = [found.get((model, control, count, each)) for each in columns]
        cells = [f"{row['step_ms']:.2f}" if row else "" for row in mine]
        fewest = next(row for row in mine if row)
        cells += [f"{fewest[side]:.2f}" if side in fewest else "" for side in ("attention_ms", "ffn_ms")]
        lines.append(f"| {' | '.join([model, control, str(count), *cells])} |")
    return "\n".join(lines)


def group_steps_table(rows: Sequence[Row]) -> str:
    """What one rank of a group takes, its peers absent: a line a step of one part, as :mod:`serving.gpu_suite.group_steps`
    measured it."""
    head = ["model", "tp x dp", "active", "decode", "at tokens", "rows of a prompt", "after tokens"]
    head += ["ms", "launch ms", "attention alone ms", "FFN alone ms"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["model"], f"{row['tp']} x {row['dp']}"]
        cells += [str(row[name]) for name in ("active", "batch", "context", "rows", "past")]
        cells += [f"{row[name]:.2f}" for name in ("step_ms", "launch_ms", "attention_ms", "ffn_ms")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def side_by_side_table(rows: Sequence[Row]) -> str:
    """Of whole steps and of stages a grid each: a line for what is timed, its milliseconds alone, and how many times as long it takes
    beside what stands above each column."""
    grids = [_beside([row for row in rows if (row["side"] == "step") == whole]) for whole in (True, False)]
    return "\n\n".join(grid for grid in grids if grid)


def _beside(rows: Sequence[Row]) -> str:
    alone = {_work(row): row["step_ms"] for row in rows if row["beside"] is None}
    taken = {(_work(row), _work(row["beside"])): row["step_ms"] for row in rows if row["beside"] is not None}
    if not taken:
        return ""
    columns = list(dict.fromkeys(other for _, other in taken))
    lines = [f"| {' | '.join(['times as long', 'alone ms', *columns])} |", "|" + "---|" * (len(columns) + 2)]
    for work, alone_ms in alone.items():
        cells = [f"{taken[work, other] / alone_ms:.2f}" if (work, other) in taken else "" for other in columns]
        lines.append(f"| {' | '.join([work, f'{alone_ms:.2f}', *cells])} |")
    return "\n".join(lines)


def _work(row: Row) -> str:
    """What is timed, in words: the model, its decode rows and those of a prompt, and which side where it is not the whole."""
    sizes = [f"decode {row['batch']}"] * (row["batch"] > 0) + [f"prompt {row['rows']}"] * row["chunks"]
    side = [] if row["side"] == "step" else [row["side"]]
    return " ".join([row["model"], *side, " + ".join(sizes)])


def _parted(rows: Sequence[Row]) -> list[str]:
    """Steps of several parts: what they take, and over what their parts take alone, where those were measured."""
    head = ["model", "control", "decode", "at tokens", "chunks", "rows", "after tokens", "ms", "over its parts' sum"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    alone = {_key(row): row["step_ms"] for row in rows if row["batch"] == 0 or row["chunks"] == 0}
    for row in rows:
        if row["chunks"] + (row["batch"] > 0) < 2:
            continue
        parts = [alone.get(_key(row, chunks=1, batch=0, context=0))] * row["chunks"]
        parts += [alone.get(_key(row, chunks=0, rows=0, past=0))] if row["batch"] else []
        over = f"{row['step_ms'] / sum(parts):.2f}" if all(parts) else ""
        step_ms = f"{row['step_ms']:.2f}"
        lines.append(f"| {' | '.join([*map(str, _key(row)), step_ms, over])} |")
    return ["\n".join(lines)] if len(lines) > 2 else []


def _key(row: Row, **others: int) -> tuple:
    told = {**row, **others}
    return tuple(told[name] for name in ("model", "control", "batch", "context", "chunks", "rows", "past"))
