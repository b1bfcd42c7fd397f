"""Active KV of co-located models over time, stacked, in bytes: how transient and small it is (the paper's Fig. 1b)."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from paper_figures import style
from paper_figures.exhibit import NothingToDraw, legend_above
from paper_figures.kv_pages_over_time import KVPagesOverTime
from paper_figures.paper import facts
from paper_figures.records import Run


class ActiveKV(KVPagesOverTime):
    """CrossPool's pool of the last scenario's first seed: whatever the KV is in, it is the demand that is shown."""

    name = "active_kv"
    title = "KV in use over time by model, stacked, in CrossPool's pool"
    paper = "Fig. 1b"

    def select(self, runs: Sequence[Run]) -> list[Run]:
        mine = [run for run in runs if run.system == "crosspool" and run.ok]
        if not mine:
            raise NothingToDraw(f"{self.name}: no complete crosspool run")
        return super().select(mine)[:1]

    def rows(self, runs: Sequence[Run]) -> pd.DataFrame:
        rows = super().rows(runs)
        return rows.assign(mib=rows["pages_in_use"] * rows["page_bytes"] / (1 << 20))

    def figure_size_in(self, rows: pd.DataFrame) -> tuple[float, float]:
        return style.COLUMN_IN, 1.7 + 0.06 * rows["model"].nunique()

    def draw(self, rows: pd.DataFrame, figure: Figure) -> None:
        axis = figure.subplots()
        wide = rows.pivot_table(index="time_s", columns="model", values="mib")
        models = list(wide.columns)
        axis.stackplot(
            wide.index, [wide[model] for model in models], labels=models, linewidth=0.2, edgecolor="white", step="post",
            colors=[style.MODEL_COLORS[i % 8] for i in range(len(models))],
        )  # fmt: skip
        axis.set_xlabel("Time since start (s)")
        axis.set_ylabel("Active KV (MiB)")
        axis.set_title(f"paper: four 7B models, one hour, axis to {facts('active_kv')['axis_top_gib']} GiB", loc="left")
        axis.set_ylim(0)
        legend_above(figure, [axis])
