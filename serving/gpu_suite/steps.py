"""Steps of real configurations on one card, as the engine runs them: prompts in chunks, decode batches, and both in one step.

Published configurations with seeded values; in this process, without host or rings. A step is launched and looked for just as
the worker does it: graphs captured at warm-up, both halves in one (`fused`), one step at a time. The simulator takes its costs
of this engine from such rows. What each side of a step takes alone is told beside it.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from serving.batching import StepLimits
from serving.cuda.build import prepare_process
from serving.cuda.capture import CardModel
from serving.cuda.layout import fill_numbers
from serving.cuda.runner import StepRunner
from serving.errors import command
from serving.gpu_suite.engine import load
from serving.gpu_suite.results import conclude, free_card, save
from serving.gpu_suite.seeded import seeded
from serving.gpu_suite.sides import Sides
from serving.gpu_suite.steps_table import steps_table
from serving.memory.kv_pool import ModelKV, Run
from serving.part_shapes import parts_of, shapes_of, smallest
from serving.scheduler import StepPlan
from serving.sequence import Sequence

LIMITS = StepLimits(max_batch=4, prefill_chunk=256)
_KV_BYTES = 6 << 30
_WARM_STEPS, _LIMIT_S = 3, 20.0


@dataclass(frozen=True)
class Step:
    """What one step computes: the next token of `batch` sequences, each of `context` tokens once it is done, and of `chunks`
    prompts the `rows` tokens that follow the first `past`."""

    batch: int = 0
    context: int = 0
    chunks: int = 0
    rows: int = 0
    past: int = 0

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence once it is done."""
        return max(self.context, self.past + self.rows)

    @property
    def sequences(self) -> int:
        return self.batch + self.chunks


def steps_to_measure() -> list[Step]:
    """Chunks of every size that a graph exists for and of one between; decode batches; both in one part; steps of two parts."""
    prompts = [
        Step(chunks=1, rows=rows, past=past) for rows in (16, 32, 64, 100, 128, 256) for past in (0, 512, 2048, 8192)
    ]
    decodes = [Step(batch, context) for batch in (1, 2, 3, 4) for context in (128, 1024, 8192)]
    mixed = [Step(batch, 1024, 1, rows, 512) for rows in (16, 32, 64, 128, 256) for batch in (1, 3)]
    mixed += [Step(3, 8192, 1, 256, 2048), Step(3, 128, 1, 256, 0), Step(1, 8192, 1, 64, 8192), Step(3, 8192, 1, 16, 0)]
    mixed += [Step(chunks=2, rows=128, past=512), Step(2, 128, 2, 100, 0)]
    return prompts + decodes + mixed


def measure(name: str, model: CardModel, control: str, steps: Seq[Step], repeats: int) -> Iterator[dict]:
    """A row a step that fits into the model's context: median, least and most milliseconds over `repeats`, new random tokens
    each time; and of a step of one part what each side takes alone (`dense_ms` of `ffn_ms` in layers without experts)."""
    longest = model.kv.geometry.max_context_tokens
    steps = [step for step in steps if step.longest <= longest]
    runs = filled_runs(model.kv, max(step.sequences for step in steps), max(step.longest for step in steps))
    runner = StepRunner([model], 1, LIMITS, control)
    shapes, sides = shapes_of(LIMITS, longest), {}
    for step in steps:
        times = _time(runner, step, runs, model.attention.spec.vocab_size, repeats)
        row = {"model": name, "control": control, **asdict(step), "step_ms": statistics.median(times)}
        row |= {"least_ms": min(times), "most_ms": max(times), "repeats": repeats}
        if step.chunks <= 1:
            (part,), shape = parts_of(plan_of(step, runs)), smallest(shapes, step.batch, step.rows)
            if shape not in sides:
                sides[shape] = Sides(model, shape)
            side = sides[shape]
            row["attention_ms"] = side.attention_s(functools.partial(fill_numbers, part, shape)) * 1e3
            row |= {"ffn_ms": side.ffn_s() * 1e3, "dense_ms": side.dense_s() * 1e3}
        yield row
    runner.close()
    for run in runs:
        model.kv.close_run(run)


def filled_runs(kv: ModelKV, count: int, tokens: int) -> list[Run]:
    """`count` runs of `tokens` tokens, of random values: equal ones draw less power than a model's."""
    runs = [kv.open_run() for _ in range(count)]
    for run in runs:
        kv.grow(run, tokens)
        for layer in kv.layers:
            layer[run.start_slot : run.start_slot + tokens].normal_()
    return runs


def plan_of(step: Step, runs: Seq[Run]) -> StepPlan:
    items = []
    for place, run in enumerate(runs[: step.sequences]):
        length, rows = (step.context, 1) if place < step.batch else (step.past + step.rows, step.rows)
        sequence = Sequence(place, 0, [7] * length, length, 2, run=run)
        sequence.cached = length - rows
        items.append((sequence, rows))
    return StepPlan.following(0, tuple(items))


def draw_tokens(plan: StepPlan, rng: random.Random, vocab_size: int) -> None:
    """New random tokens for the rows of `plan`: equal ones would choose the same experts."""
    for sequence, rows in plan.items:
        sequence.tokens[sequence.cached :] = rng.choices(range(vocab_size), k=rows)


def _time(runner: StepRunner, step: Step, runs: Seq[Run], vocab_size: int, repeats: int) -> list[float]:
    """Milliseconds of each of `repeats` such steps, from launch to done, after some that do not count. Raises RuntimeError for
    one that does not end."""
    plan, rng, times = plan_of(step, runs), random.Random(step.longest), []
    for _ in range(_WARM_STEPS + repeats):
        draw_tokens(plan, rng, vocab_size)
        begun = time.perf_counter()
        runner.launch(0, 0, plan)
        while not runner.done(0):
            if time.perf_counter() - begun > _LIMIT_S:
                raise RuntimeError(f"{step} was unfinished after {_LIMIT_S} s")
        times.append((time.perf_counter() - begun) * 1e3)
        runner.result(0)
    return times[_WARM_STEPS:]


@command
@torch.inference_mode()
def main(argv: Seq[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving.gpu_suite.steps", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default="qwen3-30b-a3b,deepseek-v2-lite,glm-4.7-flash")
    parser.add_argument("--controls", default="fused", help="of fused, lowered, host")
    parser.add_argument("--repeats", type=int, default=15, help="of each step")
    parser.add_argument("--memory-gib", type=int, default=120, help="budget of the card")
    args = parser.parse_args(argv)
    models = seeded(args.models.split(","))
    prepare_process()
    rows: list[dict] = []
    for model in models:
        begun = time.perf_counter()
        together, pool = load(model, args.memory_gib << 30, kv_bytes=_KV_BYTES)[::2]
        try:
            for control in args.controls.split(","):
                rows += measure(model.name, together, control, steps_to_measure(), args.repeats)
                save(args.out, rows)
        except Exception as error:  # noqa: BLE001  the next model may still work
            rows.append({"model": model.name, "error": f"{type(error).__name__}: {error}"[:300]})
            save(args.out, rows)
        measured = sum(row["model"] == model.name and "error" not in row for row in rows)
        print(f"row: {model.name}: {measured} steps, {time.perf_counter() - begun:.0f} s", flush=True)
        del together
        pool.close()
        free_card()
    return conclude(rows, steps_table, lambda row: row["model"])


if __name__ == "__main__":
    raise SystemExit(main())
