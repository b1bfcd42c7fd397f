"""What the workers of a run did, put together: a Chrome trace to look at, and idle time attributed to its causes.

A lane is *outstanding* from the end of its attention to the start of its next stage on the same device. While a device is
idle, the cause is the other side computing, a hand-over in progress (outstanding, but nobody computes it: transfer and
control), or no work at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from serving.errors import UserError
from serving.workers.timeline import ATTENTION, FFN, FINISH, SPAN, STAGES

WAITING_FOR_FFN, WAITING_FOR_ATTENTION = "waiting for FFN", "waiting for attention"
HAND_OVER, NO_WORK, BUSY = "hand-over", "no work", "busy"


def read_timeline(directory: str | Path) -> dict[str, np.ndarray]:
    """Spans by device, as the workers left them in `directory`. Raises UserError when there are none."""
    files = sorted(Path(directory).glob("*.npy"))
    if not files:
        raise UserError(f"{directory}: holds no timeline; run a system with its option timeline_dir set to it")
    timelines = {}
    for path in files:
        spans = np.load(path)
        if spans.dtype != SPAN:
            raise UserError(f"{path}: is not a timeline of this version")
        timelines[path.stem] = spans
    return timelines


def chrome_trace(timelines: Mapping[str, np.ndarray]) -> str:
    """The timelines as a Chrome trace (chrome://tracing, Perfetto): a process a device, a thread a lane, times in us."""
    starts = [spans["start_ns"].min() for spans in timelines.values() if len(spans)]
    origin_ns = min(starts, default=0)
    events: list[dict[str, object]] = []
    for pid, (device, spans) in enumerate(timelines.items()):
        events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": device}})
        for span in spans:
            events.append(
                {
                    "ph": "X",
                    "name": f"{STAGES[span['stage']]} m{span['model']} l{span['layer']}",
                    "pid": pid,
                    "tid": int(span["lane"]),
                    "ts": float(span["start_ns"] - origin_ns) / 1e3,
                    "dur": float(span["end_ns"] - span["start_ns"]) / 1e3,
                    "args": {"rows": int(span["rows"])},
                }
            )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def attribute_idle(attention: np.ndarray, ffn: np.ndarray) -> dict[str, dict[str, float]]:
    """Shares of the time between the first and the last span, by device side and cause; each side's add up to 1.

    `attention` holds the spans of the KV-pool device, `ffn` those of the weights-pool device.
    """
    if not len(attention) or not len(ffn):
        raise UserError("the timeline of one side is empty; idle time cannot be attributed")
    edges = np.unique(np.concatenate([s[f] for s in (attention, ffn) for f in ("start_ns", "end_ns")]))
    lengths = np.diff(edges)
    attention_busy = _covered(edges, attention["start_ns"], attention["end_ns"])
    ffn_busy = _covered(edges, ffn["start_ns"], ffn["end_ns"])
    outstanding = _covered(edges, *_outstanding(attention))
    total = lengths.sum()

    def shares(busy: np.ndarray, other_busy: np.ndarray, waiting: str) -> dict[str, float]:
        masks = {
            BUSY: busy,
            waiting: ~busy & other_busy,
            HAND_OVER: ~busy & ~other_busy & outstanding,
            NO_WORK: ~busy & ~other_busy & ~outstanding,
        }
        return {cause: float(lengths[mask].sum() / total) for cause, mask in masks.items()}

    return {
        "attention": shares(attention_busy, ffn_busy, WAITING_FOR_FFN),
        "ffn": shares(ffn_busy, attention_busy, WAITING_FOR_ATTENTION),
    }


def _covered(edges: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """For each segment between neighbouring `edges`: whether any interval covers it."""
    depth = np.zeros(len(edges), dtype=np.int64)
    np.add.at(depth, np.searchsorted(edges, starts), 1)
    np.add.at(depth, np.searchsorted(edges, ends), -1)
    return np.cumsum(depth)[:-1] > 0


def _outstanding(attention: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intervals in which a lane's rows are away: from the end of an attention stage to the lane's next stage."""
    starts, ends = [], []
    for lane in np.unique(attention["lane"]):
        spans = np.sort(attention[attention["lane"] == lane], order="start_ns")
        away = spans["stage"][:-1] == ATTENTION
        starts.append(spans["end_ns"][:-1][away])
        ends.append(spans["start_ns"][1:][away])
    return np.concatenate(starts), np.concatenate(ends)


__all__ = ["ATTENTION", "FFN", "FINISH", "attribute_idle", "chrome_trace", "read_timeline"]
