"""Writes an exhibit: PDF and PNG of a figure, CSV of what it shows, Markdown and LaTeX of a table, a caption beside each.

Files appear whole or not at all, and the same data gives the same bytes: no dates, no software versions inside.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import pandas as pd
from matplotlib.figure import Figure

_PDF_METADATA = {"Creator": "paper_figures", "Producer": "paper_figures", "CreationDate": None}
_PNG_METADATA = {"Software": None}


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> Path:
    """Let `write` fill a file beside `path`, then give it the name. Nothing half-written is left on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            write(file)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def write_text(path: Path, text: str) -> Path:
    return write_atomically(path, lambda file: file.write(text.encode()))


def write_figure(figure: Figure, stem: Path) -> list[Path]:
    """`stem`.pdf with embedded fonts and `stem`.png."""
    return [
        write_atomically(
            stem.with_name(f"{stem.name}.pdf"), lambda f: figure.savefig(f, format="pdf", metadata=_PDF_METADATA)
        ),
        write_atomically(
            stem.with_name(f"{stem.name}.png"), lambda f: figure.savefig(f, format="png", metadata=_PNG_METADATA)
        ),
    ]


def write_csv(data: pd.DataFrame, stem: Path) -> Path:
    """Full precision: a number read back is the number of the record."""
    return write_text(stem.with_name(f"{stem.name}.csv"), data.to_csv(index=False, lineterminator="\n"))


def write_table(data: pd.DataFrame, stem: Path, caption: str) -> list[Path]:
    """`stem`.md and `stem`.tex of `data`, whose cells are rounded for reading."""
    cells = [[_cell(value) for value in row] for row in data.itertuples(index=False)]
    header = [str(column) for column in data.columns]
    return [
        write_text(stem.with_name(f"{stem.name}.md"), markdown(header, cells, caption)),
        write_text(stem.with_name(f"{stem.name}.tex"), latex(header, cells, caption)),
    ]


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return "-" if value is None else str(value)


def markdown(header: Sequence[str], cells: Sequence[Sequence[str]], caption: str) -> str:
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{caption}\n"


def latex(header: Sequence[str], cells: Sequence[Sequence[str]], caption: str) -> str:
    """A booktabs table."""
    body = " \\\\\n".join(" & ".join(_escape(cell) for cell in line) for line in cells)
    columns = "l" + "r" * (len(header) - 1)
    return (
        f"\\begin{{table}}\n\\centering\n\\caption{{{_escape(caption)}}}\n\\begin{{tabular}}{{{columns}}}\n\\toprule\n"
        f"{' & '.join(_escape(cell) for cell in header)} \\\\\n\\midrule\n{body} \\\\\n\\bottomrule\n"
        "\\end{tabular}\n\\end{table}\n"
    )


def _escape(text: str) -> str:
    for character in "&%$#_{}":
        text = text.replace(character, "\\" + character)
    return text.replace("~", "\\textasciitilde{}").replace("^", "\\textasciicircum{}")


def plain(data: pd.DataFrame) -> str:
    """A table for the terminal: columns as wide as their cells."""
    rows = [
        [str(column) for column in data.columns],
        *([_cell(v) for v in row] for row in data.itertuples(index=False)),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
