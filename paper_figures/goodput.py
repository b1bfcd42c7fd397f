"""SLO attainment and goodput against the offered rate."""

from __future__ import annotations

from typing import Any

from paper_figures.records import Run
from paper_figures.sweep_axes import RATE_KEYS, rate
from paper_figures.sweep_figure import Metric, SweepFigure


class Goodput(SweepFigure):
    name = "goodput"
    title = (
        "SLO attainment and goodput against the total offered rate (mean over seeds, 95 % confidence band); "
        "rejected, failed and unfinished requests miss their SLO"
    )
    metrics = (Metric("slo_attainment", "SLO attainment", is_share=True), Metric("request_goodput", "Goodput (req/s)"))
    x_label = "Offered rate (req/s)"
    x_keys = RATE_KEYS

    def x(self, run: Run) -> Any:
        return rate(run)
