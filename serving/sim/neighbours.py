"""Devices of no pipeline that slow each other all the same, over memory that they share: cores of one host."""

from __future__ import annotations

from dataclasses import dataclass

from serving.sim import events
from serving.sim.costs import ALONE, Neighbourly


class Neighbours:
    """What runs on each of them, and until when, as the event loop of a pipeline keeps it of its own devices."""

    def __init__(self) -> None:
        self.devices: list[int] = []
        self.runs: list[float] = []

    def add(self, memory: int) -> Neighbour:
        """Another device, on the memory of that number."""
        device = [0] * events.DEVICE_FIELDS
        device[events.MEMORY] = memory
        self.devices += device
        self.runs += [ALONE.beside, ALONE.draws]
        return Neighbour(self, len(self.devices) // events.DEVICE_FIELDS - 1)


@dataclass(frozen=True)
class Neighbour:
    """One of them."""

    among: Neighbours
    number: int

    def begin(self, now_ns: int, stage_ns: int, runs: Neighbourly) -> int:
        """A stage that takes `stage_ns` alone begins here; what it takes beside those that run already (events.lost_ns)."""
        devices, others = self.among.devices, self.among.runs
        took_ns = stage_ns + events.lost_ns(
            self.number, False, now_ns, stage_ns, runs.beside, runs.draws, devices, others, (), ()
        )
        devices[self.number * events.DEVICE_FIELDS + events.FREE_NS] = now_ns + took_ns
        others[self.number * events.PAIR : (self.number + 1) * events.PAIR] = runs.beside, runs.draws
        return took_ns
