"""P95 and P99 TBT of each model against the rate, by system: the paper's Fig. 7."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from paper_figures import stats, style
from paper_figures.exhibit import FigureExhibit, NothingToDraw, legend_above
from paper_figures.records import Run
from paper_figures.selection import by_cell, panels
from paper_figures.sweep_axes import RATE_KEYS, model_count, rate

_METRICS = {"p95_itl_ms": "TBT p95 (ms)", "p99_itl_ms": "TBT p99 (ms)"}
_COMPARED = ("crosspool", "static", "elastic")  # the paper's three
_MOST_MODELS = 4


class TBTVsRate(FigureExhibit):
    """One column a model (the first four by name). A system of the paper's three without a record is named as such."""

    name = "tbt_vs_rate"
    title = "P95 and P99 time between tokens of each model against the rate per model (mean over seeds, 95 % band)"
    paper = "Fig. 7"

    def select(self, runs: Sequence[Run]) -> list[Run]:
        placed = [run for run in runs if rate(run) is not None]
        groups = [members for _, members in panels(placed, without=RATE_KEYS, most=10**6)]
        swept = [members for members in groups if len({rate(run) for run in members}) > 1]
        if not swept or not any(run.ok for members in swept for run in members):
            raise NothingToDraw(f"{self.name}: needs complete runs at two or more rates")
        return max(swept, key=len)

    def rows(self, runs: Sequence[Run]) -> pd.DataFrame:
        models = sorted({model for run in runs for model in run.metrics_by_model})[:_MOST_MODELS]
        rows = []
        for (variant, x), same in by_cell(runs, lambda run: rate(run) / max(1, model_count(run))).items():
            for model in models:
                for metric in _METRICS:
                    values = [run.metrics_by_model.get(model, {}).get(metric) for run in same if run.ok]
                    found = stats.interval(values)
                    numbers = {"mean": found.mean, "ci_low": found.low, "ci_high": found.high, "n": found.n}
                    rows.append({"system": variant, "model": model, "rate_a_model": x, "metric": metric, **numbers})
        absent = [name for name in _COMPARED if name not in {run.system for run in runs}]
        rows += [
            {"system": name, "model": models[0], "rate_a_model": float("nan"), "metric": metric, "mean": float("nan"),
             "ci_low": float("nan"), "ci_high": float("nan"), "n": 0}
            for name in absent for metric in _METRICS
        ]  # fmt: skip
        order = {name: rank for rank, name in enumerate(style.order(row["system"] for row in rows))}
        return pd.DataFrame(
            sorted(rows, key=lambda r: (order[r["system"]], r["model"], r["metric"], r["rate_a_model"]))
        )

    def figure_size_in(self, rows: pd.DataFrame) -> tuple[float, float]:
        return (style.COLUMN_IN if rows["model"].nunique() <= 2 else 2 * style.COLUMN_IN + 0.34), 3.0

    def draw(self, rows: pd.DataFrame, figure: Figure) -> None:
        models = sorted(rows["model"].unique())
        grid = figure.subplots(len(_METRICS), len(models), squeeze=False, sharex=True, sharey="row")
        for line, (metric, label) in zip(grid, _METRICS.items(), strict=True):
            for axis, model in zip(line, models, strict=True):
                shown = rows[(rows["metric"] == metric) & (rows["model"] == model)]
                for system in dict.fromkeys(rows["system"]):
                    self._draw_line(axis, shown[shown["system"] == system], style.look(system))
            known = rows.loc[(rows["metric"] == metric) & (rows["mean"] > 0), "mean"]
            if len(known):  # by means: a wide band must not squeeze the lines
                line[0].set_yscale("log")
                line[0].set_ylim(known.min() / 2, known.max() * 2)
                for axis in line:
                    style.plain_log_ticks(axis.yaxis)
            line[0].set_ylabel(label)
        ticks = sorted(rows["rate_a_model"].dropna().unique())
        for axis, model in zip(grid[0], models, strict=True):
            axis.set_title(model)
        for axis in grid[-1]:
            axis.set_xlabel("req/s per model")
            if len(ticks) > 1 and ticks[-1] > 8 * ticks[0]:
                axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.xaxis.set_minor_locator(NullLocator())
        legend_above(figure, list(grid.flat), columns=2 if len(models) <= 2 else 4)

    @staticmethod
    def _draw_line(axis, line: pd.DataFrame, look: style.Look) -> None:
        ran = line[line["n"] > 0].sort_values("rate_a_model")
        if not len(ran):
            if line["rate_a_model"].isna().any():
                axis.plot([], [], linestyle="", marker="x", color=look.color, label=f"{look.label}: no records")
            return
        axis.plot(ran["rate_a_model"], ran["mean"], marker=look.marker, **look.plot)
        band = ran[ran["n"] > 1]
        if len(band):
            axis.fill_between(
                band["rate_a_model"], band["ci_low"].clip(lower=1e-3), band["ci_high"], color=look.color, alpha=0.18,
                linewidth=0,
            )  # fmt: skip
