"""The highest aggregate rate by length of context as the paper has it in Fig. 6: estimated from placement and KV memory."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures import style
from paper_figures.exhibit import FigureExhibit, NothingToDraw, legend_above, panel_axes, panel_size_in
from paper_figures.records import Study


class RateEstimate(FigureExhibit):
    """Zero is a result: not one request of that length fits."""

    name = "rate_estimate"
    title = "Aggregate rate by bin of context, estimated from placement and KV memory alone; 0: no such request fits"
    paper = "Fig. 6"
    study = "rate-estimate"
    needs = "python -m runner.study rate-estimate"

    def rows(self, runs: Sequence[Study]) -> pd.DataFrame:
        if not runs:
            raise NothingToDraw(f"{self.name}: no study of it; {self.needs}")
        return runs[-1].rows.sort_values(["reserve_gib", "context_tokens", "system"], kind="stable")

    def figure_size_in(self, rows: pd.DataFrame) -> tuple[float, float]:
        return panel_size_in(rows["reserve_gib"].nunique(), (style.COLUMN_IN, 2.0))

    def draw(self, rows: pd.DataFrame, figure: Figure) -> None:
        reserves = sorted(rows["reserve_gib"].unique())
        axes = panel_axes(figure, [f"{reserve:g} GiB of each GPU kept" for reserve in reserves])
        for axis, reserve in zip(axes, reserves, strict=True):
            _bars(axis, rows[rows["reserve_gib"] == reserve])
        figure.supxlabel("Context (tokens)", fontsize=7)
        figure.supylabel("Estimated rate (req/s)", fontsize=7)
        legend_above(figure, axes, columns=3)


def _bars(axis: Axes, rows: pd.DataFrame) -> None:
    bins, systems = list(dict.fromkeys(rows["bin"])), style.order(rows["system"])
    width = 0.8 / len(systems)
    for number, system in enumerate(systems):
        shown, look = rows[rows["system"] == system].set_index("bin").loc[bins], style.look(system)
        places = [i + width * (number - (len(systems) - 1) / 2) for i in range(len(bins))]
        axis.bar(places, shown["rate_rps"], 0.9 * width, color=look.color, label=look.label)
        for place, value in zip(places, shown["rate_rps"], strict=True):
            if not value:
                axis.text(place, 0, "0", ha="center", va="bottom", fontsize=5)
    axis.set_xticks(range(len(bins)), bins, fontsize=5, rotation=30)
    axis.grid(axis="x", visible=False)
