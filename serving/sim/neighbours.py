"""Cores of one host that are no devices of a pipeline, and slow each other over the memory that they share all the same."""

from __future__ import annotations

from serving.sim import events
from serving.sim.costs import ALONE, Neighbourly


class Neighbours:
    """What runs on each of them, and until when, as the event loop of a pipeline keeps it of its own devices."""

    def __init__(self) -> None:
        self._devices: list[int] = []
        self._runs: list[float] = []

    def add(self) -> int:
        """Another device; its number."""
        self._devices += [0] * events.DEVICE_FIELDS
        self._runs += [ALONE.beside, ALONE.draws]
        return len(self._devices) // events.DEVICE_FIELDS - 1

    def begin(self, device: int, now_ns: int, stage_ns: int, runs: Neighbourly) -> int:
        """A stage that takes `stage_ns` alone begins on `device`; what it takes beside those that run already (events.lost_ns)."""
        took_ns = stage_ns + events.lost_ns(
            device, False, now_ns, stage_ns, runs.beside, runs.draws, self._devices, self._runs, (), ()
        )
        self._devices[device * events.DEVICE_FIELDS + events.FREE_NS] = now_ns + took_ns
        self._runs[device * events.PAIR : (device + 1) * events.PAIR] = runs.beside, runs.draws
        return took_ns
