"""The highest aggregate rate that a system serves, by length of context: the paper's Fig. 6, measured instead of estimated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures import stats, style
from paper_figures.exhibit import FigureExhibit, NothingToDraw, legend_above
from paper_figures.records import Run
from paper_figures.selection import panels, variants
from paper_figures.sweep_axes import CONTEXT_KEYS, RATE_KEYS, context, rate

ATTAINED = 0.9


def attains(runs: Sequence[Run]) -> bool:
    """On average over seeds, at least 90 % of all requests meet their SLO, of TTFT and of TPOT."""
    return stats.interval([run.metric("slo_attainment") for run in runs]).mean >= ATTAINED


def keeps_up(runs: Sequence[Run]) -> bool:
    """However long requests waited: none was rejected or left unfinished, and 90 % meet their SLO of TPOT."""
    return all(
        not run.metric("rejected")
        and not run.metric("failed")
        and run.metric("p90_tpot_ms") <= run.config["slo"]["tpot_ms"]
        for run in runs
    )


RULES = {
    f"{ATTAINED:.0%} meet their SLO of TTFT and TPOT": attains,
    f"none rejected or unfinished, {ATTAINED:.0%} meet their SLO of TPOT; no SLO of TTFT": keeps_up,
}


class RateByContext(FigureExhibit):
    """The highest rate served by either rule, one plot each. Zero is a result: every rate tried was too much. A bar that
    reaches the highest rate tried is marked as a lower bound."""

    name = "rate_by_context"
    title = (
        "Highest offered rate that is served, by longest context, with an SLO of TTFT and without; >: the highest rate "
        "tried, 0: none of the rates tried"
    )
    paper = "Fig. 6"
    needs = "./run_all.sh full"

    def select(self, runs: Sequence[Run]) -> list[Run]:
        placed = [run for run in runs if context(run) is not None and rate(run) is not None]
        groups = [members for _, members in panels(placed, without=(*CONTEXT_KEYS, *RATE_KEYS), most=10**6)]
        swept = [m for m in groups if len({context(r) for r in m}) > 1 and len({rate(r) for r in m}) > 1]
        if not swept:
            raise NothingToDraw(f"{self.name}: needs runs at two or more lengths of context and rates")
        return max(swept, key=len)

    def rows(self, runs: Sequence[Run]) -> pd.DataFrame:
        labels, rows = variants(runs), []
        for variant in style.order(labels.values()):
            for length in sorted({context(run) for run in runs}):
                cell = [run for run in runs if labels[run.run_id] == variant and context(run) == length]
                for rule, served in RULES.items():
                    rows.append({"rule": rule, "system": variant, "context_tokens": length, **highest(cell, served)})
        return pd.DataFrame(rows)

    def figure_size_in(self, rows: pd.DataFrame) -> tuple[float, float]:
        return style.COLUMN_IN, 4.0

    def draw(self, rows: pd.DataFrame, figure: Figure) -> None:
        axes = figure.subplots(len(RULES), 1, sharex=True)
        for axis, (rule, shown) in zip(axes, rows.groupby("rule", sort=False), strict=True):
            _bars(axis, shown)
            axis.set_title(rule, fontsize=5)
        axes[-1].set_xlabel("Longest context (tokens)")
        legend_above(figure, [axes[0]])


def _bars(axis: Axes, rows: pd.DataFrame) -> None:
    systems, lengths = list(dict.fromkeys(rows["system"])), sorted(rows["context_tokens"].unique())
    width = 0.8 / len(systems)
    for number, system in enumerate(systems):
        shown = rows[rows["system"] == system].set_index("context_tokens").loc[lengths]
        look = style.look(system)
        places = [i + width * (number - (len(systems) - 1) / 2) for i in range(len(lengths))]
        axis.bar(places, shown["rate_rps"].fillna(0), 0.9 * width, color=look.color, label=look.label)
        for place, row in zip(places, shown.itertuples(), strict=True):
            mark = "no\nrecords" if not row.tried else ">" if row.is_bound else "0" if not row.rate_rps else ""
            height = 0 if not row.tried else row.rate_rps
            axis.text(place, height, mark, ha="center", va="bottom", fontsize=5)
    axis.set_xticks(range(len(lengths)), [_tokens(length) for length in lengths])
    axis.set_ylabel("Rate served (req/s)")
    axis.set_ylim(0, 1.12 * max(rows["rate_rps"].max(), 1e-9))
    axis.grid(axis="x", visible=False)


def highest(cell: Sequence[Run], served: Callable[[Sequence[Run]], bool] = attains) -> dict[str, object]:
    """The highest rate served, whether none higher was tried, and how many rates were."""
    tried = sorted({rate(run) for run in cell if run.ok})
    if not tried:
        return {"rate_rps": float("nan"), "is_bound": False, "tried": 0}
    highest = max((value for value in tried if served([r for r in cell if r.ok and rate(r) == value])), default=0.0)
    return {"rate_rps": highest, "is_bound": highest == tried[-1], "tried": len(tried)}


def _tokens(length: float) -> str:
    return f"{length / 1024:g}K" if length >= 1024 else f"{length:g}"
