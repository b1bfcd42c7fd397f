"""Headline metrics against the length of context."""

from __future__ import annotations

from typing import Any

from paper_figures.records import Run
from paper_figures.sweep_axes import CONTEXT_KEYS, context
from paper_figures.sweep_figure import HEADLINES, SweepFigure


class Context(SweepFigure):
    name = "context"
    title = "Latency, attainment and throughput against context length (mean over seeds, 95 % confidence band)"
    metrics = HEADLINES
    x_label = "Longest context (tokens)"
    x_log = True
    x_keys = CONTEXT_KEYS

    def x(self, run: Run) -> Any:
        return context(run)
