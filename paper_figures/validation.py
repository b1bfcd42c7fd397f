"""The simulator against the machine it was calibrated on: the same cells run for real and simulated, metric by metric.

A machine's speed drifts. So a cell is measured in rounds, each simulated with a calibration of its own time, and what counts
is the median over rounds of the error.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence

import pandas as pd
from matplotlib.figure import Figure

from paper_figures import style
from paper_figures.exhibit import FigureExhibit, NothingToDraw, legend_above
from paper_figures.records import Run
from paper_figures.selection import panels, variants

METRICS = {  # what is judged: how it is called, and its bound (`runner.validation`)
    "mean_itl_ms": ("TBT mean (ms)", 0.10),
    "p99_itl_ms": ("TBT p99 (ms)", 0.20),
    "mean_ttft_ms": ("TTFT mean (ms)", 0.20),
    "output_throughput": ("tokens/s", 0.08),
}
_WITHOUT = ("backend.",)


class Validation(FigureExhibit):
    """One plot a metric, one mark a system and scenario: measured across, simulated up; on the line they agree."""

    name = "validation"
    title = (
        "Simulated against measured, the same cells on both backends: medians over rounds (each simulated with its own "
        "calibration) and seeds, bars from the least to the most error; the band is the bound that errors are to keep"
    )
    needs = "python -m runner.validation_rounds"

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
                for metric in METRICS:
                    pairs = list(_pairs(same, metric))
                    measured, simulated = zip(*pairs, strict=True) if pairs else ((math.nan,), (math.nan,))
                    errors = [b / a - 1 for a, b in zip(measured, simulated, strict=True)]
                    rows.append(
                        {
                            "scenario": panel, "system": variant, "metric": metric,
                            "measured": statistics.median(measured), "simulated": statistics.median(simulated),
                            "error": statistics.median(errors), "least": min(errors), "most": max(errors),
                            "rounds": len(pairs),
                        }
                    )  # fmt: skip
        return pd.DataFrame(rows)

    def figure_size_in(self, rows: pd.DataFrame) -> tuple[float, float]:
        return style.COLUMN_IN, 3.3

    def draw(self, rows: pd.DataFrame, figure: Figure) -> None:
        axes = list(figure.subplots(2, 2).flat)
        for axis, (metric, (label, bound)) in zip(axes, METRICS.items(), strict=True):
            shown = rows[(rows["metric"] == metric) & (rows["rounds"] > 0)]
            if not len(shown):
                axis.text(0.5, 0.5, "no records", transform=axis.transAxes, ha="center", va="center")
                continue
            middle, least, most = (shown["measured"] * (1 + shown[name]) for name in ("error", "least", "most"))
            values = pd.concat([shown["measured"], least, most])
            ends = [values.min() / 1.3, values.max() * 1.3]
            low, high = ([factor * end for end in ends] for factor in (1 - bound, 1 + bound))
            axis.fill_between(ends, low, high, color="#e5e5e5", label="bound")
            axis.plot(ends, ends, color="black", linewidth=0.8, label="equal")
            for system, points in shown.groupby("system", sort=False):
                look = style.look(system)
                at, up = points.index, middle[points.index]
                axis.errorbar(
                    points["measured"], up, yerr=[up - least[at], most[at] - up], linestyle="", marker=look.marker,
                    color=look.color, elinewidth=0.6, label=look.label,
                )  # fmt: skip
            axis.set_xscale("log")
            axis.set_yscale("log")
            style.plain_log_ticks(axis.xaxis)
            style.plain_log_ticks(axis.yaxis)
            axis.set_title(f"{label}, bound {bound:.0%}")
        for axis in axes[2:]:
            axis.set_xlabel("Measured")
        figure.supylabel("Simulated", fontsize=7)
        legend_above(figure, axes, columns=3)


def _pairs(runs: Sequence[Run], metric: str) -> Iterator[tuple[float, float]]:
    """Measured and simulated values of each round and seed that has both."""
    found: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run.metric(metric) > 0:
            found[run.seed, run.repeat][run.backend].append(run.metric(metric))
    for _, by_backend in sorted(found.items()):
        if {"real", "sim"} <= set(by_backend):
            yield statistics.fmean(by_backend["real"]), statistics.fmean(by_backend["sim"])
