"""What two steps in flight on one card cost each other, as CrossPool runs them where both pools share it.

Published configurations with seeded values; in this process, without host or rings. Two lanes of the engine, each with a stream for
either side, under lowered control: both repeat a step of their own, of decode rows, of a prompt or of both, and are launched and
looked for by one loop, as the worker does it. So each pair says at once what the one takes beside the other and the other beside the
one; what each takes with an empty lane beside it is told too. The same for stages: a graph of one side of a step, nothing crossing,
beside a graph of a side of another. The simulator takes what lanes on one card cost each other from such rows.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Protocol

import torch

from serving.cuda.build import load_attention, load_ffn, open_pool, prepare_process
from serving.cuda.capture import CardModel
from serving.cuda.config import CONTROLS
from serving.cuda.ffn_parts import FFNParts
from serving.cuda.layout import fill_numbers
from serving.cuda.runner import StepRunner
from serving.errors import command
from serving.gpu_suite.results import conclude, save
from serving.gpu_suite.seeded import seeded
from serving.gpu_suite.sides import Sides
from serving.gpu_suite.steps import LIMITS, Step, draw_tokens, filled_runs, plan_of
from serving.gpu_suite.steps_table import side_by_side_table
from serving.interface import Device, ServedModel
from serving.memory.budget import MemoryBudget
from serving.memory.kv_pool import KVPool, Run
from serving.part_shapes import parts_of, shapes_of, smallest
from serving.scheduler import StepPlan

STEPS = (
    Step(1, 1024),
    Step(4, 1024),
    Step(chunks=1, rows=64, past=512),
    Step(chunks=1, rows=256, past=512),
    Step(3, 1024, 1, 64, 512),
)
STEPS_BY_SIDE = (Step(1, 1024), Step(4, 1024), Step(chunks=1, rows=256, past=512))
LANES = 2
_KV_BYTES, _PAGE_BYTES = 4 << 30, 2 << 20
_WARM_STEPS, _LIMIT_S = 3, 20.0
_REPLAYS_AHEAD = 2


@dataclass(frozen=True)
class Work:
    """What is timed: a step of model number `model`, whole, or one side of it (`attention`, `ffn`)."""

    model: int
    step: Step
    side: str = "step"


class Repeating(Protocol):
    """Work that is done over and over. `times_ms` are those of all that ended, in order."""

    times_ms: list[float]

    def feed(self) -> None:
        """Launch it again, where that is due."""
        ...

    def look(self) -> bool:
        """Take note of what has ended; whether anything is left under way."""
        ...


class RepeatedStep:
    """The step `plan` in a lane of `runner`, from launch to done, new random tokens each time."""

    def __init__(self, runner: StepRunner, lane: int, model: int, plan: StepPlan, vocab_size: int) -> None:
        self.times_ms: list[float] = []
        self._runner, self._lane, self._model, self._plan = runner, lane, model, plan
        self._vocab_size, self._rng = vocab_size, random.Random(lane)
        self._begun: float | None = None

    def feed(self) -> None:
        if self._begun is None:
            draw_tokens(self._plan, self._rng, self._vocab_size)
            self._begun = time.perf_counter()
            self._runner.launch(self._lane, self._model, self._plan)

    def look(self) -> bool:
        if self._begun is not None and self._runner.done(self._lane):
            self.times_ms.append((time.perf_counter() - self._begun) * 1e3)
            self._runner.result(self._lane)
            self._begun = None
        return self._begun is not None


class RepeatedGraph:
    """A graph on a stream, launched ahead so that one follows upon the other."""

    def __init__(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
        self.times_ms: list[float] = []
        self._graph, self._stream = graph, stream
        self._under_way: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def feed(self) -> None:
        while len(self._under_way) < _REPLAYS_AHEAD:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.stream(self._stream):
                begin.record(self._stream)
                self._graph.replay()
                end.record(self._stream)
            self._under_way.append((begin, end))

    def look(self) -> bool:
        while self._under_way and self._under_way[0][1].query():
            begin, end = self._under_way.popleft()
            self.times_ms.append(begin.elapsed_time(end))
        return bool(self._under_way)


def repeated_ms(repeating: Seq[Repeating], repeats: int) -> list[list[float]]:
    """Milliseconds of each of `repeating` while all of them go on: of `repeats` at least, after some that do not count. Raises
    RuntimeError where that does not end."""
    deadline = time.perf_counter() + _LIMIT_S
    goes_on = True
    while goes_on:
        if time.perf_counter() > deadline:
            raise RuntimeError(f"{repeats} repetitions were unfinished after {_LIMIT_S} s")
        for one in repeating:
            one.feed()
            one.look()
        goes_on = any(len(one.times_ms) < _WARM_STEPS + repeats for one in repeating)
    counted = [one.times_ms[_WARM_STEPS:] for one in repeating]
    while any(one.look() for one in repeating):
        if time.perf_counter() > deadline:
            raise RuntimeError(f"what was left under way was unfinished after {_LIMIT_S} s")
    return counted


def measure(
    works: Seq[Work], names: Seq[str], repeating: Callable[[int, Work], Repeating], repeats: int
) -> Iterator[dict]:
    """A row for each of `works` alone, and for each beside each: median, least and most milliseconds. `repeating(lane, work)` does
    a work in one of the two lanes; models are called by their `names`."""

    def told(work: Work) -> dict:
        return {"model": names[work.model], "side": work.side, **asdict(work.step)}

    def row(work: Work, beside: Work | None, times: Seq[float]) -> dict:
        taken = {"step_ms": statistics.median(times), "least_ms": min(times), "most_ms": max(times)}
        return {**told(work), "beside": beside and told(beside), **taken, "repeats": len(times)}

    for work in works:
        yield row(work, None, repeated_ms([repeating(0, work)], repeats)[0])
    for one, other in combinations_with_replacement(works, LANES):
        mine, others = repeated_ms([repeating(0, one), repeating(1, other)], repeats)
        if one == other:
            yield row(one, other, mine + others)
        else:
            yield row(one, other, mine)
            yield row(other, one, others)


class TwoLanes:
    """Both lanes of `models` under `control`: whole steps, and the sides of steps, that repeat there."""

    def __init__(self, models: Seq[CardModel], control: str, steps: Seq[Step]) -> None:
        most, longest = max(step.sequences for step in steps), max(step.longest for step in steps)
        self._models, self._most = models, most
        self._runs: list[list[Run]] = [filled_runs(model.kv, LANES * most, longest) for model in models]
        self._runner = StepRunner(models, LANES, LIMITS, control)
        self._sides: dict[tuple[int, int, Step], Sides] = {}

    def whole(self, lane: int, work: Work) -> RepeatedStep:
        vocab_size = self._models[work.model].attention.spec.vocab_size
        return RepeatedStep(self._runner, lane, work.model, self._plan(lane, work), vocab_size)

    def side(self, lane: int, work: Work) -> RepeatedGraph:
        """Of a step of one part. Kernels must have run, as those of all shapes have."""
        key = lane, work.model, work.step
        if key not in self._sides:
            model = self._models[work.model]
            shapes = shapes_of(LIMITS, model.kv.geometry.max_context_tokens)
            (part,), shape = parts_of(self._plan(lane, work)), smallest(shapes, work.step.batch, work.step.rows)
            self._sides[key] = Sides(model, shape)
            self._sides[key].set_numbers(lambda out: fill_numbers(part, shape, out))
        sides = self._sides[key]
        return RepeatedGraph(*(sides.attention if work.side == "attention" else sides.ffn))

    def _plan(self, lane: int, work: Work) -> StepPlan:
        return plan_of(work.step, self._runs[work.model][lane * self._most :])

    def close(self) -> None:
        self._runner.close()
        for model, runs in zip(self._models, self._runs, strict=True):
            for run in runs:
                model.kv.close_run(run)


def load(models: Seq[ServedModel], memory_bytes: int, kv_bytes: int = _KV_BYTES) -> tuple[list[CardModel], KVPool]:
    """Both halves of all `models` on card 0, with one pool of KV."""
    device = Device("cuda:0", "cuda", 0, memory_bytes)
    budget = MemoryBudget(device.name, memory_bytes)
    halves = [(load_attention(model, device, budget), FFNParts(load_ffn(model, device, budget))) for model in models]
    budget.charge("KV", kv_bytes)
    pool = open_pool(kv_bytes // _PAGE_BYTES, _PAGE_BYTES, list(models), LANES * LIMITS.max_batch, device)
    kvs = [pool.models[model.name] for model in models]
    return [CardModel.of(*both, kv) for both, kv in zip(halves, kvs, strict=True)], pool


@command
@torch.inference_mode()
def main(argv: Seq[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m serving.gpu_suite.side_by_side", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default="deepseek-v2-lite,deepseek-moe-16b", help="that share the card")
    parser.add_argument("--control", default="lowered", choices=CONTROLS[:2])
    parser.add_argument("--repeats", type=int, default=12, help="of each pair, at least")
    parser.add_argument("--memory-gib", type=int, default=70, help="budget of the card")
    args = parser.parse_args(argv)
    models, begun, rows = seeded(args.models.split(",")), time.perf_counter(), []
    prepare_process()
    held, pool = load(models, args.memory_gib << 30)
    torch.cuda.synchronize()
    print(f"row: loaded in {time.perf_counter() - begun:.0f} s", flush=True)
    lanes = TwoLanes(held, args.control, STEPS)
    print(f"row: ready after {time.perf_counter() - begun:.0f} s", flush=True)
    each = range(len(models))
    steps = [Work(model, step) for model in each for step in STEPS]
    stages = [Work(model, step, side) for model in each for side in ("attention", "ffn") for step in STEPS_BY_SIDE]
    for what, works, repeating in (("steps", steps, lanes.whole), ("stages", stages, lanes.side)):
        try:
            rows += measure(works, [model.name for model in models], repeating, args.repeats)
        except Exception as error:  # noqa: BLE001  what was measured before is kept
            rows.append({"measured": what, "error": f"{type(error).__name__}: {error}"[:300]})
        save(args.out, rows)
        print(f"row: {what}: {len(works)} beside each other, after {time.perf_counter() - begun:.0f} s", flush=True)
    status = conclude(rows, side_by_side_table, lambda row: row["measured"])
    if not status:
        lanes.close()
        del lanes, held
        pool.close()
    return status


if __name__ == "__main__":
    raise SystemExit(main())
