"""Headline metrics against the number of co-located models."""

from __future__ import annotations

from typing import Any

from paper_figures.records import Run
from paper_figures.sweep_axes import MODEL_COUNT_KEYS, model_count
from paper_figures.sweep_figure import HEADLINES, SweepFigure


class ModelCount(SweepFigure):
    name = "model_count"
    title = "Latency, attainment and throughput against the number of co-located models (mean, 95 % band)"
    metrics = HEADLINES
    x_label = "Models"
    x_keys = MODEL_COUNT_KEYS

    def x(self, run: Run) -> Any:
        return model_count(run)
