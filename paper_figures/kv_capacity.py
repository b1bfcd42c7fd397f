"""KV memory by system: all of it, and what one model can use of it. Partitions and weights are what keeps the two apart."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from paper_figures import style
from paper_figures.exhibit import FigureExhibit, NothingToDraw, legend_above
from paper_figures.records import Run
from paper_figures.selection import fullest, variants

_MIB, _GIB = 1 << 20, 1 << 30


class KVCapacity(FigureExhibit):
    """From the placements that the runs were started with, of the scenario that most systems served."""

    name = "kv_capacity"
    title = (
        "KV memory by system on the same devices: in all, and as much as one model can use (the bar spans the least and the "
        "best served model)"
    )

    def select(self, runs: Sequence[Run]) -> list[Run]:
        if not any(run.ok and run.placement for run in runs):
            raise NothingToDraw(f"{self.name}: no complete run that says where things lie")
        return fullest(runs)

    def rows(self, runs: Sequence[Run]) -> pd.DataFrame:
        labels, rows = variants(runs), []
        for variant in style.order(labels.values()):
            placed = [run for run in runs if labels[run.run_id] == variant and run.ok and run.placement]
            if not placed:
                rows.append({"system": variant, "total_bytes": float("nan"), "least_bytes": 0, "most_bytes": 0, "n": 0})
                continue
            by_model = usable(placed[0])
            total = sum(device["kv_bytes"] for device in placed[0].placement)
            least, most = min(by_model.values()), max(by_model.values())
            rows.append(
                {"system": variant, "total_bytes": total, "least_bytes": least, "most_bytes": most, "n": len(placed)}
            )
        return pd.DataFrame(rows)

    def figure_size_in(self, rows: pd.DataFrame) -> tuple[float, float]:
        return style.COLUMN_IN, 0.85 + 0.3 * len(rows)

    def draw(self, rows: pd.DataFrame, figure: Figure) -> None:
        axis = figure.subplots()
        places = list(range(len(rows)))
        unit, named = (_GIB, "GiB") if rows["total_bytes"].max() > 4 * _GIB else (_MIB, "MiB")
        axis.barh(places, rows["total_bytes"] / unit, 0.66, color="#d9d9d9", label="all KV")
        width = (rows["most_bytes"] - rows["least_bytes"]) / unit
        axis.barh(places, rows["least_bytes"] / unit, 0.3, color="#0072B2", label="any one model can use")
        axis.barh(
            places, width, 0.3, rows["least_bytes"] / unit, color="#56B4E9", hatch="///", edgecolor="white",
            label="best served model",
        )  # fmt: skip
        for place, row in zip(places, rows.itertuples(index=False), strict=True):
            if not row.n:
                axis.text(0, place, " could not run", va="center", fontsize=6)
        axis.set_yticks(places, [style.look(name).label for name in rows["system"]])
        axis.invert_yaxis()
        axis.set_xlabel(f"KV memory ({named})")
        axis.grid(axis="y", visible=False)
        legend_above(figure, [axis], columns=3)


def usable(run: Run) -> dict[str, int]:
    """KV bytes by model that its requests together can use: its quotas, or the whole of every pool beside its weights. Beside an
    arena, where weights come and go, any model may."""
    models = [model["name"] for model in run.config.get("models") or []]
    usable = dict.fromkeys(models, 0)
    for device in run.placement:
        quotas = device.get("kv_quota_bytes") or {}
        for model in models:
            served = model in device["weights_bytes"] or "arena" in device["weights_bytes"]
            usable[model] += quotas.get(model, 0) if quotas else device["kv_bytes"] * served
    return usable
