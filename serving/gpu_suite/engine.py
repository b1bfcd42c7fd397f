"""The engine's ablation on a card: time between tokens of real configurations, by control and lanes, at small batches.

In this process, without host or rings, so that what is timed is the data path: steps are launched and looked for just as
the worker does it. `fused` is both halves in one graph on one card, the reference of co-located kernels. With `--apart` the
others have FFN halves on another card, and what each side's step takes alone says how fast two batches in flight could be.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from pathlib import Path

import torch

from serving.batching import StepLimits
from serving.cuda.build import card, load_attention, load_ffn, open_peer_access, open_pool, prepare_process
from serving.cuda.capture import CardModel
from serving.cuda.ffn_parts import FFNParts
from serving.cuda.layout import fill_numbers
from serving.cuda.runner import StepRunner
from serving.errors import command
from serving.gpu_suite.results import save
from serving.gpu_suite.seeded import seeded
from serving.gpu_suite.sides import Sides
from serving.interface import Device, ServedModel
from serving.memory.budget import MemoryBudget
from serving.memory.kv_pool import KVPool, Run
from serving.part_shapes import Shape, parts_of
from serving.scheduler import StepPlan
from serving.sequence import Sequence

_PAGE_BYTES = 2 << 20
_KV_BYTES = 4 << 30
_PROMPT_TOKENS, _NEW_TOKENS, _WARM_STEPS = 512, 80, 16
_LIMIT_S = 20.0
_CONFIGURATIONS = tuple((control, lanes) for control in ("fused", "lowered", "host", "resident") for lanes in (1, 2))


def load(
    model: ServedModel, memory_bytes: int, ffn_card: int = 0, kv_bytes: int = _KV_BYTES
) -> tuple[CardModel, CardModel, KVPool]:
    """`model` with attention and KV on card 0: with its FFN half there, and with one on `ffn_card` (the same one, if that
    is 0)."""
    here, there = (Device(f"cuda:{index}", "cuda", index, memory_bytes) for index in (0, ffn_card))
    open_peer_access({card(here), card(there)})
    budget = MemoryBudget(here.name, memory_bytes)
    attention, ffn = load_attention(model, here, budget), FFNParts(load_ffn(model, here, budget))
    pool = open_pool(kv_bytes // _PAGE_BYTES, _PAGE_BYTES, [model], 16, here)
    kv = pool.models[model.name]
    together = CardModel.of(attention, ffn, kv)
    if not ffn_card:
        return together, together, pool
    apart = FFNParts(load_ffn(model, there, MemoryBudget(there.name, memory_bytes)))
    return together, CardModel.of(attention, apart, kv), pool


def decode_plan(runs: Seq[Run], lane: int, batch: int) -> StepPlan:
    """A decode step of `batch` sequences that have their prompts behind them."""
    sequences = []
    for place, run in enumerate(runs[lane * batch : (lane + 1) * batch], start=lane * batch):
        token = 7 + 131 * place  # equal rows would choose the same experts, and read fewer than a batch does
        sequences.append(Sequence(0, 0, [token] * _PROMPT_TOKENS, _PROMPT_TOKENS, _NEW_TOKENS, run=run))
        sequences[-1].cached = _PROMPT_TOKENS - 1
    return StepPlan.following(0, tuple((sequence, 1) for sequence in sequences))


def side_seconds(model: CardModel, runs: Seq[Run], batch: int) -> dict[str, float]:
    """Median seconds of a decode step's attention side alone and of its FFN side alone, each one graph, nothing crossing. The
    kernels of both must have run before."""
    (part,), shape = parts_of(decode_plan(runs, 0, batch)), Shape(batch, 0)
    sides = Sides(model, shape)
    return {"attention_s": sides.attention_s(lambda out: fill_numbers(part, shape, out)), "ffn_s": sides.ffn_s()}


def time_decode(runner: StepRunner, runs: Seq[Run], lanes: int, batch: int) -> dict[str, float]:
    """Seconds between tokens with `lanes` batches of `batch` sequences in flight: median and P99 over steps, and tokens a
    second of all lanes together."""
    plans = [decode_plan(runs, lane, batch) for lane in range(lanes)]
    started = [0.0] * lanes
    steps: list[list[float]] = [[] for _ in range(lanes)]
    for lane, plan in enumerate(plans):
        started[lane] = time.perf_counter()
        runner.launch(lane, 0, plan)
    begun = ended = 0.0
    deadline = time.perf_counter() + _LIMIT_S
    while any(len(done) < _NEW_TOKENS for done in steps):
        if time.perf_counter() > deadline:
            raise RuntimeError(f"steps were unfinished after {_LIMIT_S} s")
        for lane, plan in enumerate(plans):
            if len(steps[lane]) == _NEW_TOKENS or not runner.done(lane):
                continue
            ended = time.perf_counter()
            steps[lane].append(ended - started[lane])
            for (sequence, _), token in zip(plan.items, runner.result(lane), strict=True):
                sequence.cached += 1
                sequence.append(token)
            if len(steps[lane]) == _WARM_STEPS and lane == lanes - 1:
                begun = ended
            started[lane] = ended
            if len(steps[lane]) < _NEW_TOKENS:
                runner.launch(lane, 0, plan)
    counted = sorted(step for done in steps for step in done[_WARM_STEPS:])
    return {
        "tbt_s": counted[len(counted) // 2],
        "tbt_p99_s": counted[int(0.99 * (len(counted) - 1))],
        "tokens_per_s": lanes * batch * (_NEW_TOKENS - _WARM_STEPS) / (ended - begun),
    }


def measure(
    name: str, together: CardModel, parted: CardModel, batches: Seq[int], configurations: Seq[tuple[str, int]]
) -> Iterator[dict]:
    """Rows of one model, one a configuration and batch; a configuration that fails is a row with its error. `fused` runs the
    model that is `together`, the others the `parted` one, which may be the same."""
    kv, apart = together.kv, parted is not together
    runs = [kv.open_run() for _ in range(2 * max(batches))]
    for run in runs:  # before anything waits on the card
        kv.grow(run, _PROMPT_TOKENS + _NEW_TOKENS)
    for control, lanes in configurations:
        row = {"model": name, "control": control, "lanes": lanes, "cards": 2 if apart and control != "fused" else 1}
        try:
            begun = time.perf_counter()
            model = together if control == "fused" else parted
            runner = StepRunner([model], lanes, StepLimits(max(batches), 64), control)
            warm_s = time.perf_counter() - begun
            for batch in batches:
                found = time_decode(runner, runs, lanes, batch)
                if control == "lowered":
                    found |= side_seconds(model, runs, batch)
                yield {**row, "batch": batch, "warm_up_s": warm_s, **found}
            runner.close()
            del runner
        except Exception as error:  # noqa: BLE001  the next configuration may still work
            yield {**row, "error": f"{type(error).__name__}: {error}"[:300]}
        torch.cuda.empty_cache()


@command
@torch.inference_mode()
def main(argv: Seq[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving.gpu_suite.engine", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default="deepseek-v2-lite,qwen3-30b-a3b")
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--controls", default="", help="of fused, lowered, host, resident; all by default")
    parser.add_argument("--memory-gib", type=int, default=120, help="budget of each card")
    parser.add_argument("--apart", action="store_true", help="FFN halves on a second card, but for fused")
    args = parser.parse_args(argv)
    prepare_process()
    batches = [int(text) for text in args.batches.split(",")]
    wanted = args.controls.split(",") if args.controls else {control for control, _ in _CONFIGURATIONS}
    configurations = [pair for pair in _CONFIGURATIONS if pair[0] in wanted]
    rows: list[dict] = []
    for name in args.models.split(","):
        begun = time.perf_counter()
        together, parted, pool = load(*seeded([name]), args.memory_gib << 30, int(args.apart))
        torch.cuda.synchronize()
        print(f"row: {name} loaded in {time.perf_counter() - begun:.1f} s", flush=True)
        for row in measure(name, together, parted, batches, configurations):
            rows.append(row)
            print("row: " + _described(row), flush=True)
            save(args.out, rows)
        del together, parted
        pool.close()
        torch.cuda.empty_cache()
    return int(any("error" in row for row in rows))


def _described(row: dict) -> str:
    head = f"{row['model']:<18} {row['control']:<9} lanes {row['lanes']}"
    if "error" in row:
        return f"{head}  {row['error']}"
    sides = f"; alone: attention {row['attention_s'] * 1e3:.3f}, FFN {row['ffn_s'] * 1e3:.3f}" if "ffn_s" in row else ""
    return (
        f"{head} batch {row['batch']}  TBT {row['tbt_s'] * 1e3:7.3f} ms, P99 {row['tbt_p99_s'] * 1e3:7.3f}, "
        f"{row['tokens_per_s']:7.0f} tok/s, warm-up {row['warm_up_s']:.0f} s{sides}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
