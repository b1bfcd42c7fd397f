"""Which model lies on which device so that KV is nowhere scarcer than it must be (Prism, arXiv 2505.04021). Pure.

Pressure of a device (KVPR) = sum over its models of token rate x token bytes / SLO, divided by the KV that they share there:
how fast KV is asked for, weighed by how soon it must come, per byte that there is. Greedy: models in order of what they add,
each to the device whose pressure is least with it. The naive placement (largest first on the emptiest device) is tried too,
and kept where the greedy one is worse or finds no place, which a greedy packing may.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from serving.errors import CapacityError
from serving.memory.budget import format_bytes


@dataclass(frozen=True)
class Pressing:
    """A model as placement sees it: bytes of weights and workspace, the least KV with which it serves at all, and what it
    adds to the pressure: tokens/s x bytes of KV a token / SLO in seconds."""

    name: str
    held_bytes: int
    least_kv_bytes: int
    demand: float


@dataclass
class _Seats:
    """One device of `memory_bytes` and those on it."""

    device: str
    memory_bytes: int
    models: list[Pressing]

    def kv_bytes(self, more: Sequence[Pressing] = ()) -> int:
        return self.memory_bytes - sum(model.held_bytes for model in (*self.models, *more))

    def missing_bytes(self, model: Pressing) -> int:
        """By which the device is too small for `model` too, with KV enough for each alone; 0 or less where it is not."""
        return max(one.least_kv_bytes for one in (*self.models, model)) - self.kv_bytes([model])

    def pressure(self, more: Sequence[Pressing] = ()) -> float:
        asked = sum(model.demand for model in (*self.models, *more))
        kv_bytes = self.kv_bytes(more)
        return 0.0 if not asked else asked / kv_bytes if kv_bytes > 0 else math.inf


def pressures(
    models: Iterable[Pressing], placed: Mapping[str, str], memory_bytes: Mapping[str, int]
) -> dict[str, float]:
    """The pressure of every device under a placement."""
    models = list(models)
    return {
        device: _Seats(device, size, [model for model in models if placed[model.name] == device]).pressure()
        for device, size in memory_bytes.items()
    }


def objective(
    models: Iterable[Pressing], placed: Mapping[str, str], memory_bytes: Mapping[str, int]
) -> tuple[float, ...]:
    """What a placement is judged by, less is better: its devices' pressures, the greatest first."""
    return tuple(sorted(pressures(models, placed, memory_bytes).values(), reverse=True))


def place(models: Sequence[Pressing], memory_bytes: Mapping[str, int]) -> dict[str, str]:
    """Device by model. Raises CapacityError, naming a model and the bytes that it lacks, where neither rule finds a place."""
    found, problem = [], None
    for rule in (greedy, naive):
        try:
            found.append(rule(models, memory_bytes))
        except CapacityError as error:
            problem = error
    if not found:
        raise problem
    return min(found, key=lambda placed: objective(models, placed, memory_bytes))


def greedy(models: Sequence[Pressing], memory_bytes: Mapping[str, int]) -> dict[str, str]:
    """Those that press most first, each where the device's pressure is least with it; ties to where most is free."""
    order = sorted(models, key=lambda model: (-model.demand, -model.held_bytes, model.name))
    return _fill(order, memory_bytes, lambda seats, model: (seats.pressure([model]), -seats.kv_bytes()))


def naive(models: Sequence[Pressing], memory_bytes: Mapping[str, int]) -> dict[str, str]:
    """The largest first, each where most is free, whatever is asked of it."""
    order = sorted(models, key=lambda model: (-model.held_bytes, model.name))
    return _fill(order, memory_bytes, lambda seats, model: -seats.kv_bytes())


def _fill(
    order: Sequence[Pressing], memory_bytes: Mapping[str, int], cost: Callable[[_Seats, Pressing], object]
) -> dict[str, str]:
    devices = [_Seats(device, size, []) for device, size in memory_bytes.items()]
    placed = {}
    for model in order:
        fitting = [seats for seats in devices if seats.missing_bytes(model) <= 0]
        if not fitting:
            nearest = min(devices, key=lambda seats: seats.missing_bytes(model))
            missing = nearest.missing_bytes(model)
            raise CapacityError(
                f"no device has room for {model.name}: weights, workspace and least KV need "
                f"{format_bytes(model.held_bytes + model.least_kv_bytes)}, {nearest.device} comes nearest and "
                f"{missing} bytes ({format_bytes(missing)}) are missing there"
            )
        target = min(fitting, key=lambda seats: cost(seats, model))
        target.models.append(model)
        placed[model.name] = target.device
    return placed
