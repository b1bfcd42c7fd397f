"""Metrics against something that was swept, by system: the shape that rate, skew, model count and context share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from paper_figures import stats, style
from paper_figures.exhibit import FigureExhibit, NothingToDraw, legend_above
from paper_figures.records import Run
from paper_figures.selection import by_cell, panels


@dataclass(frozen=True)
class Metric:
    """A summary metric of a record, and how its axis reads."""

    key: str
    label: str
    log: bool = False
    is_share: bool = False


class SweepFigure(FigureExhibit):
    """One small plot a metric. Points are means over seeds, bands their 95 % confidence interval; a cross at the foot of a
    plot is a cell that could not run."""

    metrics: ClassVar[tuple[Metric, ...]]
    columns: ClassVar[int] = 2
    x_label: ClassVar[str]
    x_log: ClassVar[bool] = False
    x_keys: ClassVar[tuple[str, ...]] = ()  # of the configuration, left out of what tells scenarios apart
    x_options: ClassVar[tuple[str, ...]] = ()  # of a system, left out of what tells its variants apart

    @abstractmethod
    def x(self, run: Run) -> Any:
        """Where `run` lies on the axis; None where it has no place there."""

    def select(self, runs: Sequence[Run]) -> list[Run]:
        """The fullest sweep over the axis with all else equal; others in the same folder are other experiments."""
        placed = [run for run in runs if self.x(run) is not None]
        if len({self.x(run) for run in placed}) < 2:
            raise NothingToDraw(f"{self.name}: needs runs at two or more values of: {self.x_label}")
        groups = [members for _, members in panels(placed, without=self.x_keys, most=10**6)]
        swept = [members for members in groups if len({self.x(run) for run in members}) > 1]
        if not swept:
            raise NothingToDraw(f"{self.name}: no runs that differ in {self.x_label} alone")
        members = max(swept, key=len)
        if not any(run.ok for run in members):
            raise NothingToDraw(f"{self.name}: none of the {len(members)} runs is complete")
        return members

    def rows(self, runs: Sequence[Run]) -> pd.DataFrame:
        rows = [row for cell in by_cell(runs, self.x, self.x_options).items() for row in self._cell(*cell)]
        order = {name: rank for rank, name in enumerate(style.order(row["system"] for row in rows))}
        return pd.DataFrame(sorted(rows, key=lambda row: (order[row["system"]], row["x"], row["metric"])))

    def _cell(self, cell: tuple[str, Any], runs: list[Run]) -> list[dict[str, Any]]:
        variant, x = cell
        ran = [run for run in runs if run.ok]
        base = {"system": variant, "x": x, "ran": len(ran), "could_not_run": len(runs) - len(ran)}
        rows = []
        for metric in self.metrics:
            found = stats.interval([run.metric(metric.key) for run in ran])
            numbers = {"mean": found.mean, "ci_low": found.low, "ci_high": found.high, "n": found.n}
            rows.append({**base, "metric": metric.key, **numbers})
        return rows

    def figure_size_in(self, rows: pd.DataFrame) -> tuple[float, float]:
        num_rows = -(-len(self.metrics) // self.columns)
        width = style.COLUMN_IN if self.columns <= 2 else 2 * style.COLUMN_IN + 0.34
        return width, 0.45 + 1.35 * num_rows

    def draw(self, rows: pd.DataFrame, figure: Figure) -> None:
        num_rows = -(-len(self.metrics) // self.columns)
        grid = figure.subplots(num_rows, self.columns, squeeze=False, sharex=True)
        axes = list(grid.flat)
        for spare in axes[len(self.metrics) :]:
            spare.set_axis_off()
        for axis, metric in zip(axes, self.metrics, strict=False):
            shown = rows[rows["metric"] == metric.key]
            for variant in dict.fromkeys(shown["system"]):
                self._draw_line(axis, shown[shown["system"] == variant], style.look(variant))
            axis.set_ylabel(metric.label)
            self._scale(axis, shown, metric)
        for axis in axes[max(0, len(self.metrics) - self.columns) : len(self.metrics)]:
            axis.set_xlabel(self.x_label)
            axis.tick_params(labelbottom=True)
        legend_above(figure, axes, columns=2 if self.columns <= 2 else 4)

    def _scale(self, axis, shown: pd.DataFrame, metric: Metric) -> None:
        if metric.log and (shown["mean"] > 0).any():
            axis.set_yscale("log")
            style.plain_log_ticks(axis.yaxis)
        else:
            top = shown[["mean", "ci_high"]].max().max()
            axis.set_ylim(0, 1.05 if metric.is_share else 1.08 * top if top > 0 else None)  # NaN: nothing to scale by
        if self.x_log:
            axis.set_xscale("log", base=2)
        ticks = sorted(shown["x"].unique())
        if len(ticks) <= 8:
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.xaxis.set_minor_locator(NullLocator())

    @staticmethod
    def _draw_line(axis, line: pd.DataFrame, look: style.Look) -> None:
        line = line.sort_values("x")
        ran = line[line["n"] > 0]
        axis.plot(ran["x"], ran["mean"], marker=look.marker, **look.plot)
        band = ran[ran["n"] > 1]
        if len(band):
            axis.fill_between(band["x"], band["ci_low"], band["ci_high"], color=look.color, alpha=0.18, linewidth=0)
        absent = line[(line["could_not_run"] > 0) & (line["ran"] == 0)]
        if len(absent):
            axis.plot(
                absent["x"], [0.03] * len(absent), transform=axis.get_xaxis_transform(), clip_on=False, linestyle="",
                marker="x", markersize=5, color=look.color, label=f"{look.label}: could not run",
            )  # fmt: skip


def number(value: Any) -> float | None:
    """`value` as a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


LATENCIES = tuple(
    Metric(f"{percentile}_{latency}", f"{name} {shown} (ms)", log=True)
    for latency, name in (("ttft_ms", "TTFT"), ("itl_ms", "TBT"))
    for percentile, shown in (("median", "p50"), ("p95", "p95"), ("p99", "p99"))
)
HEADLINES = (
    Metric("p99_itl_ms", "TBT p99 (ms)", log=True),
    Metric("p95_ttft_ms", "TTFT p95 (ms)", log=True),
    Metric("slo_attainment", "SLO attainment", is_share=True),
    Metric("output_throughput", "Output tokens/s"),
)
