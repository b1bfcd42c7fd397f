"""Who holds what: weights and KV of each device by system, beside the paper's placement (its Table 2)."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from paper_figures import style
from paper_figures.exhibit import NothingToDraw, TableExhibit
from paper_figures.paper import facts
from paper_figures.records import Run
from paper_figures.selection import fullest, variants

_GIB = 1 << 30


class Placement(TableExhibit):
    """The first complete run of each system in the scenario that most of them served; the paper's rows are its own five A100 40 GB."""

    name = "placement"
    title = "Weights (models) and KV budget of each device by system; `paper` rows are the paper's evaluation"
    paper = "Table 2"

    def select(self, runs: Sequence[Run]) -> list[Run]:
        placed = [run for run in runs if run.ok and run.placement]
        if not placed:
            raise NothingToDraw(f"{self.name}: no complete run that says where things lie")
        labels = variants(placed)
        members = fullest(placed)
        return [
            next(run for run in members if labels[run.run_id] == variant)
            for variant in style.order(labels[run.run_id] for run in members)
        ]

    def rows(self, runs: Sequence[Run]) -> pd.DataFrame:
        labels = variants(runs)
        rows = [(labels[run.run_id], run.backend, [_held(device) for device in run.placement]) for run in runs]
        rows += [(f"paper: {name}", "-", list(devices)) for name, devices in facts("placement").items()]
        width = max(len(devices) for _, _, devices in rows)
        return pd.DataFrame(
            {"system": name, "backend": backend}
            | {f"device {i}": devices[i] if i < len(devices) else "-" for i in range(width)}
            for name, backend, devices in rows
        )


def _held(device: dict) -> str:
    weights = "+".join(sorted(model for model, size in device["weights_bytes"].items() if size)) or "no weights"
    return f"{device['role']}: {weights}; KV {device['kv_bytes'] / _GIB:.3g} GiB"
