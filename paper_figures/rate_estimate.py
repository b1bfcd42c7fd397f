"""The highest aggregate rate by length of context as the paper has it in Fig. 6: estimated from placement and KV memory."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from paper_figures import style
from paper_figures.exhibit import FigureExhibit, NothingToDraw, legend_above
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
        return runs[-1].rows.sort_values(["context_tokens", "system"], kind="stable")

    def draw(self, rows: pd.DataFrame, figure: Figure) -> None:
        axis = figure.subplots()
        bins, systems = list(dict.fromkeys(rows["bin"])), style.order(rows["system"])
        width = 0.8 / len(systems)
        for number, system in enumerate(systems):
            shown, look = rows[rows["system"] == system].set_index("bin").loc[bins], style.look(system)
            places = [i + width * (number - (len(systems) - 1) / 2) for i in range(len(bins))]
            axis.bar(places, shown["rate_rps"], 0.9 * width, color=look.color, label=look.label)
            for place, value in zip(places, shown["rate_rps"], strict=True):
                if not value:
                    axis.text(place, 0, "0", ha="center", va="bottom", fontsize=5)
        axis.set_xticks(range(len(bins)), bins)
        axis.set_xlabel("Context (tokens)")
        axis.set_ylabel("Estimated rate (req/s)")
        axis.grid(axis="x", visible=False)
        legend_above(figure, [axis], columns=3)
