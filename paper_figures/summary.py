"""The table of headline metrics: one row a system and scenario, mean over seeds. What the terminal shows after a run."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from paper_figures import stats, style
from paper_figures.exhibit import NothingToDraw, TableExhibit
from paper_figures.records import Run
from paper_figures.selection import panels, variants

_COLUMNS = {
    "TTFT p50 (ms)": "median_ttft_ms",
    "TTFT p95 (ms)": "p95_ttft_ms",
    "TBT p50 (ms)": "median_itl_ms",
    "TBT p99 (ms)": "p99_itl_ms",
    "tokens/s": "output_throughput",
    "SLO met": "slo_attainment",
    "goodput (req/s)": "request_goodput",
    "peak KV share": "peak_kv_share",
}


class Summary(TableExhibit):
    name = "summary"
    title = "Headline metrics by system (mean over seeds)"

    def rows(self, runs: Sequence[Run]) -> pd.DataFrame:
        if not runs:
            raise NothingToDraw("summary: no runs")
        labels = variants(runs)
        rows = []
        for panel, members in panels(runs, most=10**6):
            for variant in style.order(labels[run.run_id] for run in members):
                same = [run for run in members if labels[run.run_id] == variant]
                rows.append({"system": variant, **({"scenario": panel} if panel else {}), **_row(same)})
        return pd.DataFrame(rows)


def _row(runs: Sequence[Run]) -> dict[str, object]:
    ran = [run for run in runs if run.ok]
    counts = "/".join(str(int(sum(run.metric(name) for run in ran))) for name in ("completed", "rejected", "failed"))
    backends = "+".join(sorted({run.backend for run in runs}))
    means = {label: stats.interval([run.metric(key) for run in ran]).mean for label, key in _COLUMNS.items()}
    return {"backend": backends, "n": len(ran), "done/rejected/failed": counts if ran else "could not run", **means}
