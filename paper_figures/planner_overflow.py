"""How often demand exceeds the planner's budget, against what its quantile promises: closed form, drawn, and observed."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from paper_figures import style
from paper_figures.exhibit import FigureExhibit, NothingToDraw, legend_above, panel_axes, panel_size_in
from paper_figures.records import Study


class PlannerOverflow(FigureExhibit):
    """One panel a plan. On the diagonal a promise is kept exactly; the band is a factor of two."""

    name = "planner_overflow"
    title = (
        "Overflow probability of the planner's page budget against what its quantile promises; `observed` is demand on time "
        "that the plan was not fitted on, the band a factor of two"
    )
    study = "planner-overflow"
    needs = "python -m runner.study planner-overflow conf/planner/cpu2.yaml"
    size_in = (style.COLUMN_IN, 2.3)

    def rows(self, runs: Sequence[Study]) -> pd.DataFrame:
        parts = [run.rows.assign(plan_name=run.run_id.removeprefix("planner-overflow-")) for run in runs]
        if not parts:
            raise NothingToDraw(f"{self.name}: no study of it; {self.needs}")
        return pd.concat(parts, ignore_index=True)

    def figure_size_in(self, rows: pd.DataFrame) -> tuple[float, float]:
        return panel_size_in(rows["plan_name"].nunique(), self.size_in)

    def draw(self, rows: pd.DataFrame, figure: Figure) -> None:
        names = list(dict.fromkeys(rows["plan_name"]))
        axes = panel_axes(figure, names)
        for axis, name in zip(axes, names, strict=True):
            shown = rows[rows["plan_name"] == name]
            axis.fill_between([1e-3, 0.5], [5e-4, 0.25], [2e-3, 1.0], color="#e5e5e5", label="factor of two")
            for fit, color, line, label in (
                ("plan", "#0072B2", "-", "Monte Carlo budget"),
                ("normal", "#D55E00", "--", "budget by normal form"),
            ):
                curve = shown[(shown["check"] == "drawn") & (shown["fit"] == fit)]
                curve = curve[curve["observed"] > 0]
                axis.plot(curve["promised"], curve["observed"], color=color, linestyle=line, label=label)
            observed = shown[(shown["check"] != "drawn") & (shown["observed"] > 0)]
            for number, ((how, fit), points) in enumerate(observed.groupby(["check", "fit"])):
                axis.plot(
                    points["promised"], points["observed"], linestyle="", marker="sD^vPX<>"[number % 8], markersize=3,
                    color=("#009E73", "#CC79A7", "#56B4E9", "#000000")[number % 4], label=f"observed: {how}, {fit}",
                )  # fmt: skip
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_xlim(1e-3, 0.5)
            axis.set_ylim(5e-4, 1)
            axis.set_xlabel("Promised, 1 - quantile")
        axes[0].set_ylabel("Overflow probability")
        legend_above(figure, axes)
