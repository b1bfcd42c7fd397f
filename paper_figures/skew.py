"""Headline metrics against the skew of popularity: from equally warm models to one hot and many cold."""

from __future__ import annotations

from typing import Any

from paper_figures.records import Run
from paper_figures.sweep_axes import SKEW_KEYS, skew
from paper_figures.sweep_figure import HEADLINES, SweepFigure


class Skew(SweepFigure):
    name = "skew"
    title = "Latency, attainment and throughput against popularity skew at a fixed total rate (mean, 95 % band)"
    metrics = HEADLINES
    x_label = "Popularity skew (alpha)"
    x_keys = SKEW_KEYS

    def x(self, run: Run) -> Any:
        return skew(run)
