"""How much the ratio of P99 TBT that the paper quotes depends on what it leaves open: one dot an assumption and model."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from paper_figures import stats, style
from paper_figures.exhibit import FigureExhibit, NothingToDraw, legend_above
from paper_figures.records import Run
from paper_figures.selection import differing, flatten, scenario, short_key, sortable


class Sensitivity(FigureExhibit):
    """Elastic multiplexing over CrossPool, by setting of what the paper does not say."""

    name = "sensitivity"
    title = "P99 TBT of elastic multiplexing over CrossPool's, by model, under each assumption that was varied"
    paper = "Fig. 7"
    needs = "./run_all.sh full"
    sides = ("elastic", "crosspool")

    def select(self, runs: Sequence[Run]) -> list[Run]:
        pairs = _pairs([run for run in runs if run.system in self.sides and run.ok], self.sides)
        if len(pairs) < 2:
            raise NothingToDraw(f"{self.name}: needs two or more settings that {' and '.join(self.sides)} completed")
        return list({id(run): run for pair in pairs.values() for side in pair for run in side}.values())

    def rows(self, runs: Sequence[Run]) -> pd.DataFrame:
        rows = []
        for label, (over, under) in _pairs(runs, self.sides).items():
            for model in sorted({model for run in over for model in run.metrics_by_model}):
                top, bottom = (
                    stats.interval([run.metrics_by_model.get(model, {}).get("p99_itl_ms") for run in side])
                    for side in (over, under)
                )
                rows.append(
                    {"setting": label, "model": model, "ratio": top.mean / bottom.mean, "n": min(top.n, bottom.n)}
                )
        return pd.DataFrame(rows)

    def figure_size_in(self, rows: pd.DataFrame) -> tuple[float, float]:
        return style.COLUMN_IN, 0.9 + 0.17 * rows["setting"].nunique()

    def draw(self, rows: pd.DataFrame, figure: Figure) -> None:
        axis = figure.subplots()
        settings = list(dict.fromkeys(rows["setting"]))
        for number, (model, shown) in enumerate(rows.groupby("model")):
            places = [settings.index(name) for name in shown["setting"]]
            axis.plot(
                shown["ratio"], places, linestyle="", marker="osD^vPX<"[number % 8], label=model,
                color=style.MODEL_COLORS[number % 8],
            )  # fmt: skip
        axis.axvline(1, color="black", linewidth=0.8, linestyle="--", label="equal")
        axis.set_yticks(range(len(settings)), settings)
        axis.set_ylim(len(settings) - 0.5, -0.5)  # first setting on top, whole markers
        axis.set_xscale("log")
        style.plain_log_ticks(axis.xaxis)
        axis.set_xlabel("P99 TBT, elastic over CrossPool")
        legend_above(figure, [axis])


def _pairs(runs: Sequence[Run], sides: tuple[str, str]) -> dict[str, tuple[list[Run], list[Run]]]:
    """Setting -> runs of both systems under it. A setting is the scenario and the options of the first system; the other
    system's run is the one that has the same scenario and the same of those options that it has too."""
    settings = {run.run_id: {**scenario(run), **_options(run)} for run in runs}
    keys = differing([settings[run.run_id] for run in runs if run.system == sides[0]])
    pairs = {}
    mine_first = [run for run in runs if run.system == sides[0]]
    usual = {key: statistics.mode(settings[run.run_id].get(key) for run in mine_first) for key in keys}
    for run in sorted(mine_first, key=lambda run: [sortable(settings[run.run_id].get(key)) for key in keys]):
        mine = settings[run.run_id]
        others = [
            other
            for other in runs
            if other.system == sides[1]
            and all(settings[other.run_id][key] == mine.get(key) for key in keys if key in settings[other.run_id])
        ]
        unusual = [key for key in keys if mine.get(key) != usual[key]]
        label = ", ".join(f"{short_key(key)} {mine.get(key)}" for key in unusual) or "as it is"
        if others:
            pairs.setdefault(label, ([], others))[0].append(run)
    return pairs


def _options(run: Run) -> dict[str, object]:
    return flatten(run.options)
