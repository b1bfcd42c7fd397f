"""KV pages in use over time, stacked by model, against the budget: who holds the scarce thing, and when."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from paper_figures import style
from paper_figures.exhibit import FigureExhibit, NothingToDraw, legend_above
from paper_figures.records import Run
from paper_figures.selection import panels, variants

_POINTS = 300  # of each line: more is not seen at a column's width
_MOST_MODELS = len(style.MODEL_COLORS)  # told apart; the least busy of more are one


class KVPagesOverTime(FigureExhibit):
    """One panel a system, of the last scenario's first seed: a time series is of one run, never of an average."""

    name = "kv_pages_over_time"
    title = "KV pages in use over time by model, with the page budget of the whole system"

    def select(self, runs: Sequence[Run]) -> list[Run]:
        labels = variants(runs)
        _, members = panels(runs)[-1] if runs else ("", [])
        chosen = []
        for variant in style.order(labels[run.run_id] for run in members):
            same = sorted((run for run in members if labels[run.run_id] == variant), key=lambda run: run.seed)
            chosen.append(next((run for run in same if _has_series(run)), same[0]))
        if not any(_has_series(run) for run in chosen):
            raise NothingToDraw(f"{self.name}: no run has a series of KV pages")
        return chosen

    def rows(self, runs: Sequence[Run]) -> pd.DataFrame:
        labels = variants(runs)
        parts = [_series(run, labels[run.run_id]) if _has_series(run) else _absent(labels[run.run_id]) for run in runs]
        return _busiest_apart(pd.concat(parts, ignore_index=True))

    def figure_size_in(self, rows: pd.DataFrame) -> tuple[float, float]:
        return style.COLUMN_IN, 0.65 + 0.06 * rows["model"].nunique() + 0.95 * rows["system"].nunique()

    def draw(self, rows: pd.DataFrame, figure: Figure) -> None:
        names = list(dict.fromkeys(rows["system"]))
        models = [model for model in sorted(rows["model"].unique()) if model]
        axes = figure.subplots(len(names), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
        top = self._top(rows)
        for axis, name in zip(axes, names, strict=True):
            self._draw_system(axis, rows[rows["system"] == name], models)
            budget = rows.loc[rows["system"] == name, "page_budget"].iloc[0]
            above = f", budget of {budget:,.0f} pages far above" if budget > 1.08 * top else ""
            axis.set_title(style.look(name).label + above, loc="left")
            axis.set_ylim(0, 1.08 * top)
        axes[-1].set_xlabel("Time since start (s)")
        figure.supylabel("KV pages in use", fontsize=7)
        legend_above(figure, axes, columns=2)

    @staticmethod
    def _top(rows: pd.DataFrame) -> float:
        """The largest budget, or the peak in use where no more than a quarter of any budget is: it would not be seen."""
        peak = rows.groupby(["system", "time_s"])["pages_in_use"].sum().max()
        top = rows["page_budget"].max()
        return peak if 0 < peak < top / 4 else top

    @staticmethod
    def _draw_system(axis, rows: pd.DataFrame, models: list[str]) -> None:
        if rows["pages_in_use"].isna().all():
            axis.text(0.5, 0.5, "could not run", transform=axis.transAxes, ha="center", va="center")
            return
        wide = rows.pivot_table(index="time_s", columns="model", values="pages_in_use")
        wide = wide.reindex(columns=models).fillna(0.0)
        times = wide.index.to_numpy()
        bottom = pd.Series(0.0, index=wide.index)
        for number, model in enumerate(models):
            axis.fill_between(
                times, bottom, bottom + wide[model], step="post", label=model, linewidth=0.3, edgecolor="white",
                facecolor=style.MODEL_COLORS[number % 8], hatch=style.MODEL_HATCHES[number % 8],
            )  # fmt: skip
            bottom = bottom + wide[model]
        axis.axhline(rows["page_budget"].iloc[0], color="black", linewidth=0.8, linestyle="--", label="budget")


def _busiest_apart(rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` with those of the least busy models summed into one where there are more models than colours."""
    busy = rows.groupby("model")["pages_in_use"].sum().sort_values(ascending=False)
    if len(busy) <= _MOST_MODELS:
        return rows
    others = list(busy.index[_MOST_MODELS - 1 :])
    merged = rows.assign(model=rows["model"].where(~rows["model"].isin(others), f"{len(others)} others"))
    keys = [column for column in rows.columns if column != "pages_in_use"]
    return merged.groupby(keys, sort=False, as_index=False, dropna=False)["pages_in_use"].sum(min_count=1)


def _has_series(run: Run) -> bool:
    return run.ok and len(run.series) > 0


def _series(run: Run, variant: str) -> pd.DataFrame:
    """Pages of each model, summed over pools, on one grid of times. Between samples the last value holds."""
    series = run.series
    budget = series.groupby("pool")["page_budget"].max().sum()
    wide = run.pages_by_model
    if len(wide) > _POINTS:
        wide = wide.iloc[[round(i * (len(wide) - 1) / (_POINTS - 1)) for i in range(_POINTS)]]
    rows = wide.reset_index().melt(id_vars="time_ns", var_name="model", value_name="pages_in_use")
    rows.insert(0, "system", variant)
    rows["time_s"] = rows.pop("time_ns") / 1e9
    return rows.assign(page_budget=budget, page_bytes=series["page_bytes"].max(), seed=run.seed)


def _absent(variant: str) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "system": [variant], "model": [""], "pages_in_use": [float("nan")], "time_s": [0.0],
            "page_budget": [0], "page_bytes": [0], "seed": [""],
        }
    )  # fmt: skip
