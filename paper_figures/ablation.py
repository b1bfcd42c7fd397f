"""Pipeline and lowered control, each with and without the other: aggregate throughput (the paper's Table 3)."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from paper_figures import stats
from paper_figures.exhibit import NothingToDraw, TableExhibit
from paper_figures.paper import facts
from paper_figures.records import Run
from paper_figures.selection import panels


class Ablation(TableExhibit):
    """`lanes` in-flight batches are the pipeline (1: none), `control` is lowered or host-driven."""

    name = "ablation"
    title = "CrossPool with and without its layer-wise pipeline and lowered control: output tokens/s and speed-up"
    paper = "Table 3"

    def select(self, runs: Sequence[Run]) -> list[Run]:
        mine = [run for run in runs if run.system == "crosspool" and {"lanes", "control"} <= run.options.keys()]
        if len({_cell(run) for run in mine if run.ok}) < 2:
            raise NothingToDraw("ablation: needs crosspool runs with different `lanes` or `control` options")
        return max((members for _, members in panels(mine, most=10**6)), key=len)

    def rows(self, runs: Sequence[Run]) -> pd.DataFrame:
        cells = {cell: [run for run in runs if _cell(run) == cell] for cell in sorted({_cell(run) for run in runs})}
        means = {
            cell: stats.interval([run.metric("output_throughput") for run in same]) for cell, same in cells.items()
        }
        base = means.get((1, False))
        stated = {(2 if row["pipeline"] else 1, row["lowering"]): row for row in facts("ablation")}
        return pd.DataFrame(_row(cell, cells[cell], means[cell], base, stated.get(cell, {})) for cell in cells)


def _cell(run: Run) -> tuple[int, bool]:
    return int(run.options["lanes"]), run.options["control"] == "lowered"


def _row(cell: tuple[int, bool], runs: list[Run], mean: stats.Interval, base, stated: dict) -> dict[str, object]:
    nan = float("nan")
    ran = [run for run in runs if run.ok]
    return {
        "in-flight batches": cell[0],
        "control": "lowered" if cell[1] else "host-driven",
        "backend": "+".join(sorted({run.backend for run in runs})),
        "n": mean.n,
        "tokens/s": mean.mean,
        "95% low": mean.low,
        "95% high": mean.high,
        "speed-up": mean.mean / base.mean if base and base.n else nan,
        "offered req/s": stats.interval([run.metric("offered_rate_rps") for run in ran]).mean,
        "done req/s": stats.interval([run.metric("request_throughput") for run in ran]).mean,
        "paper tokens/s": stated.get("tokens_per_s", nan),
        "paper speed-up": stated.get("speedup", nan),
    }
