"""What the two pools did during a few milliseconds: whose batch was where, and who waited."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from paper_figures import style
from paper_figures.exhibit import FigureExhibit, NothingToDraw
from paper_figures.records import Run
from paper_figures.selection import variants

_SPANS = 90  # of one panel: more cannot be told apart at a column's width
_HATCHES = {"attention": "", "ffn": "", "finish": "xxxx"}
_TRANSFER = "...."  # of stages that are no computation: a2f, f2a


class PipelineTimeline(FigureExhibit):
    """One panel a variant that kept its timeline: the stretch with most spans in it. Devices are rows, lanes colours."""

    name = "pipeline_timeline"
    title = (
        "Busy spans of each device in the busiest stretch of a run, by in-flight batch (lane); crossed out: last residual, LM "
        "head and sampling; dotted: transfers, where they are stages of their own; blank: waiting"
    )
    needs = "python bench.py conf=ablation timeline=true"

    def select(self, runs: Sequence[Run]) -> list[Run]:
        kept = [run for run in runs if run.ok and len(run.timeline)]
        if not kept:
            raise NothingToDraw(f"{self.name}: no run with a timeline; {self.needs}")
        labels = variants(kept)
        first: dict[str, Run] = {}
        for run in sorted(kept, key=lambda run: run.seed):
            first.setdefault(labels[run.run_id], run)
        return [first[variant] for variant in style.order(first)][:4]

    def rows(self, runs: Sequence[Run]) -> pd.DataFrame:
        labels = variants(runs)
        return pd.concat([_busiest(run.timeline).assign(system=labels[run.run_id]) for run in runs], ignore_index=True)

    def figure_size_in(self, rows: pd.DataFrame) -> tuple[float, float]:
        devices = sum(rows[rows["system"] == name]["device"].nunique() for name in rows["system"].unique())
        return style.COLUMN_IN, 0.7 + 0.27 * devices + 0.35 * rows["system"].nunique()

    def draw(self, rows: pd.DataFrame, figure: Figure) -> None:
        names = list(dict.fromkeys(rows["system"]))
        axes = figure.subplots(len(names), 1, squeeze=False)[:, 0]
        for axis, name in zip(axes, names, strict=True):
            shown = rows[rows["system"] == name]
            devices = sorted(shown["device"].unique())
            for (device, lane, stage), spans in shown.groupby(["device", "lane", "stage"]):
                bars = list(zip(spans["start_ms"], spans["end_ms"] - spans["start_ms"], strict=True))
                axis.broken_barh(
                    bars, (devices.index(device) - 0.36, 0.72), facecolor=style.MODEL_COLORS[int(lane) % 8],
                    hatch=_HATCHES.get(stage, _TRANSFER), edgecolor="white", linewidth=0.25,
                )  # fmt: skip
            axis.set_yticks(range(len(devices)), devices)
            axis.invert_yaxis()
            axis.set_title(style.look(name).label, loc="left")
            axis.grid(axis="y", visible=False)
        axes[-1].set_xlabel("Time (ms)")
        lanes = sorted(rows["lane"].unique())
        keys = [Patch(facecolor=style.MODEL_COLORS[int(lane) % 8], label=f"lane {lane}") for lane in lanes]
        stages = dict.fromkeys(_HATCHES.get(stage, _TRANSFER) for stage in rows["stage"])
        keys += [
            Patch(facecolor="#888888", edgecolor="white", hatch=hatch, label=label)
            for hatch, label in ((_TRANSFER, "transfer"), (_HATCHES["finish"], "last stage"))
            if hatch in stages
        ]
        figure.legend(handles=keys, loc="outside upper center", ncols=4, borderpad=0.1)


def _busiest(spans: pd.DataFrame) -> pd.DataFrame:
    """The shortest stretch that holds :data:`_SPANS` spans in a row; times in ms from its start."""
    spans = spans.sort_values("start_ns", kind="stable").reset_index(drop=True)
    if len(spans) > _SPANS:
        starts = spans["start_ns"].to_numpy()
        first = int(np.argmin(starts[_SPANS:] - starts[:-_SPANS]))
        spans = spans.iloc[first : first + _SPANS]
    origin_ns = spans["start_ns"].min()
    return pd.DataFrame(
        {
            "device": spans["device"],
            "lane": spans["lane"],
            "stage": spans["stage"],
            "start_ms": (spans["start_ns"] - origin_ns) / 1e6,
            "end_ms": (spans["end_ns"] - origin_ns) / 1e6,
        }
    )
