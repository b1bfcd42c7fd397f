"""Steps of models over several cards, measured on one: what one rank of a group computes of a step, its peers absent.

Published configurations with seeded values, each group as the engine cuts its model over so many cards. A step is composed,
launched and looked for as the engine does it (`serving/cuda/groups`), in graphs, on the first rank's card alone; what exchanges
take, and starting the other ranks, is not in it. The simulator takes its costs of groups from such rows, and of exchanges from
`python -m serving.gpu_suite.memory` on several cards.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from kernels.launch import compiling_ahead
from serving.batching import StepLimits
from serving.cuda.build import prepare_process
from serving.cuda.capture import captured
from serving.cuda.groups.build import load_rank
from serving.cuda.groups.parts import GroupPart, GroupParts
from serving.cuda.groups.rank import CardRank
from serving.cuda.lane import Lane
from serving.cuda.layout import CardLayout
from serving.errors import UserError, command
from serving.gpu_suite.rank_alone import RankAlone
from serving.gpu_suite.results import conclude, free_card, save
from serving.gpu_suite.seeded import seeded
from serving.gpu_suite.sides import replayed_s
from serving.gpu_suite.steps import LIMITS, Step, draw_tokens, filled_runs, plan_of
from serving.gpu_suite.steps_table import group_steps_table
from serving.host import pool_config
from serving.interface import Device, ServedModel
from serving.memory.budget import MemoryBudget
from serving.memory.kv_pool import Run
from serving.parallel.group import GroupPlan, natural_group
from serving.part_shapes import Shape, shapes_of
from serving.scheduler import StepPlan

# Of conf=gpu-tbt-groups, and those of gpu4-tbt and gpu5-tbt that differ.
GROUPS = "qwen3-30b-a3b:2,deepseek-v2-lite:2,glm-4.7-flash:2"
_KV_BYTES, _PAGE_BYTES, _MAX_RUNS = 6 << 30, 2 << 20, 16
_WARM_STEPS, _STEP_LIMIT_S = 3, 20.0


@dataclass(frozen=True)
class GroupStep:
    """A step in one part: `active` replicas do the same `step`, each on sequences of its own; the others have nothing to do."""

    step: Step
    active: int = 1

    def plans(self, runs: Seq[Run], replicas: int) -> list[StepPlan | None]:
        """By replica, the first one's the one that is measured."""
        plan = plan_of(self.step, runs)
        return [plan if replica < self.active else None for replica in range(replicas)]


def steps_to_measure(replicas: int) -> list[GroupStep]:
    """Decode batches and chunks of every size that a graph exists for, and some of both. Of several replicas one may be active, as
    with prompts it is most often, or all."""
    decodes = [Step(batch, context) for batch in (1, 2, 3, 4) for context in (128, 1024, 8192)]
    prompts = [Step(chunks=1, rows=rows, past=past) for rows in (16, 32, 64, 128, 256) for past in (0, 512, 2048)]
    both = [Step(batch, 1024, 1, rows, 512) for batch in (1, 3) for rows in (32, 256)]
    if replicas == 1:
        return [GroupStep(step) for step in (*decodes, *prompts, *both)]
    alone = [GroupStep(step) for step in (*(step for step in decodes if step.context == 1024), *prompts, *both)]
    return alone + [GroupStep(step, replicas) for step in (*decodes, *(step for step in prompts if step.past == 512))]


class RankTimer:
    """Times steps of rank 0 of `plan`, which holds `held`."""

    def __init__(self, plan: GroupPlan, held: CardRank, limits: StepLimits) -> None:
        shapes = shapes_of(limits, held.kv.geometry.max_context_tokens, plan.dp)
        most_rows = max(shape.rows for shape in shapes)
        self._rank, self._dp = RankAlone(plan, held, most_rows), plan.dp
        self._parts = GroupParts(plan.dp, shapes, limits, pinned=True)
        self._lane = Lane(held.device, set(), limits.max_batch, shapes)
        self._sources = torch.zeros(plan.dp * most_rows, dtype=torch.int64, device=held.device)
        self._graphs: dict[tuple[str, Shape], torch.cuda.CUDAGraph] = {}
        self._ffn_ms: dict[tuple, float] = {}  # what an FFN side takes does not depend on the tokens that are there

    def prepare(self, steps: Seq[GroupStep], runs: Seq[Run]) -> None:
        """Compile what `steps` launch, several kernels at a time, run it once, and capture it."""
        parts = {}
        for step in steps:
            (part,) = self._parts.of(step.plans(runs, self._dp))
            parts.setdefault(part.shape, step)

        def run_all() -> None:
            for shape, step in parts.items():
                (part,) = self._parts.of(step.plans(runs, self._dp))
                self._copy_in(part)
                torch.cuda.synchronize(self._lane.device)
                with torch.cuda.stream(self._lane.stream):
                    for run in self._what_runs(shape).values():
                        run()
                torch.cuda.synchronize(self._lane.device)

        with compiling_ahead():
            run_all()
        run_all()
        for shape in parts:
            for name, run in self._what_runs(shape).items():
                self._graphs[name, shape] = captured(self._lane, self._lane.stream, run)
        torch.cuda.synchronize(self._lane.device)

    def measure(self, step: GroupStep, runs: Seq[Run], repeats: int) -> dict[str, float]:
        """Milliseconds of the whole: median, least and most over `repeats` of new random tokens and rows; of that what the host
        takes to launch it; and medians of each side alone (`dense_ms` of `ffn_ms` in layers without experts)."""
        plans, spec = step.plans(runs, self._dp), self._rank.held.attention.spec
        rng, times, launches = random.Random(step.step.longest), [], []
        for _ in range(_WARM_STEPS + repeats):
            draw_tokens(plans[0], rng, spec.vocab_size)  # this rank knows these tokens
            self._rank.posted.normal_()
            torch.cuda.synchronize(self._lane.device)
            begun = time.perf_counter()
            (part,) = self._parts.of(plans)
            composed = time.perf_counter()
            self._launch(part)
            launches.append((time.perf_counter() - composed) * 1e3)
            while not self._lane.done():
                if time.perf_counter() - begun > _STEP_LIMIT_S:
                    raise RuntimeError(f"{step} was unfinished after {_STEP_LIMIT_S} s")
            times.append((time.perf_counter() - begun) * 1e3)
        times, launches = times[_WARM_STEPS:], launches[_WARM_STEPS:]
        whole = {"step_ms": statistics.median(times), "least_ms": min(times), "most_ms": max(times)}
        whole |= {"launch_ms": statistics.median(launches), "repeats": repeats}
        whole["attention_ms"] = self._side_ms("attention", part.shape)
        for name in ("ffn", "dense"):
            key = name, step.active, step.step.batch, step.step.rows
            if key not in self._ffn_ms:
                self._ffn_ms[key] = self._side_ms(name, part.shape)
            whole[f"{name}_ms"] = self._ffn_ms[key]
        return whole

    def _side_ms(self, name: str, shape: Shape) -> float:
        graph = self._graphs.get((name, shape))
        return replayed_s(graph, self._lane.stream) * 1e3 if graph else 0.0

    def _launch(self, part: GroupPart) -> None:
        lane = self._lane
        lane.begin()
        with torch.cuda.stream(lane.stream):
            self._copy_in(part)
            self._graphs["whole", part.shape].replay()
            lane.bring_tokens(part.number, part.shape, part.wanted[0])
        lane.mark(lane.stream)

    def _copy_in(self, part: GroupPart) -> None:
        self._lane.numbers[: part.shape.numbers].copy_(part.numbers[0], non_blocking=True)
        if self._dp > 1:
            self._sources[: len(part.sources)].copy_(part.sources, non_blocking=True)

    def _what_runs(self, shape: Shape) -> dict[str, Callable[[], object]]:
        rank, lane = self._rank, self._lane
        sources, spec = self._sources[: self._dp * shape.rows], rank.held.attention.spec

        def layout() -> CardLayout:
            return CardLayout.of(shape, lane.numbers[: shape.numbers], rank.held.blocks)

        found = {
            "whole": lambda: lane.tokens_of(shape).copy_(rank.whole(layout(), sources)),
            "attention": lambda: lane.tokens_of(shape).copy_(rank.attention(layout())),
            "ffn": lambda: rank.ffn(shape.rows, sources, range(spec.num_layers)),
        }
        if spec.dense_layers:
            found["dense"] = lambda: rank.ffn(shape.rows, sources, spec.dense_layers)
        return found


def measure(model: ServedModel, plan: GroupPlan, held: CardRank, steps: Seq[GroupStep], repeats: int) -> Iterator[dict]:
    """A row a step."""
    timer = RankTimer(plan, held, LIMITS)
    longest = max(step.step.longest for step in steps)
    runs = filled_runs(held.kv, max(step.step.sequences for step in steps), longest)
    timer.prepare(steps, runs)
    for step in steps:
        shape = {"model": model.name, "tp": plan.tp, "dp": plan.dp, "active": step.active, **asdict(step.step)}
        yield {**shape, **timer.measure(step, runs, repeats)}
    for run in runs:
        held.kv.close_run(run)


def load_and_measure(model: ServedModel, plan: GroupPlan, memory_bytes: int, repeats: int) -> list[dict]:
    """The rows of a group whose first rank is loaded to the first card, with a budget of so many bytes."""
    device, begun = Device("cuda:0", "cuda", 0, memory_bytes), time.perf_counter()
    config = pool_config("kv", _KV_BYTES, _PAGE_BYTES, range(1), _MAX_RUNS)
    held, pool = load_rank(model, plan, 0, device, config, MemoryBudget(device.name, device.memory_bytes))
    torch.cuda.synchronize()
    print(f"row: {model.name} {plan}: loaded in {time.perf_counter() - begun:.0f} s", flush=True)
    rows = list(measure(model, plan, held, steps_to_measure(plan.dp), repeats))
    del held
    pool.close()
    return rows


def read_groups(text: str) -> list[tuple[ServedModel, GroupPlan]]:
    """Of entries MODEL:CARDS, the model over so many cards as systems cut it. Raises UserError for what is no such entry."""
    groups = []
    for entry in text.split(","):
        name, _, cards = entry.partition(":")
        if not cards.isdecimal() or int(cards) < 2:
            raise UserError(f"{entry!r} is no group; one is MODEL:CARDS, of two cards at least, as in {GROUPS}")
        (model,) = seeded([name])
        groups.append((model, natural_group(model.spec, tuple(f"card {rank}" for rank in range(int(cards))))))
    return groups


@command
@torch.inference_mode()
def main(argv: Seq[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m serving.gpu_suite.group_steps", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--groups", default=GROUPS, help=f"MODEL:CARDS, with commas between (default: {GROUPS})")
    parser.add_argument("--repeats", type=int, default=10, help="of each step")
    parser.add_argument("--memory-gib", type=int, default=70, help="budget of the card")
    parser.add_argument("--seconds", type=float, default=600.0, help="after which no other group is begun")
    args = parser.parse_args(argv)
    groups, begun, rows = read_groups(args.groups), time.perf_counter(), []
    prepare_process()
    for model, plan in groups:
        started_s = time.perf_counter() - begun
        try:
            if started_s > args.seconds:
                raise TimeoutError(f"not begun within {args.seconds:g} s")
            rows += load_and_measure(model, plan, args.memory_gib << 30, args.repeats)
            print(f"row: {model.name} {plan}: {time.perf_counter() - begun - started_s:.0f} s", flush=True)
        except Exception as error:  # noqa: BLE001  the next group may still work
            told = {"model": model.name, "tp": plan.tp, "dp": plan.dp}
            rows.append({**told, "error": f"{type(error).__name__}: {error}"[:300]})
        save(args.out, rows)
        free_card()
    return conclude(rows, group_steps_table, lambda row: f"{row['model']} tp{row['tp']} x dp{row['dp']}")


if __name__ == "__main__":
    raise SystemExit(main())
