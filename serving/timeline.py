"""What the workers of a run did, put together: a Chrome trace and a Gantt to look at, and idle time attributed to causes.

    python -m serving.timeline DIR [--from-ms 100 --for-ms 5]

reads what a run with the option `timeline_dir=DIR` left there, writes `trace.json` and `gantt.png` beside it, and prints what
each device waited for.

A lane is *outstanding* from the end of its attention to the start of its next stage on the same device. While a device is
idle, the cause is the other side computing, a hand-over in progress (outstanding, but nobody computes it: control), or no work
at all. Where transfers are stages of their own, the time in which rows are copied is theirs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from serving.errors import UserError, command
from serving.workers.timeline import A2F, ATTENTION, F2A, FFN, FINISH, SPAN, STAGES

WAITING_FOR_FFN, WAITING_FOR_ATTENTION = "waiting for FFN", "waiting for attention"
TRANSFER, HAND_OVER, NO_WORK, BUSY = "transfer", "hand-over", "no work", "busy"


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
    attention_busy, attention_copies = _computing(edges, attention), _copying(edges, attention)
    ffn_busy, ffn_copies = _computing(edges, ffn), _copying(edges, ffn)
    copies = attention_copies | ffn_copies
    outstanding = _covered(edges, *_outstanding(attention))
    total = lengths.sum()

    def shares(busy: np.ndarray, own_copies: np.ndarray, other_busy: np.ndarray, waiting: str) -> dict[str, float]:
        masks = {
            BUSY: busy,
            TRANSFER: ~busy & (own_copies | copies & ~other_busy),
            waiting: ~busy & ~own_copies & other_busy,
            HAND_OVER: ~busy & ~copies & ~other_busy & outstanding,
            NO_WORK: ~busy & ~copies & ~other_busy & ~outstanding,
        }
        return {cause: float(lengths[mask].sum() / total) for cause, mask in masks.items()}

    return {
        "attention": shares(attention_busy, attention_copies, ffn_busy, WAITING_FOR_FFN),
        "ffn": shares(ffn_busy, ffn_copies, attention_busy, WAITING_FOR_ATTENTION),
    }


def _computing(edges: np.ndarray, spans: np.ndarray) -> np.ndarray:
    mine = spans[~np.isin(spans["stage"], (A2F, F2A))]
    return _covered(edges, mine["start_ns"], mine["end_ns"])


def _copying(edges: np.ndarray, spans: np.ndarray) -> np.ndarray:
    mine = spans[np.isin(spans["stage"], (A2F, F2A))]
    return _covered(edges, mine["start_ns"], mine["end_ns"])


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
        away = np.isin(spans["stage"][:-1], (ATTENTION, A2F)) & (spans["stage"][1:] != A2F)
        starts.append(spans["end_ns"][:-1][away])
        ends.append(spans["start_ns"][1:][away])
    return np.concatenate(starts), np.concatenate(ends)


def sides(timelines: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The timelines of the devices that attended, and of those that computed FFNs only."""
    attention = {name: spans for name, spans in timelines.items() if (spans["stage"] == ATTENTION).any()}
    ffn = {n: s for n, s in timelines.items() if n not in attention and (s["stage"] == FFN).any()}
    return attention, ffn


def between(timelines: Mapping[str, np.ndarray], from_ms: float, for_ms: float) -> dict[str, np.ndarray]:
    """Spans that start within `for_ms` from `from_ms` after the first span of all (0: to the end)."""
    first = min((spans["start_ns"].min() for spans in timelines.values() if len(spans)), default=0)
    low = first + from_ms * 1e6
    high = low + for_ms * 1e6 if for_ms else np.inf
    return {n: s[(s["start_ns"] >= low) & (s["start_ns"] < high)] for n, s in timelines.items()}


def draw_gantt(timelines: Mapping[str, np.ndarray], path: Path) -> None:
    """A row a device and lane, a bar a stage, a colour a model: pale where it is attention, full where it is FFN."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [(name, int(lane)) for name, spans in timelines.items() for lane in np.unique(spans["lane"])]
    if not rows:
        raise UserError("no span lies in the time asked for; see --from-ms and --for-ms")
    origin_ns = min(spans["start_ns"].min() for spans in timelines.values() if len(spans))
    figure, axes = plt.subplots(figsize=(10, 0.8 + 0.45 * len(rows)), layout="constrained")
    for row, (name, lane) in enumerate(rows):
        mine = timelines[name][timelines[name]["lane"] == lane]
        for stage in range(len(STAGES)):
            spans = mine[mine["stage"] == stage]
            bars = np.stack([spans["start_ns"] - origin_ns, spans["end_ns"] - spans["start_ns"]], axis=1) / 1e6
            colours = [f"C{int(model) % 10}" for model in spans["model"]]
            axes.broken_barh(
                bars,
                (row - 0.4, 0.8),
                facecolors=colours,
                alpha=1.0 if stage == FFN else 0.55,
                hatch="//" * (stage == FINISH),
            )
    axes.set_yticks(range(len(rows)), [f"{name} lane {lane}" for name, lane in rows])
    axes.invert_yaxis()
    axes.set_xlabel("time (ms); a colour a model, hatched: LM head and sampling")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def idle_table(timelines: Mapping[str, np.ndarray]) -> str:
    """What every device waited for: attention devices against all FFN devices, and the other way round."""
    attention, ffn = sides(timelines)
    if not attention or not ffn:
        return "one pool only: nothing crosses, nothing to wait for"
    lines = []
    for mine, others, side in ((attention, ffn, "attention"), (ffn, attention, "ffn")):
        other = np.concatenate(list(others.values()))
        for name, spans in mine.items():
            pair = (spans, other) if side == "attention" else (other, spans)
            shares = attribute_idle(*pair)[side]
            lines.append(f"{name:>10}  " + "  ".join(f"{cause} {share:.1%}" for cause, share in shares.items()))
    return "\n".join(lines)


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving.timeline", description=__doc__.split("\n\n")[0])
    parser.add_argument("directory", type=Path, help="what a run's option timeline_dir named")
    parser.add_argument("--from-ms", type=float, default=0.0, help="after the first span")
    parser.add_argument("--for-ms", type=float, default=0.0, help="how much of it (0: all)")
    args = parser.parse_args(argv)
    shown = between(read_timeline(args.directory), args.from_ms, args.for_ms)
    draw_gantt(shown, args.directory / "gantt.png")
    (args.directory / "trace.json").write_text(chrome_trace(shown))
    print(idle_table(shown))
    print(f"{args.directory / 'gantt.png'}\n{args.directory / 'trace.json'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
