"""The engine's ablation on a card: time between tokens of real configurations, by control and lanes, at small batches.

In this process, without host or rings, so that what is timed is the data path: steps are launched and looked for just as
the worker does it. `fused` is both halves in one graph, the reference of co-located kernels.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from pathlib import Path

import torch

from serving.batching import StepLimits
from serving.cost.table1 import published_spec
from serving.cuda.build import load_attention, load_ffn, open_pool, prepare_process
from serving.cuda.capture import CardModel
from serving.cuda.runner import StepRunner
from serving.errors import command
from serving.gpu_suite.results import save
from serving.interface import Device, ServedModel
from serving.memory.budget import MemoryBudget
from serving.memory.kv_pool import KVPool, Run
from serving.scheduler import StepPlan
from serving.sequence import Sequence

_PAGE_BYTES = 2 << 20
_KV_BYTES = 16 << 30
_PROMPT_TOKENS, _NEW_TOKENS, _WARM_STEPS = 512, 80, 16
_LIMIT_S = 20.0
_CONFIGURATIONS = (
    *((control, lanes) for control in ("fused", "lowered", "host") for lanes in (1, 2)),
    ("resident", 1),  # two lanes beside it on one card do not end: attention waits for what the executor holds
)


def load(name: str, memory_bytes: int) -> tuple[CardModel, KVPool]:
    """A published configuration with seeded values, its halves and KV on card 0."""
    model = ServedModel(published_spec(name), Path(), "bfloat16", dummy=True)
    device = Device("cuda:0", "cuda", 0, memory_bytes)
    budget = MemoryBudget(device.name, device.memory_bytes)
    attention, ffn = load_attention(model, device, budget), load_ffn(model, device, budget)
    pool = open_pool(_KV_BYTES // _PAGE_BYTES, _PAGE_BYTES, [model], 16, device)
    return CardModel.of(attention, ffn, pool.models[model.name]), pool


def time_decode(runner: StepRunner, runs: Seq[Run], lanes: int, batch: int) -> dict[str, float]:
    """Seconds between tokens with `lanes` batches of `batch` sequences in flight: median and P99 over steps, and tokens a
    second of all lanes together."""
    plans = []
    for lane in range(lanes):
        sequences = []
        for place, run in enumerate(runs[lane * batch : (lane + 1) * batch], start=lane * batch):
            token = 7 + 131 * place  # equal rows would choose the same experts, and read fewer than a batch does
            sequences.append(Sequence(0, 0, [token] * _PROMPT_TOKENS, _PROMPT_TOKENS, _NEW_TOKENS, run=run))
            sequences[-1].cached = _PROMPT_TOKENS - 1
        plans.append(StepPlan.following(0, tuple((sequence, 1) for sequence in sequences)))
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


def measure(name: str, model: CardModel, batches: Seq[int], configurations: Seq[tuple[str, int]]) -> Iterator[dict]:
    """Rows of one model, one a configuration and batch; a configuration that fails is a row with its error."""
    runs = [model.kv.open_run() for _ in range(2 * max(batches))]
    for run in runs:  # before anything waits on the card
        model.kv.grow(run, _PROMPT_TOKENS + _NEW_TOKENS)
    for control, lanes in configurations:
        row = {"model": name, "control": control, "lanes": lanes}
        try:
            begun = time.perf_counter()
            runner = StepRunner([model], lanes, StepLimits(max(batches), 64), control)
            warm_s = time.perf_counter() - begun
            for batch in batches:
                yield {**row, "batch": batch, "warm_up_s": warm_s, **time_decode(runner, runs, lanes, batch)}
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
    parser.add_argument("--memory-gib", type=int, default=120)
    args = parser.parse_args(argv)
    prepare_process()
    batches = [int(text) for text in args.batches.split(",")]
    wanted = args.controls.split(",") if args.controls else {control for control, _ in _CONFIGURATIONS}
    configurations = [pair for pair in _CONFIGURATIONS if pair[0] in wanted]
    rows: list[dict] = []
    for name in args.models.split(","):
        begun = time.perf_counter()
        model, pool = load(name, args.memory_gib << 30)
        torch.cuda.synchronize()
        print(f"row: {name} loaded in {time.perf_counter() - begun:.1f} s", flush=True)
        for row in measure(name, model, batches, configurations):
            rows.append(row)
            print("row: " + _described(row), flush=True)
            save(args.out, rows)
        del model
        pool.close()
        torch.cuda.empty_cache()
    return int(any("error" in row for row in rows))


def _described(row: dict) -> str:
    head = f"{row['model']:<18} {row['control']:<9} lanes {row['lanes']}"
    if "error" in row:
        return f"{head}  {row['error']}"
    return (
        f"{head} batch {row['batch']}  TBT {row['tbt_s'] * 1e3:7.3f} ms, P99 {row['tbt_p99_s'] * 1e3:7.3f}, "
        f"{row['tokens_per_s']:7.0f} tok/s, warm-up {row['warm_up_s']:.0f} s"
    )


if __name__ == "__main__":
    raise SystemExit(main())
