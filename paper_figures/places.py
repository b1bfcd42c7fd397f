"""Latencies against how many sequences of a model a system can serve at once: whose difference is places, and whose is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from paper_figures.exhibit import NothingToDraw
from paper_figures.records import Run
from paper_figures.selection import by_cell
from paper_figures.sweep_axes import places
from paper_figures.sweep_figure import Metric, SweepFigure


class Places(SweepFigure):
    name = "places"
    title = (
        "Latencies against the sequences of one model that can be in steps at once: those of a batch, times the batches that a model "
        "may have in flight (mean over seeds, 95 % confidence band)"
    )
    metrics = (
        Metric("mean_itl_ms", "TBT mean (ms)"),
        Metric("p99_itl_ms", "TBT p99 (ms)"),
        Metric("mean_ttft_ms", "TTFT mean (ms)", log=True),
        Metric("p99_ttft_ms", "TTFT p99 (ms)", log=True),
    )
    x_label = "Places a model"
    x_log = True
    x_options = ("max_batch", "lanes_of_model")

    def x(self, run: Run) -> Any:
        return places(run)

    def select(self, runs: Sequence[Run]) -> list[Run]:
        """Systems differ in their places anyway, so one of them at least has to have been swept."""
        members = super().select(runs)
        swept = Counter(variant for variant, _ in by_cell(members, self.x, self.x_options))
        if max(swept.values()) < 2:
            raise NothingToDraw(f"{self.name}: needs a system at two or more numbers of places a model")
        return members
