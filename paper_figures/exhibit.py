"""What an exhibit is: rows out of runs, and a drawing (or a table) out of those rows alone.

Drawing from the rows and nothing else means that the CSV beside a figure is the figure.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures.records import Run
from paper_figures.style import COLUMN_IN

_MOST_BESIDE_ANOTHER = 28  # letters of labels of which two fit a column's width


class NothingToDraw(Exception):
    """The records hold nothing that this exhibit shows. The message says what it would need."""


class Exhibit(ABC):
    """`name` is its file's and its command's; `title` opens the caption; `paper` says which exhibit of the paper it is."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str] = ""
    needs_runs: ClassVar[bool] = True  # False for what follows from models' shapes alone
    study: ClassVar[str] = ""  # the kind of study that it shows instead of runs
    needs: ClassVar[str] = ""  # the command that makes what it shows, where that is none of the artifact's usual modes

    def select(self, runs: Sequence[Run]) -> list[Run]:
        """Those of an experiment's runs that are shown, which are those the caption counts. Raises
        :class:`NothingToDraw`."""
        return list(runs)

    @abstractmethod
    def rows(self, runs: Sequence[Run]) -> pd.DataFrame:
        """What is shown of the selected runs, one row a mark. Raises :class:`NothingToDraw`."""


class FigureExhibit(Exhibit):
    size_in: ClassVar[tuple[float, float]] = (COLUMN_IN, 2.1)

    @abstractmethod
    def draw(self, rows: pd.DataFrame, figure: Figure) -> None:
        """Draw `rows`, and nothing that is not in them."""

    def figure_size_in(self, rows: pd.DataFrame) -> tuple[float, float]:
        """Width and height in inches; may depend on how much there is to show."""
        return self.size_in


class TableExhibit(Exhibit):
    """Its rows are the table; columns carry units."""


def panel_axes(figure: Figure, labels: Sequence[str]) -> list[Axes]:
    """One axes a panel, side by side in rows of two on common scales, titled where there is more than one."""
    columns = min(2, len(labels))
    grid = figure.subplots(-(-len(labels) // columns), columns, squeeze=False, sharex=True, sharey=True)
    axes = list(grid.flat)
    for spare in axes[len(labels) :]:
        spare.set_axis_off()
    for axis, label in zip(axes, labels, strict=False):
        if len(labels) > 1:
            axis.set_title(label)
        axis.tick_params(labelbottom=True)
    return axes[: len(labels)]


def panel_size_in(num_panels: int, one_in: tuple[float, float]) -> tuple[float, float]:
    """A column's width whatever the number of panels; height grows by rows of two."""
    width, height = one_in
    num_rows = -(-num_panels // 2)
    return width, height if num_rows == 1 else 0.8 * height * num_rows


def legend_above(figure: Figure, axes: Sequence[Axes], columns: int = 2) -> None:
    """One legend for all panels, above them, in order of first appearance."""
    entries = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if max(map(len, entries), default=0) > _MOST_BESIDE_ANOTHER and figure.get_figwidth() <= COLUMN_IN:
        columns = 1
    if entries:
        figure.legend(
            entries.values(),
            entries.keys(),
            loc="outside upper center",
            ncols=min(columns, len(entries)),
            borderpad=0.1,
        )
