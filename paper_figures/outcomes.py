"""How requests ended, by system: a system that rejects much can look fast, so this stands beside every latency."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from paper_figures import style
from paper_figures.exhibit import FigureExhibit, NothingToDraw, legend_above
from paper_figures.records import Run
from paper_figures.selection import panels, variants

_OUTCOMES = {"completed": ("#009E73", ""), "rejected": ("#E69F00", "///"), "failed": ("#D55E00", "xxx")}


class Outcomes(FigureExhibit):
    """One bar a system and scenario: requests completed, rejected and failed in a run, mean over seeds. The table has sums."""

    name = "outcomes"
    title = "Requests of a run completed, rejected and failed (unfinished ones are failed), mean over seeds"

    def rows(self, runs: Sequence[Run]) -> pd.DataFrame:
        labels = variants(runs)
        rows = []
        for panel, members in panels(runs, most=6):
            for variant in style.order(labels[run.run_id] for run in members):
                same = [run for run in members if labels[run.run_id] == variant]
                ran = [run for run in same if run.ok]
                counts = {name: int(sum(run.metric(name) for run in ran)) for name in _OUTCOMES}
                absent = len(same) - len(ran)
                rows.append({"panel": panel, "system": variant, **counts, "runs": len(ran), "could_not_run": absent})
        if not any(row[name] for row in rows for name in _OUTCOMES):
            raise NothingToDraw(f"{self.name}: no run has a request that ended")
        return pd.DataFrame(rows)

    def figure_size_in(self, rows: pd.DataFrame) -> tuple[float, float]:
        return style.COLUMN_IN, 0.75 + 0.22 * len(rows)

    def draw(self, rows: pd.DataFrame, figure: Figure) -> None:
        axis = figure.subplots()
        names = [
            textwrap.fill(style.look(row.system).label, 30) + (f"\n{row.panel}" if row.panel else "")
            for row in rows.itertuples(index=False)
        ]
        positions = list(range(len(rows)))
        left = [0] * len(rows)
        for outcome, (color, hatch) in _OUTCOMES.items():
            of_a_run = rows[outcome] / rows["runs"].clip(lower=1)  # cells may have been run more or less often
            axis.barh(positions, of_a_run, 0.7, left, color=color, hatch=hatch, edgecolor="white", label=outcome)
            left = [start + count for start, count in zip(left, of_a_run, strict=True)]
        for position, row in zip(positions, rows.itertuples(index=False), strict=True):
            if not row.runs:
                axis.text(0, position, " could not run", va="center", fontsize=6)
        axis.set_yticks(positions, names)
        axis.invert_yaxis()
        axis.set_xlabel("Requests of a run")
        axis.grid(axis="y", visible=False)
        legend_above(figure, [axis], columns=3)
