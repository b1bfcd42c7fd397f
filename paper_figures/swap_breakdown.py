"""Where the time of a model swap goes: mean milliseconds by part, for each variant that swaps."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from paper_figures import stats, style
from paper_figures.exhibit import FigureExhibit, NothingToDraw, legend_above
from paper_figures.records import Run
from paper_figures.selection import panels, variants

_PREFIX = "switch_ms/"
_NAMES = {
    "queue": "queue",
    "evict": "eviction",
    "checkpoint": "checkpoint",
    "weights": "weights",
    "kv": "KV",
    "warm_up": "first step",
}  # in the order in which they come; parts that are not here come last


class SwapBreakdown(FigureExhibit):
    """One bar a variant and scenario; parts add up to the mean swap. Mean over seeds, weighted by none."""

    name = "swap_breakdown"
    title = "Mean time of one model swap by part (mean over seeds)"

    def select(self, runs: Sequence[Run]) -> list[Run]:
        mine = [run for run in runs if any(key.startswith(_PREFIX) for key in run.metrics)]
        if not any(run.metric("swaps") > 0 for run in mine if run.ok):
            raise NothingToDraw(f"{self.name}: no run that swapped a model and itemised it")
        return mine

    def rows(self, runs: Sequence[Run]) -> pd.DataFrame:
        labels, rows = variants(runs), []
        found = dict.fromkeys(
            key.removeprefix(_PREFIX) for run in runs for key in run.metrics if key.startswith(_PREFIX)
        )
        parts = [part for part in _NAMES if part in found] + [part for part in found if part not in _NAMES]
        for panel, members in panels(runs, most=6):
            for variant in style.order(labels[run.run_id] for run in members):
                same = [run for run in members if labels[run.run_id] == variant and run.ok]
                swaps = sum(run.metric("swaps") for run in same)
                for part in parts:
                    mean = stats.interval([run.metric(_PREFIX + part) for run in same]).mean
                    rows.append(
                        {"panel": panel, "system": variant, "part": part, "ms": mean, "swaps": swaps, "n": len(same)}
                    )
        return pd.DataFrame(rows)

    def figure_size_in(self, rows: pd.DataFrame) -> tuple[float, float]:
        return style.COLUMN_IN, 0.85 + 0.3 * len(rows[["panel", "system"]].drop_duplicates())

    def draw(self, rows: pd.DataFrame, figure: Figure) -> None:
        axis = figure.subplots()
        bars = list(rows[["panel", "system"]].drop_duplicates().itertuples(index=False))
        left = [0.0] * len(bars)
        for number, part in enumerate(dict.fromkeys(rows["part"])):
            shown = rows[rows["part"] == part].set_index(["panel", "system"])["ms"].fillna(0)
            widths = [float(shown.get((bar.panel, bar.system), 0)) for bar in bars]
            axis.barh(
                range(len(bars)), widths, 0.66, left, color=style.MODEL_COLORS[number % 8], edgecolor="white",
                hatch=style.MODEL_HATCHES[number % 8], label=_NAMES.get(part, part),
            )  # fmt: skip
            left = [start + width for start, width in zip(left, widths, strict=True)]
        names = [style.look(bar.system).label + (f"\n{bar.panel}" if bar.panel else "") for bar in bars]
        axis.set_yticks(range(len(bars)), names)
        axis.invert_yaxis()
        axis.set_xlabel("Mean time of a swap (ms)")
        axis.grid(axis="y", visible=False)
        legend_above(figure, [axis], columns=3)
