"""`python -m serving.bench_loop`: what a card's worker does between two steps, in microseconds, without a card.

The worker is the real one, with its scheduler, pages, rings and the numbers it writes for a step. Only the runner stands in: a step
of it ends so many milliseconds after its launch. What is told is the time from a step's end to the next launch, in which a card
with one batch in flight computes nothing; it holds everything but the driver's calls. Code that runs once a step finds its caches
cold, so this is more than the same code takes in a loop of its own.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Sequence

import torch

from serving.batching import StepLimits
from serving.cuda.layout import fill_parts
from serving.cuda.worker import CardWorker
from serving.errors import UserError, command
from serving.memory.kv_pool import KVGeometry, KVPool
from serving.part_shapes import shapes_of
from serving.scheduler import StepPlan
from serving.shm.bell import Bell
from serving.shm.region import SharedRegion
from serving.shm.ring import BelledRing, Ring
from serving.spec import ModelSpec, spec_from_config
from serving.workers.counters import REGION_BYTES, Counters
from serving.workers.messages import Stop, Submit, encode
from serving.workers.model_worker import HostedModel

_PAGE_BYTES, _RING_BYTES, _SAMPLE_MS = 65536, 1 << 20, 100.0
_PROMPT_TOKENS, _MOST_TOKENS = 64, 4096
_WARM_STEPS = 50
_LOOK_S = 0.002  # how often a host takes tokens


def _spec() -> ModelSpec:
    """28 layers, as DeepSeek-V2-Lite has nearly; nothing of it is computed."""
    return spec_from_config(
        {
            "model_type": "mixtral", "num_hidden_layers": 28, "hidden_size": 64, "vocab_size": 512, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
            "intermediate_size": 32, "max_position_embeddings": _MOST_TOKENS,
        },
        "stand-in",
    )  # fmt: skip


class TimedSteps:
    """Steps that take `step_s` from their launch; `gaps_s` are the times from the end of one to the launch of the next."""

    bytes_crossed = 0

    def __init__(self, step_s: float, limits: StepLimits) -> None:
        self.gaps_s: list[float] = []
        self._step_s, self._shapes = step_s, shapes_of(limits, _MOST_TOKENS)
        self._numbers = torch.zeros(limits.max_batch, max(shape.numbers for shape in self._shapes), dtype=torch.int64)
        self._ends_s, self._wanted = 0.0, 0

    def launch(self, lane: int, model: int, plan: StepPlan) -> None:
        """What :class:`serving.cuda.runner.StepRunner` does before it calls the driver."""
        self._wanted = sum(len(wanted) for _, _, wanted in fill_parts(plan, self._shapes, self._numbers))
        now_s = time.perf_counter()
        if self._ends_s:
            self.gaps_s.append(now_s - self._ends_s)
        self._ends_s = now_s + self._step_s

    def done(self, lane: int) -> bool:
        return time.perf_counter() >= self._ends_s

    def result(self, lane: int) -> list[int]:
        return [1] * self._wanted

    def close(self) -> None:
        pass


def measure(batch: int, step_s: float, steps: int) -> list[float]:
    """Seconds from the end of a step to the next launch, of `steps` decode steps of `batch` sequences."""
    spec, limits = _spec(), StepLimits(batch, _PROMPT_TOKENS)
    new_tokens = steps + _WARM_STEPS + 1  # a gap lies between two
    pages = batch * KVGeometry.of(spec, "float32").pages(_PROMPT_TOKENS + new_tokens, _PAGE_BYTES)
    pool = KVPool(pages, _PAGE_BYTES, [(spec, "float32")], batch)
    regions = [SharedRegion(size) for size in (_RING_BYTES, _RING_BYTES, REGION_BYTES)]
    control, tokens, counters = BelledRing(regions[0], Bell()), Ring(regions[1]), Counters(regions[2])
    runner = TimedSteps(step_s, limits)
    hosted = HostedModel(0, None, pool.models[spec.name], runner, 0, spec.num_layers)
    worker = CardWorker(runner, [hosted], [("kv", pool)], limits, 1, control, tokens, counters, _SAMPLE_MS)
    for request_id in range(batch):
        control.push(encode(Submit(request_id, 0, tuple(range(_PROMPT_TOKENS)), new_tokens, ())))
    stopped = threading.Event()

    def host() -> None:
        while not stopped.wait(_LOOK_S):
            while tokens.pop() is not None:
                pass
            if counters.read()["steps"] > steps + _WARM_STEPS:
                control.push(encode(Stop()))
                return

    taking = threading.Thread(target=host)
    taking.start()
    try:
        worker.run()
    finally:
        stopped.set()
        taking.join()
        pool.close()
    return runner.gaps_s[_WARM_STEPS : _WARM_STEPS + steps]


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving.bench_loop", description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="sequences that decode together")
    parser.add_argument("--step-ms", type=float, default=1.0, help="what a step takes")
    parser.add_argument("--steps", type=int, default=1000, help="decode steps of a round")
    parser.add_argument("--rounds", type=int, default=3, help="of all batches, in turns")
    args = parser.parse_args(argv)
    most = _MOST_TOKENS - _PROMPT_TOKENS - _WARM_STEPS - 1
    if min(args.batch) < 1 or args.step_ms <= 0 or args.rounds < 1 or not 1 <= args.steps <= most:
        raise UserError(f"batches, milliseconds and rounds must be positive, and steps lie in 1 to {most}")
    torch.set_num_threads(1)
    gaps: dict[int, list[list[float]]] = {batch: [] for batch in args.batch}
    for _ in range(args.rounds):
        for batch, found in gaps.items():
            found.append(measure(batch, args.step_ms / 1e3, args.steps))
    print("batch  from a step's end to the next launch, us: median  P90  medians of rounds")
    for batch, rounds in gaps.items():
        every = sorted(gap * 1e6 for found in rounds for gap in found)
        medians = ", ".join(f"{statistics.median(found) * 1e6:.0f}" for found in rounds)
        print(f"{batch:5}  {statistics.median(every):6.0f}  {every[int(0.9 * (len(every) - 1))]:6.0f}  {medians}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
