"""`python -m runner.estimate`: Fig. 6 as the paper has it, estimated from placement and KV memory alone; nothing runs.

    python -m runner.estimate --system paper-crosspool paper-static paper-elastic

For each bin of context, requests of its longest length are put into the KV that a system's placement leaves, one of each model
in turn, each where most is free, until a model finds no room. That many are live at once; with a request living as long as its
output takes at `--token-ms`, it is a rate. A request uses the KV of one replica only, which is what makes long bins zero; how
soon they are rests on what engines keep of each device for themselves (`--reserve-gib`), which the paper does not say.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.config import BenchConfig
from runner.presets import composed
from runner.run import cluster_of, served_models
from serving import registry
from serving.errors import CapacityError, command
from serving.interface import Demand, Placement, ServedModel
from serving.memory.kv_pool import KVGeometry
from serving.parallel.capacity import share_model
from serving.parallel.group import GroupPlan

BINS = {"4-8K": 8192, "8-16K": 16384, "16-32K": 32768, "32-64K": 65536, "64-128K": 131072}


@dataclass(frozen=True)
class Room:
    """Where one request may lie: on each of `partitions` it takes `bytes_a_token` for every token."""

    partitions: tuple[str, ...]
    bytes_a_token: int


def live_requests(free_bytes: Mapping[str, float], rooms: Mapping[str, Sequence[Room]], tokens: int) -> int:
    """How many requests of `tokens` of each model fit at once: one of each in turn, each in the room with most free."""
    free, count = dict(free_bytes), 0
    while True:
        for choices in rooms.values():
            best = max(choices, key=lambda room: min(free[p] for p in room.partitions))
            wanted = best.bytes_a_token * tokens
            if min(free[p] for p in best.partitions) < wanted:
                return count
            for partition in best.partitions:
                free[partition] -= wanted
        count += 1


def rooms_of(placement: Placement) -> tuple[dict[str, float], dict[str, list[Room]]]:
    """(free KV bytes by partition, rooms by model). A partition is a device, or a model's quota of one."""
    free: dict[str, float] = {}
    for plan in placement.devices:
        free[plan.device.name] = plan.kv_bytes
        free |= {f"{plan.device.name}/{name}": size for name, size in plan.kv_quota_bytes.items()}
    models = {model.name: model for model in placement.models}
    rooms: dict[str, list[Room]] = {name: [] for name in models}
    instances = placement.options.get("instances")
    if instances is None:  # every KV device takes any model whole
        for plan in placement.devices:
            for name, model in models.items() if plan.kv_bytes else ():
                rooms[name].append(Room((plan.device.name,), _token_bytes(model)))
        return free, rooms
    for entry in instances:
        model = models[entry["model"]]
        group = GroupPlan(tuple(entry["devices"]), entry["tp"], entry["dp"])
        for replica in range(group.dp):
            ranks = group.ranks_of(replica)
            own = [group.devices[rank] for rank in ranks]
            names = tuple(f"{d}/{model.name}" if f"{d}/{model.name}" in free else d for d in own)
            rooms[model.name].append(Room(names, _token_bytes(share_model(model, group, ranks[0]))))
    return free, rooms


def _token_bytes(model: ServedModel) -> int:
    geometry = KVGeometry.of(model.spec, model.dtype)
    return geometry.num_layers * geometry.token_bytes


def estimate(config: BenchConfig, output_tokens: float, token_ms: float, reserve_bytes: float = 0) -> dict[str, float]:
    """Highest aggregate rate (req/s) by bin, where `reserve_bytes` of each device's KV memory serve something else (graphs,
    activations, fragments); models whose context ends before a bin are left out of it."""
    models = served_models(config)
    system = registry.create(config.system.name, config.system.options)
    placement = system.plan(cluster_of(config), models, Demand())
    free, rooms = rooms_of(placement)
    free = {partition: max(0, size - reserve_bytes) for partition, size in free.items()}
    rates = {}
    for label, tokens in BINS.items():
        able = {model.name: rooms[model.name] for model in models if model.spec.max_context_tokens >= tokens}
        live = live_requests(free, able, tokens) if able else 0
        rates[label] = live * len(able) / (output_tokens * token_ms / 1e3)
    return rates


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m runner.estimate", description=__doc__.splitlines()[0])
    parser.add_argument("--system", nargs="+", default=["paper-crosspool", "paper-static", "paper-elastic"])
    parser.add_argument("--conf", default="paper-context", help="scenario that names models and cluster")
    parser.add_argument("--output-tokens", type=float, default=1536.0, help="mean output of a request")
    parser.add_argument(
        "--token-ms", type=float, default=40.0, help="time between tokens that a request's life rests on"
    )
    parser.add_argument(
        "--reserve-gib", type=float, nargs="+", default=[0.0, 2.0, 4.0, 6.0], help="KV memory not to be had"
    )
    parser.add_argument("--csv", type=Path, help="also write one row a system and bin to this file")
    arguments = parser.parse_args(argv)
    rows = ["system,bin,context_tokens,reserve_gib,rate_rps"]
    print(f"{'req/s, estimated':<18}{'GiB kept':>9}" + "".join(f"{label:>10}" for label in BINS))
    for name in arguments.system:
        config = composed(f"conf={arguments.conf}", f"system={name}")
        for reserve_gib in arguments.reserve_gib:
            try:
                rates = estimate(config, arguments.output_tokens, arguments.token_ms, reserve_gib * 2**30)
            except CapacityError as error:
                print(f"{name:<18} does not fit: {error}")
                break
            print(f"{name:<18}{reserve_gib:9g}" + "".join(f"{rate:10.2f}" for rate in rates.values()))
            rows += [
                f"{config.system.name},{label},{BINS[label]},{reserve_gib!r},{rate!r}" for label, rate in rates.items()
            ]
    if arguments.csv:
        arguments.csv.write_text("\n".join(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
