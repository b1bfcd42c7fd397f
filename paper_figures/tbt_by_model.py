"""P95 and P99 TBT of each model by system: pooling over models hides the cold ones."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from paper_figures import stats, style
from paper_figures.exhibit import FigureExhibit, NothingToDraw, legend_above
from paper_figures.records import Run
from paper_figures.selection import fullest, variants
from paper_figures.sweep_axes import skew

_MOST_NAMED = 10  # models whose names fit below an axis
_ROOM = 1.6  # by how much the axis reaches beyond the least and the largest mean
_METRICS = {"p95_itl_ms": "TBT p95 (ms)", "p99_itl_ms": "TBT p99 (ms)"}


def offered_load(runs: Sequence[Run]) -> str:
    """What runs of one scenario were offered, to be read above a figure; empty where they say no rate, or several. A skew is told
    where there is one."""
    asked = {(arrivals.get("rate_rps"), arrivals.get("rate_of")) for arrivals in map(_arrivals, runs)}
    rate_rps, of = asked.pop() if len(asked) == 1 else (None, None)
    if rate_rps is None:
        return ""
    skews = {skew(run) for run in runs}
    skewed = f", skew {skews.pop():g}" if len(skews) == 1 and any(skews) else ""
    return f"{rate_rps:g} req/s {'a model' if of == 'model' else 'in all'}{skewed}"


def _arrivals(run: Run) -> dict[str, object]:
    return (run.config.get("workload") or {}).get("arrivals") or {}


class TBTByModel(FigureExhibit):
    """Of the scenarios that most systems ran the one with most runs, then the last (in a rate sweep: the heaviest), one group a
    model; mean over seeds and its 95 % interval."""

    name = "tbt_by_model"
    title = "P95 and P99 time between tokens (TBT) of each model by system (mean over seeds, 95 % confidence interval)"
    paper = "Fig. 7"

    def select(self, runs: Sequence[Run]) -> list[Run]:
        if not runs:
            raise NothingToDraw(f"{self.name}: no runs")
        return fullest(runs)

    def rows(self, runs: Sequence[Run]) -> pd.DataFrame:
        labels, members, load = variants(runs), runs, offered_load(runs)
        models = sorted({model for run in members for model in run.metrics_by_model})
        rows = []
        for variant in style.order(labels[run.run_id] for run in members):
            same = [run for run in members if labels[run.run_id] == variant and run.ok]
            for model in models:
                for metric in _METRICS:
                    found = stats.interval([run.metrics_by_model.get(model, {}).get(metric) for run in same])
                    rows.append(
                        {
                            "system": variant, "model": model, "metric": metric, "load": load,
                            "mean": found.mean, "ci_low": found.low, "ci_high": found.high, "n": found.n,
                        }
                    )  # fmt: skip
        if not any(row["n"] for row in rows):
            raise NothingToDraw(f"{self.name}: no run has a TBT by model")
        return pd.DataFrame(rows)

    def figure_size_in(self, rows: pd.DataFrame) -> tuple[float, float]:
        return style.COLUMN_IN, 2.65 + 0.065 * rows["system"].nunique()

    def draw(self, rows: pd.DataFrame, figure: Figure) -> None:
        models, systems = sorted(rows["model"].unique()), list(dict.fromkeys(rows["system"]))
        axes = figure.subplots(len(_METRICS), 1, sharex=True)
        axes[0].set_title(rows["load"].iloc[0])
        for axis, (metric, label) in zip(axes, _METRICS.items(), strict=True):
            for number, system in enumerate(systems):
                shown = rows[(rows["metric"] == metric) & (rows["system"] == system)].set_index("model").loc[models]
                look = style.look(system)
                label_of = look.label if shown["n"].any() else f"{look.label}: could not run"
                offset = min(0.8, 0.17 * len(systems)) * ((number + 0.5) / len(systems) - 0.5)
                places = [i + offset for i in range(len(models))]
                axis.errorbar(
                    places, shown["mean"], [shown["mean"] - shown["ci_low"], shown["ci_high"] - shown["mean"]],
                    linestyle="", marker=look.marker, color=look.color, elinewidth=0.8, capsize=1.5, label=label_of,
                )  # fmt: skip
            axis.set_ylabel(label)
            means = rows.loc[(rows["metric"] == metric) & (rows["mean"] > 0), "mean"]
            if len(means):
                axis.set_yscale("log")
                # An interval of two seeds may reach from nothing to ten times the mean: it is cut off at the edge.
                axis.set_ylim(means.min() / _ROOM, means.max() * _ROOM)
                style.plain_log_ticks(axis.yaxis)
        if len(models) <= _MOST_NAMED:
            axes[-1].set_xticks(range(len(models)), models, rotation=20, ha="right")
        else:
            axes[-1].set_xticks([0, len(models) - 1], [models[0], models[-1]])
            axes[-1].set_xlabel(f"{len(models)} models by name")
        legend_above(figure, list(axes))
