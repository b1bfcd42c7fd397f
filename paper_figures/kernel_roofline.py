"""Kernels against the roofline of the machine they were timed on: a panel a machine, ceilings measured in the same run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from paper_figures import style
from paper_figures.exhibit import FigureExhibit, NothingToDraw, legend_above
from paper_figures.records import Study

_MARKERS = "osD^vPX<>hd*"


class KernelRoofline(FigureExhibit):
    name = "kernel_roofline"
    title = "Operations a second of each kernel against its operations a byte, under the ceilings of the same run"
    study = "kernels"
    needs = "python -m runner.study kernels"

    def rows(self, runs: Sequence[Study]) -> pd.DataFrame:
        parts = []
        for run in runs:
            ceilings = (run.content.get("measured_with") or {}).get("ceilings")
            rows = run.rows
            if not ceilings or not len(rows) or not {"op", "seconds", "bytes", "flops"} <= set(rows):
                continue
            rows = rows[(rows["flops"] > 0) & (rows["bytes"] > 0) & (rows["seconds"] > 0)]
            roof = np.minimum(rows["flops"] / rows["bytes"] * ceilings["bytes_per_s"], ceilings["flops"])
            part = rows[["op", "shape", "dtype", "seconds", "bytes", "flops"]].assign(
                hardware=run.hardware,
                flops_per_byte=rows["flops"] / rows["bytes"],
                flops_per_s=rows["flops"] / rows["seconds"],
                share_of_roof=rows["flops"] / rows["seconds"] / roof,
                ceiling_bytes_per_s=ceilings["bytes_per_s"],
                ceiling_flops=ceilings["flops"],
            )
            parts.append(part)
        if not parts:
            raise NothingToDraw(f"{self.name}: no kernels' measurements; {self.needs}")
        return pd.concat(parts, ignore_index=True)

    def figure_size_in(self, rows: pd.DataFrame) -> tuple[float, float]:
        return style.COLUMN_IN, 0.75 + 1.75 * rows["hardware"].nunique()

    def draw(self, rows: pd.DataFrame, figure: Figure) -> None:
        machines = list(dict.fromkeys(rows["hardware"]))
        operators = sorted(rows["op"].unique())
        axes = figure.subplots(len(machines), 1, squeeze=False)[:, 0]
        for axis, machine in zip(axes, machines, strict=True):
            shown = rows[rows["hardware"] == machine]
            low, high = shown["flops_per_byte"].min() / 2, shown["flops_per_byte"].max() * 2
            x = np.geomspace(low, high, 200)
            bandwidth, flops = shown["ceiling_bytes_per_s"].iloc[0], shown["ceiling_flops"].iloc[0]
            roof = np.minimum(x * bandwidth, flops)
            axis.plot(x, roof / 1e9, color="black", linewidth=1, label="measured ceilings")
            for number, operator in enumerate(operators):
                points = shown[shown["op"] == operator]
                axis.plot(
                    points["flops_per_byte"], points["flops_per_s"] / 1e9, linestyle="", marker=_MARKERS[number % 12],
                    color=style.MODEL_COLORS[number % 8], label=operator, markersize=3.2,
                    markerfacecolor="none" if number >= 8 else style.MODEL_COLORS[number % 8],
                )  # fmt: skip
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_title(machine, loc="left")
            axis.set_ylabel("GFLOP/s")
        axes[-1].set_xlabel("FLOP per byte")
        legend_above(figure, axes, columns=3)
