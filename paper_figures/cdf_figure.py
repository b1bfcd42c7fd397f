"""Latency CDFs by system: the shape that the TBT and the TTFT exhibit share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from paper_figures import stats, style
from paper_figures.exhibit import FigureExhibit, NothingToDraw, legend_above, panel_axes, panel_size_in
from paper_figures.records import Run
from paper_figures.selection import panels, variants


class CDFFigure(FigureExhibit):
    """Fraction of samples at or below a latency, seeds pooled. Seeds repeat a scenario, so each weighs what it holds."""

    x_label: ClassVar[str]
    log_x: ClassVar[bool] = True

    def samples_ms(self, run: Run) -> np.ndarray:
        raise NotImplementedError

    def rows(self, runs: Sequence[Run]) -> pd.DataFrame:
        labels = variants(runs)
        parts = []
        for panel, members in panels(runs):
            for variant in style.order(labels[run.run_id] for run in members):
                parts.append(self._curve(panel, variant, [run for run in members if labels[run.run_id] == variant]))
        rows = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"samples": []})
        if not rows["samples"].sum():
            raise NothingToDraw(f"{self.name}: no run completed a request with a latency to show")
        return rows

    def _curve(self, panel: str, variant: str, runs: Sequence[Run]) -> pd.DataFrame:
        samples = np.concatenate([self.samples_ms(run) for run in runs if run.ok] or [np.empty(0)])
        values, fractions = stats.cdf(samples) if len(samples) else (np.array([np.nan]), np.array([np.nan]))
        return pd.DataFrame(
            {
                "panel": panel,
                "system": variant,
                "latency_ms": values,
                "fraction": fractions,
                "samples": len(samples),
                "runs": sum(run.ok for run in runs),
            }
        )

    def figure_size_in(self, rows: pd.DataFrame) -> tuple[float, float]:
        return panel_size_in(rows["panel"].nunique(), self.size_in)

    def draw(self, rows: pd.DataFrame, figure: Figure) -> None:
        names = list(dict.fromkeys(rows["panel"]))
        axes = panel_axes(figure, names)
        for axis, name in zip(axes, names, strict=True):
            panel = rows[rows["panel"] == name]
            for variant in dict.fromkeys(panel["system"]):
                self._draw_curve(axis, panel[panel["system"] == variant], style.look(variant))
            if self.log_x:
                axis.set_xscale("log")
                style.plain_log_ticks(axis.xaxis)
            axis.set_ylim(0, 1.02)
            axis.set_xlabel(self.x_label)
        axes[0].set_ylabel("Fraction")
        legend_above(figure, axes)

    @staticmethod
    def _draw_curve(axis, curve: pd.DataFrame, look: style.Look) -> None:
        if not curve["samples"].iloc[0]:
            axis.plot([], [], color=look.color, marker="x", linestyle="", label=f"{look.label}: could not run")
            return
        marks = [int(np.searchsorted(curve["fraction"], level)) for level in (0.25, 0.5, 0.75, 0.95)]
        axis.plot(
            curve["latency_ms"],
            curve["fraction"],
            drawstyle="steps-post",
            marker=look.marker,
            markevery=marks,
            **look.plot,
        )
