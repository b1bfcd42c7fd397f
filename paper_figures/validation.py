"""The simulator against the machine it was calibrated on: the same cells run for real and simulated, metric by metric."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from paper_figures import stats, style
from paper_figures.exhibit import FigureExhibit, NothingToDraw, legend_above
from paper_figures.records import Run
from paper_figures.selection import panels, variants

_METRICS = {
    "median_itl_ms": "TBT p50 (ms)",
    "p99_itl_ms": "TBT p99 (ms)",
    "median_ttft_ms": "TTFT p50 (ms)",
    "output_throughput": "tokens/s",
}
_WITHOUT = ("backend.",)


class Validation(FigureExhibit):
    """One plot a metric, one mark a system and scenario: measured across, simulated up; on the line they agree."""

    name = "validation"
    title = "Simulated against measured, the same cells on both backends (means over seeds); the band is 20 %"
    needs = "./run_all.sh full"

    def select(self, runs: Sequence[Run]) -> list[Run]:
        both = []
        for _, members in panels(runs, without=_WITHOUT, most=10**6):
            for system in {run.system for run in members}:
                same = [run for run in members if run.system == system and run.ok]
                if {run.backend for run in same} == {"real", "sim"}:
                    both += same
        if not both:
            raise NothingToDraw(f"{self.name}: no cell that ran on both backends")
        return both

    def rows(self, runs: Sequence[Run]) -> pd.DataFrame:
        labels, rows = variants(runs), []
        for panel, members in panels(runs, without=_WITHOUT, most=10**6):
            for variant in style.order(labels[run.run_id] for run in members):
                same = [run for run in members if labels[run.run_id] == variant]
                for metric in _METRICS:
                    measured, simulated = (
                        stats.interval([run.metric(metric) for run in same if run.backend == backend])
                        for backend in ("real", "sim")
                    )
                    rows.append(
                        {
                            "scenario": panel, "system": variant, "metric": metric, "measured": measured.mean,
                            "simulated": simulated.mean, "error": simulated.mean / measured.mean - 1,
                            "n_measured": measured.n, "n_simulated": simulated.n,
                        }
                    )  # fmt: skip
        return pd.DataFrame(rows)

    def figure_size_in(self, rows: pd.DataFrame) -> tuple[float, float]:
        return style.COLUMN_IN, 3.3

    def draw(self, rows: pd.DataFrame, figure: Figure) -> None:
        axes = list(figure.subplots(2, 2).flat)
        for axis, (metric, label) in zip(axes, _METRICS.items(), strict=True):
            shown = rows[(rows["metric"] == metric) & (rows["measured"] > 0) & (rows["simulated"] > 0)]
            if not len(shown):
                axis.text(0.5, 0.5, "no records", transform=axis.transAxes, ha="center", va="center")
                continue
            values = pd.concat([shown["measured"], shown["simulated"]])
            ends = [values.min() / 1.3, values.max() * 1.3]
            axis.fill_between(ends, [0.8 * e for e in ends], [1.2 * e for e in ends], color="#e5e5e5", label="20 %")
            axis.plot(ends, ends, color="black", linewidth=0.8, label="equal")
            for system, points in shown.groupby("system", sort=False):
                look = style.look(system)
                axis.plot(
                    points["measured"], points["simulated"], linestyle="", marker=look.marker, color=look.color,
                    label=look.label,
                )  # fmt: skip
            axis.set_xscale("log")
            axis.set_yscale("log")
            style.plain_log_ticks(axis.xaxis)
            style.plain_log_ticks(axis.yaxis)
            axis.set_title(label)
        for axis in axes[2:]:
            axis.set_xlabel("Measured")
        figure.supylabel("Simulated", fontsize=7)
        legend_above(figure, axes, columns=3)
