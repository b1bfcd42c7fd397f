"""The workers' timelines of one run as a table small enough for a record."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from serving.timeline import read_timeline
from serving.workers.timeline import STAGES

MOST_SPANS = 20_000


def kept_spans(directory: str | Path) -> pa.Table:
    """The spans in the middle of the run, all devices over the same time, at most :data:`MOST_SPANS`; times from the first
    of them. Raises UserError where the workers left none."""
    timelines = read_timeline(directory)
    devices = np.concatenate([np.full(len(spans), number) for number, spans in enumerate(timelines.values())])
    spans = np.concatenate(list(timelines.values()))
    order = np.argsort(spans["start_ns"], kind="stable")
    first = max(0, (len(order) - MOST_SPANS) // 2)
    kept = order[first : first + MOST_SPANS]
    names, spans, devices = list(timelines), spans[kept], devices[kept]
    origin_ns = spans["start_ns"].min() if len(spans) else 0
    return pa.table(
        {
            "device": pa.array([names[device] for device in devices], pa.string()),
            "stage": pa.array([STAGES[stage] for stage in spans["stage"]], pa.string()),
            **{key: spans[key] for key in ("lane", "model", "layer", "rows")},
            "start_ns": spans["start_ns"] - origin_ns,
            "end_ns": spans["end_ns"] - origin_ns,
        }
    )
