"""`python -m crosspool.bench_pipeline`: in-flight batches and lowered control, each with and without the other.

A saturated engine decodes `--batch` sequences of each of two models, every request there from the start, so that throughput
is the engine's and not the workload's. Cells are numbers of in-flight batches times kinds of control, repeated in
alternating order. The timeline of each run tells how long stages take, what the devices wait for, and how near throughput
comes to the bound 1 / max(attention stage, FFN stage) that a pipeline of balanced batches has.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from crosspool.engine import CONTROLS, CrossPool, CrossPoolOptions
from serving.checkpoints.make import default_directory, make_checkpoint
from serving.errors import UserError, command
from serving.generate import cpu_cluster
from serving.interface import Demand, EventKind, Request, ServedModel
from serving.spec import load_spec
from serving.timeline import ATTENTION, BUSY, FFN, attribute_idle, read_timeline

_PROMPT_TOKENS = 16
_EDGE = 0.15  # of a run's time at each end that is no steady state
_POLL_S = 0.005
_BASE = (1, "host")


@dataclass(frozen=True)
class Cell:
    """One way to run: `lanes` in-flight batches under `control`."""

    lanes: int
    control: str
    batch: int

    def __str__(self) -> str:
        return f"{self.lanes} in flight, {self.control}, batch {self.batch}"


@dataclass(frozen=True)
class Run:
    """One run of a cell: decode tokens a second in the steady part, mean stages, and the shares of each side's time."""

    cell: Cell
    tokens_per_s: float
    attention_us: float
    ffn_us: float
    idle: dict[str, dict[str, float]]

    @property
    def busiest_share(self) -> float:
        """Busy share of the busier side: throughput as a part of what it could do if it never waited."""
        return max(side[BUSY] for side in self.idle.values())


def served_models(entries: Sequence[str]) -> list[ServedModel]:
    """`architecture:size` entries as models, made where they are not there yet; equal entries get seeds of their own."""
    models = []
    for seed, entry in enumerate(entries):
        architecture, colon, size = entry.partition(":")
        if not colon:
            raise UserError(f"--models {entry!r} is not ARCHITECTURE:SIZE")
        base = default_directory(architecture, size)
        directory = make_checkpoint(
            architecture, size, base.with_name(f"{base.name}-float32-s{seed}"), seed, "float32", progress=False
        )
        models.append(ServedModel(load_spec(directory, f"m{seed}-{architecture}"), directory))
    return models


def run_cell(cell: Cell, models: Sequence[ServedModel], tokens: int, memory_bytes: int) -> Run:
    """Decode `cell.batch` requests of `tokens` tokens of every model with all of them in flight."""
    with tempfile.TemporaryDirectory() as directory:
        options = CrossPoolOptions(
            lanes=cell.lanes, control=cell.control, max_batch=cell.batch, timeline_dir=directory, max_running=cell.batch
        )
        system = CrossPool(options)
        try:
            system.start(system.plan(cpu_cluster(2, memory_bytes), models, Demand()))
            first_ns, last_ns, times = _serve(system, models, cell.batch, tokens)
        finally:
            system.stop()
        timeline = read_timeline(directory)
    low = first_ns + int(_EDGE * (last_ns - first_ns))
    high = last_ns - int(_EDGE * (last_ns - first_ns))
    attention, ffn = (_between(timeline[name], low, high) for name in ("cpu-0", "cpu-1"))
    produced = int(np.count_nonzero((times >= low) & (times < high)))
    return Run(
        cell,
        produced / (high - low) * 1e9,
        _mean_us(attention[attention["stage"] == ATTENTION]),
        _mean_us(ffn[ffn["stage"] == FFN]),
        attribute_idle(attention, ffn),
    )


def _serve(system: CrossPool, models: Sequence[ServedModel], batch: int, tokens: int) -> tuple[int, int, np.ndarray]:
    """(first token, last token, all tokens) on the host's clock."""
    prompt = tuple(range(1, _PROMPT_TOKENS + 1))
    for index in range(batch * len(models)):
        system.submit(Request(index, models[index % len(models)].name, prompt, tokens))
    unfinished, times = batch * len(models), []
    while unfinished:
        for event in system.poll():
            if event.kind is EventKind.TOKENS:
                times += [event.time_ns] * len(event.tokens)
            elif event.kind in (EventKind.REJECTED, EventKind.FAILED):
                raise UserError(f"request {event.request_id} was {event.kind.value}: {event.reason}")
            elif event.kind is EventKind.COMPLETED:
                unfinished -= 1
        time.sleep(_POLL_S)
    return min(times), max(times), np.array(times)


def _between(spans: np.ndarray, low_ns: int, high_ns: int) -> np.ndarray:
    return spans[(spans["start_ns"] >= low_ns) & (spans["end_ns"] <= high_ns)]


def _mean_us(spans: np.ndarray) -> float:
    return float((spans["end_ns"] - spans["start_ns"]).mean()) / 1e3


def ratio_interval(cell: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of the ratios of paired runs, by Student's t on their logarithms; no width for one pair."""
    logs = np.log(np.asarray(cell) / np.asarray(base))
    mean = float(logs.mean())
    if len(logs) < 2:
        return float(np.exp(mean)), float("nan"), float("nan")
    half = float(stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs))
    return float(np.exp(mean)), float(np.exp(mean - half)), float(np.exp(mean + half))


def report(runs: Sequence[Run], batch: int) -> str:
    """The table of one batch size, every cell against one in-flight batch under host-driven control."""
    mine = [run for run in runs if run.cell.batch == batch]
    base = [run.tokens_per_s for run in mine if (run.cell.lanes, run.cell.control) == _BASE]
    lines = [
        f"decode batch {batch}, {len(base)} runs a cell",
        (
            f"{'in flight':>9} {'control':>8} {'tok/s':>8} {'x neither':>10} {'95 % interval':>15} {'attention us':>13} "
            f"{'FFN us':>8} {'busier side busy':>17}   waits (attention side; FFN side)"
        ),
    ]
    for cell in dict.fromkeys(run.cell for run in mine):
        same = [run for run in mine if run.cell == cell]
        speeds = [run.tokens_per_s for run in same]
        mean, low, high = ratio_interval(speeds, base) if len(base) == len(speeds) else (float("nan"),) * 3
        waits = "; ".join(
            ", ".join(
                f"{cause} {np.mean([run.idle[side][cause] for run in same]):.0%}"
                for cause in same[0].idle[side]
                if cause != BUSY
            )
            for side in ("attention", "ffn")
        )
        lines.append(
            f"{cell.lanes:>9} {cell.control:>8} {np.mean(speeds):>8.1f} {mean:>10.2f} {f'{low:.2f} - {high:.2f}':>15} "
            f"{np.mean([run.attention_us for run in same]):>13.1f} {np.mean([run.ffn_us for run in same]):>8.1f} "
            f"{np.mean([run.busiest_share for run in same]):>17.1%}   {waits}"
        )
    return "\n".join(lines)


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m crosspool.bench_pipeline", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--models", nargs=2, default=["glm4_moe_lite:100m", "glm4_moe_lite:100m"], metavar="ARCHITECTURE:SIZE"
    )
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 2], help="in-flight batches")
    parser.add_argument("--control", nargs="+", default=["host", "lowered"], choices=CONTROLS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4], help="sequences of a decode step")
    parser.add_argument("--tokens", type=int, default=192, help="tokens of a request")
    parser.add_argument("--runs", type=int, default=3, help="runs of a cell")
    parser.add_argument("--memory-mib", type=int, default=3072, help="budget of each of the two devices")
    parser.add_argument("--json", type=Path, help="write all runs to this file")
    args = parser.parse_args(argv)
    if os.environ.get("CROSSPOOL_SHORT", "") not in ("", "0"):  # see that it works at all, as every documented command
        args.models, args.tokens, args.runs, args.batch = ["mixtral:tiny"] * 2, 32, 1, args.batch[:1]
        args.lanes = args.lanes[:2]
    if len(os.sched_getaffinity(0)) < 2:
        raise UserError("two pools need two cores; this process may use one")
    models = served_models(args.models)
    cells = [Cell(lanes, control, batch) for batch in args.batch for lanes in args.lanes for control in args.control]
    runs: list[Run] = []
    for number in range(args.runs):
        for cell in cells if number % 2 == 0 else reversed(cells):
            runs.append(run_cell(cell, models, args.tokens, args.memory_mib << 20))
    runs.sort(key=lambda run: cells.index(run.cell))
    print(" and ".join(args.models))
    for batch in args.batch:
        print("\n" + report(runs, batch))
    if args.json:
        args.json.write_text(json.dumps([asdict(run) for run in runs], indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
