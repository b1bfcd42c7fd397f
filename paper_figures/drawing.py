"""Writing the files of exhibits: one, all of a folder, and folders side by side."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from paper_figures import export, style
from paper_figures.caption import caption, stamp
from paper_figures.exhibit import Exhibit, FigureExhibit, NothingToDraw
from paper_figures.records import BadRecord, Run
from paper_figures.registry import EXHIBITS

Wanted = Sequence[tuple[str, Sequence[Run]]]  # names of exhibits, and what each is drawn from


@dataclass(frozen=True)
class Drawn:
    """What became of one exhibit in one folder: the kinds of files written, or why there are none."""

    name: str
    folder: str
    kinds: tuple[str, ...] = ()
    text: str = ""
    reason: str = ""


def draw(exhibit: Exhibit, runs: Sequence[Run], stem: Path) -> tuple[list[Path], str]:
    """Write all files of `exhibit` at `stem`; returns them and the table as text ("" for a figure)."""
    runs = exhibit.select(runs)
    rows = exhibit.rows(runs)
    words = caption(exhibit, runs)
    paths = [export.write_csv(rows, stem), export.write_text(stem.with_name(f"{stem.name}.caption.txt"), words + "\n")]
    if not isinstance(exhibit, FigureExhibit):
        paths += export.write_table(rows, stem, words)
        return paths, export.plain(rows)
    with matplotlib.rc_context(style.RC):
        figure = Figure(figsize=exhibit.figure_size_in(rows))
        exhibit.draw(rows, figure)
        figure.supxlabel(stamp(runs), fontsize=4.5, color="#666666", x=0.99, ha="right")
        paths += export.write_figure(figure, stem)
    return paths, ""


def draw_folders(tasks: Mapping[str, Wanted], out: Path, processes: int) -> Iterator[list[Drawn]]:
    """What became of the exhibits of each folder, in order of `tasks`, drawn by so many processes at once."""
    if processes < 2:
        yield from (_draw_folder(out, folder, wanted) for folder, wanted in tasks.items())
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_draw_folder, [out] * len(tasks), tasks, tasks.values())


def _draw_folder(out: Path, folder: str, wanted: Wanted) -> list[Drawn]:
    done = []
    for name, runs in wanted:
        try:
            paths, text = draw(EXHIBITS[name], runs, out / folder / name)
        except (NothingToDraw, BadRecord) as reason:
            done.append(Drawn(name, folder, reason=str(reason)))
            continue
        kinds = tuple(sorted(path.suffix[1:] for path in paths if path.suffix != ".txt"))
        done.append(Drawn(name, folder, kinds, text))
    return done
