"""TTFT and TBT percentiles against the offered rate."""

from __future__ import annotations

from typing import Any

from paper_figures.records import Run
from paper_figures.sweep_axes import RATE_KEYS, rate
from paper_figures.sweep_figure import LATENCIES, SweepFigure


class LatencyVsRate(SweepFigure):
    name = "latency_vs_rate"
    title = "TTFT and TBT percentiles against the total offered rate (mean over seeds, 95 % confidence band)"
    paper = "Fig. 7"
    metrics = LATENCIES
    columns = 3
    x_label = "Offered rate (req/s)"
    x_keys = RATE_KEYS

    def x(self, run: Run) -> Any:
        return rate(run)
