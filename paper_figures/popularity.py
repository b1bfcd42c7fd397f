"""How many tokens the coldest models take: the CDF of tokens over models of the traces that were run (paper, Fig. 1a)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from paper_figures import style
from paper_figures.exhibit import FigureExhibit, NothingToDraw, legend_above
from paper_figures.paper import facts
from paper_figures.records import Run
from paper_figures.selection import panels

_FEWEST_MODELS = 8  # below that a distribution over models is a handful of bars
_LINES = ("-", "--", "-.", ":")


class Popularity(FigureExhibit):
    """One line a workload, its first seed's trace, whichever system served it; the paper's text gives one point."""

    name = "popularity"
    title = "Share of all tokens (prompt and output) that the coldest models take, of the traces that were served"
    paper = "Fig. 1a"
    needs = "./run_all.sh fast"

    def select(self, runs: Sequence[Run]) -> list[Run]:
        many = [run for run in runs if run.ok and len(run.config.get("models") or ()) >= _FEWEST_MODELS]
        if not many:
            raise NothingToDraw(f"{self.name}: needs complete runs of at least {_FEWEST_MODELS} models")
        return [min(members, key=lambda run: (run.seed, run.system)) for _, members in panels(many)]

    def rows(self, runs: Sequence[Run]) -> pd.DataFrame:
        labels = {members[0].run_id: label for label, members in panels(runs)}
        parts = []
        for run in runs:
            tokens = (
                (run.requests["prompt_tokens"] + run.requests["output_tokens"]).groupby(run.requests["model"]).sum()
            )
            names = [model["name"] for model in run.config["models"]]
            ordered = np.sort(tokens.reindex(names).fillna(0).to_numpy())
            shares = np.concatenate([[0.0], ordered.cumsum() / ordered.sum()])
            fractions = np.arange(len(shares)) / len(ordered)
            label = labels.get(run.run_id) or f"{len(names)} models"
            parts.append(
                pd.DataFrame({"workload": label, "models": fractions, "tokens": shares, "n_models": len(names)})
            )
        return pd.concat(parts, ignore_index=True)

    def draw(self, rows: pd.DataFrame, figure: Figure) -> None:
        axis = figure.subplots()
        for number, (label, line) in enumerate(rows.groupby("workload", sort=False)):
            axis.plot(
                line["models"], line["tokens"], _LINES[number % 4], color=style.MODEL_COLORS[number % 8], label=label
            )
        fact = facts("popularity")
        axis.plot(
            [fact["coldest_models"]], [fact["tokens"]], linestyle="", marker="*", markersize=8, color="black",
            label=f"paper: coldest {fact['coldest_models']:.0%} take {fact['tokens']:.1%}",
        )  # fmt: skip
        axis.set_xlabel("Fraction of models, coldest first")
        axis.set_ylabel("Fraction of tokens")
        axis.set_xlim(0, 1.02)
        axis.set_ylim(0, 1.02)
        legend_above(figure, [axis])
