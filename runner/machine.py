"""The machine a real run computes on: the cores and cards that its devices stand for, and how much of the cores others took
meanwhile."""

from __future__ import annotations

import functools
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from runner.config import DeviceEntry
from serving.errors import UserError

KINDS = ("cpu", "cuda")


@dataclass(frozen=True)
class Card:
    """A CUDA card of this machine."""

    index: int  # among those that this process sees
    name: str
    memory_mib: int
    uuid: str  # the same for every process, whatever CUDA_VISIBLE_DEVICES lets it see


def cores_of(devices: Sequence[DeviceEntry], oversubscribe: bool = False) -> tuple[int, ...]:
    """The core of each CPU device, in order. Raises UserError for a device that this machine does not have: a record must not
    name hardware that did not compute. With `oversubscribe`, devices beyond the cores share them from the first on."""
    usable = sorted(os.sched_getaffinity(0))
    for device in devices:
        if device.kind not in KINDS:
            raise UserError(f"device {device.name}: unknown kind {device.kind!r}; known: {', '.join(KINDS)}")
    devices = [device for device in devices if device.kind == "cpu"]
    for number, device in enumerate(devices):
        if device.index < 0 or (device.index >= len(usable) and not oversubscribe):
            raise UserError(
                f"device {device.name}: index is {device.index}, this process may use {len(usable)} cores "
                f"(index 0 to {len(usable) - 1}); backend.oversubscribe=true lets devices share cores"
            )
        sharing = [other.name for other in devices[:number] if other.index == device.index]
        if sharing:
            raise UserError(f"device {device.name}: has the core of {sharing[0]}; each device needs one of its own")
    return tuple(usable[device.index % len(usable)] for device in devices)


def cards_of(devices: Sequence[DeviceEntry]) -> tuple[Card, ...]:
    """The card of each CUDA device, in order. Raises UserError for a card that this machine does not have, and for budgets that
    are more than theirs has."""
    devices = [device for device in devices if device.kind == "cuda"]
    there = cards_here() if devices else ()
    budgets_mib: dict[int, int] = defaultdict(int)
    for device in devices:
        if not 0 <= device.index < len(there):
            seen = ", ".join(card.name for card in there) or "none"
            raise UserError(
                f"device {device.name}: is card {device.index}, and torch sees {seen} (python -m serving.doctor says why); "
                "backend=sim backend.card=NAME simulates cards"
            )
        card = there[device.index]
        budgets_mib[device.index] += device.memory_mib
        if budgets_mib[device.index] > card.memory_mib:
            raise UserError(
                f"device {device.name}: budgets of {budgets_mib[device.index]} MiB on card {device.index}, which has "
                f"{card.memory_mib} MiB"
            )
    return tuple(there[device.index] for device in devices)


@functools.cache
def cards_here() -> tuple[Card, ...]:
    """The cards that torch sees on this machine."""
    import torch

    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return tuple(
        Card(index, found.name, found.total_memory >> 20, str(found.uuid)) for index, found in enumerate(properties)
    )


@dataclass(frozen=True)
class CpuUse:
    """CPU seconds so far: `all_s` by everyone on the cores of a run (stolen time counts), `own_s` by this process and its
    descendants; `at_s` is the monotonic clock."""

    all_s: float
    own_s: float
    at_s: float
    cores: int

    @classmethod
    def now(cls, cores: Sequence[int]) -> CpuUse:
        by_core = psutil.cpu_times(percpu=True)
        all_s = sum(sum(by_core[core]) - by_core[core].idle - by_core[core].iowait for core in cores)
        # guest time is in user time already
        all_s -= sum(by_core[core].guest + by_core[core].guest_nice for core in cores)
        return cls(all_s, _own_s(), time.monotonic(), len(cores))

    def others_share_since(self, earlier: CpuUse) -> float | None:
        """Share of the cores' time since `earlier` that went to other processes, from 0 to 1."""
        available_s = (self.at_s - earlier.at_s) * self.cores
        if available_s <= 0:
            return None
        others_s = (self.all_s - earlier.all_s) - (self.own_s - earlier.own_s)
        return min(max(others_s / available_s, 0.0), 1.0)


def _own_s() -> float:
    """CPU seconds of this process, of its living descendants and of those that were waited for."""
    total = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            total += sum(process.cpu_times()[:4])  # user, system, and the same of children waited for
        except psutil.Error:  # ended in between
            continue
    return total
