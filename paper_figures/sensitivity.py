"""How much the ratio of P99 TBT that the paper quotes depends on what it leaves open: one dot an assumption and model."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from paper_figures import stats, style
from paper_figures.exhibit import FigureExhibit, NothingToDraw, legend_above
from paper_figures.records import Run
from paper_figures.selection import panels


class Sensitivity(FigureExhibit):
    """Elastic multiplexing over CrossPool, by scenario: each scenario is one setting of what the paper does not say."""

    name = "sensitivity"
    title = "P99 TBT of elastic multiplexing over CrossPool's, by model, under each assumption that was varied"
    paper = "Fig. 7"
    needs = "./run_all.sh full"
    sides = ("elastic", "crosspool")

    def select(self, runs: Sequence[Run]) -> list[Run]:
        chosen = [run for run in runs if run.system in self.sides]
        both = [m for _, m in panels(chosen, most=10**6) if {run.system for run in m if run.ok} == set(self.sides)]
        if len(both) < 2:
            raise NothingToDraw(f"{self.name}: needs two or more scenarios that {' and '.join(self.sides)} completed")
        return [run for members in both for run in members]

    def rows(self, runs: Sequence[Run]) -> pd.DataFrame:
        rows = []
        for label, members in panels(runs, most=10**6):
            for model in sorted({model for run in members for model in run.metrics_by_model}):
                over, under = (
                    stats.interval(
                        [
                            r.metrics_by_model.get(model, {}).get("p99_itl_ms")
                            for r in members
                            if r.ok and r.system == side
                        ]
                    )
                    for side in self.sides
                )
                rows.append(
                    {"scenario": label, "model": model, "ratio": over.mean / under.mean, "n": min(over.n, under.n)}
                )
        return pd.DataFrame(rows)

    def figure_size_in(self, rows: pd.DataFrame) -> tuple[float, float]:
        return style.COLUMN_IN, 0.9 + 0.17 * rows["scenario"].nunique()

    def draw(self, rows: pd.DataFrame, figure: Figure) -> None:
        axis = figure.subplots()
        scenarios = list(dict.fromkeys(rows["scenario"]))
        for number, (model, shown) in enumerate(rows.groupby("model")):
            places = [scenarios.index(name) for name in shown["scenario"]]
            axis.plot(
                shown["ratio"], places, linestyle="", marker="osD^vPX<"[number % 8], label=model,
                color=style.MODEL_COLORS[number % 8],
            )  # fmt: skip
        axis.axvline(1, color="black", linewidth=0.8, linestyle="--", label="equal")
        axis.set_yticks(range(len(scenarios)), scenarios)
        axis.invert_yaxis()
        axis.set_xscale("log")
        style.plain_log_ticks(axis.xaxis)
        axis.set_xlabel("P99 TBT, elastic over CrossPool")
        legend_above(figure, [axis])
