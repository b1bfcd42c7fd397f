"""`python -m crosspool.bench_pairing`: what pairing models by their stages brings where their layers take unequal times.

SIMULATED: three published models on one card a pool. One has long contexts, so its attention outweighs its FFN; the other two
have short ones and larger experts, so it is the other way round. All have requests waiting all the time. Pairing shifts turns a
little, and tokens of different models cost different work, so what counts is the work done: every model's tokens a second over
those that it reaches alone on the same two devices, added up. Above 1, models that share the devices fill each other's gaps.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from crosspool.engine import CrossPool, CrossPoolOptions
from serving.cost.table1 import published_spec
from serving.errors import command
from serving.interface import Cluster, Demand, Device, Request, ServedModel
from serving.pairing import PAIRINGS, overlap, stage_profile
from serving.sim.backend import simulate_card

MODELS = (
    ("qwen3-30b-a3b", 32_000),
    ("deepseek-v2-lite", 128),
    ("deepseek-v2-lite", 128),
)
_MEMORY_BYTES = 138 << 30
_PAGE_BYTES = 2 << 20
_POLL_S = 0.01


def served_models() -> list[ServedModel]:
    """The models, two of one shape under names of their own."""
    specs = [dataclasses.replace(published_spec(name), name=f"{name}-{i}") for i, (name, _) in enumerate(MODELS)]
    return [ServedModel(spec, Path("simulated"), "bfloat16") for spec in specs]


def tokens_per_s(
    models: Sequence[ServedModel], asked: Sequence[ServedModel], pairing: str, batch: int, card: str, seconds: float
) -> dict[str, float]:
    """Decode tokens a second of those `asked` of `models` while all of them have work, over `seconds` of virtual time."""
    options = CrossPoolOptions(pairing=pairing, max_batch=batch, page_bytes=_PAGE_BYTES, max_running=2 * batch)
    devices = tuple(Device(f"cuda:{index}", "cuda", index, _MEMORY_BYTES) for index in range(2))
    contexts = {model.name: context for model, (_, context) in zip(models, MODELS, strict=True)}
    demand = Demand({name: 1.0 for name in contexts}, {name: [(tokens, 2)] for name, tokens in contexts.items()})
    system, backend = CrossPool(options), simulate_card(card, prefill=False)
    counted = dict.fromkeys(contexts, 0)
    try:
        system.start(system.plan(Cluster(devices), models, demand), backend)
        owner = {}
        for number, (model, _) in enumerate(itertools.product(asked, range(2 * batch))):
            owner[number] = model.name
            system.submit(Request(number, model.name, (1,) * contexts[model.name], 1 << 12))
        while backend.clock.now_ns() < seconds * 1e9:
            backend.clock.sleep(_POLL_S)
            for event in system.poll():
                counted[owner[event.request_id]] += len(event.tokens)
    finally:
        system.stop()
    return {name: count / seconds for name, count in counted.items()}


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m crosspool.bench_pairing", description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--card", default="h200", help="of conf/hardware")
    parser.add_argument("--seconds", type=float, default=2.0, help="of virtual time")
    args = parser.parse_args(argv)
    models = served_models()
    print(f"SIMULATED {args.card}: decode tokens/s while every model has work")
    for batch in args.batch:
        profiles = [stage_profile(m.spec, m.dtype, batch, c) for m, (_, c) in zip(models, MODELS, strict=True)]
        pairs = itertools.combinations_with_replacement(range(len(models) - 1), 2)
        reach = ", ".join(f"{MODELS[a][0]} + {MODELS[b][0]} {overlap(profiles[a], profiles[b]):.0%}" for a, b in pairs)
        print(f"batch {batch}; overlap that could be reached: {reach}")
        alone = {m.name: tokens_per_s(models, [m], "fair", batch, args.card, args.seconds)[m.name] for m in models}
        for pairing in PAIRINGS:
            speeds = tokens_per_s(models, models, pairing, batch, args.card, args.seconds)
            work = sum(speeds[name] / alone[name] for name in alone)
            by_model = ", ".join(f"{name} {speed:.1f} (alone {alone[name]:.1f})" for name, speed in speeds.items())
            print(f"  {pairing:>8}: work {work:.3f}   {by_model}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
