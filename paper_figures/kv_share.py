"""Share of the KV capacity of a group of GPUs that one request can use, by kind of attention (the paper's Fig. 2)."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from paper_figures import style
from paper_figures.exhibit import FigureExhibit, legend_above
from paper_figures.paper import facts
from paper_figures.records import Run
from paper_figures.shapes import kv_share


class KVShare(FigureExhibit):
    name = "kv_share"
    title = (
        "Share of the KV capacity of four GPUs that one request can use in a monolithic pool, by formula and as the paper "
        "states it; a pool of KV alone gives every request all of it"
    )
    paper = "Fig. 2"
    needs_runs = False
    size_in = (style.COLUMN_IN, 1.7)

    def rows(self, runs: Sequence[Run]) -> pd.DataFrame:
        stated = facts("kv_share")
        return pd.DataFrame(
            {
                "attention": row["attention"],
                "kv_heads": row["kv_heads"],
                "plan": row["plan"],
                "formula": kv_share(row["kv_heads"], stated["gpus"]),
                "paper": row["share"],
                "kv_pool": 1.0,
            }
            for row in stated["rows"]
        )

    def draw(self, rows: pd.DataFrame, figure: Figure) -> None:
        axis = figure.subplots()
        static, pooled = style.look("static"), style.look("crosspool")
        places = range(len(rows))
        axis.bar(
            [p - 0.2 for p in places], rows["formula"], 0.38, color=static.color, label="monolithic pool (formula)"
        )
        right = [p + 0.2 for p in places]
        axis.bar(right, rows["kv_pool"], 0.38, color=pooled.color, hatch="///", edgecolor="white", label="KV pool")
        left = [p - 0.2 for p in places]
        axis.plot(left, rows["paper"], linestyle="", marker="_", markersize=13, color="black", label="paper")
        axis.set_xticks(list(places), [f"{row.attention}\n{row.plan}" for row in rows.itertuples()])
        axis.set_ylabel("Share of KV capacity")
        axis.set_ylim(0, 1.05)
        axis.grid(axis="x", visible=False)
        legend_above(figure, [axis], columns=3)
