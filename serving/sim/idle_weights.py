"""Weights of an engine that leave and come back, on the virtual clock: pages counted, loads that take the host link's time."""

from __future__ import annotations

from collections.abc import Callable

from serving.cost.transfers import page_unmap_s, weight_load_s
from serving.interface import ServedModel
from serving.residency.image import num_units, placed_bytes
from serving.sim.clock import VirtualClock
from serving.sim.shared import SharedDevice


class SimulatedWeights:
    """The weights of `model` in pages of `device`, which is planned as one of `kind`, there at first. `again()` is called when it is worth asking whether they are
    there, `count(name, amount)` with what a record wants to know. A load takes the host link and nothing of the device."""

    def __init__(
        self,
        model: ServedModel,
        device: SharedDevice,
        kind: str,
        page_bytes: int,
        clock: VirtualClock,
        again: Callable[[], None],
        count: Callable[[str, int], None],
    ) -> None:
        self._device, self._clock, self._again, self._count = device, clock, again, count
        self._bytes = placed_bytes(model, kind, page_bytes)
        self._pages = self._bytes // page_bytes
        self._load_s = weight_load_s(device.hardware, self._bytes, num_units(model))
        self._wanted_ns: int | None = None
        self._loading = self._loaded = False

    def bring(self) -> bool:
        if self._loaded:
            self._loaded = False
            return True
        if self._loading:
            return False
        now_ns, device = self._clock.now_ns(), self._device
        self._wanted_ns = now_ns if self._wanted_ns is None else self._wanted_ns
        if device.free_pages < self._pages:
            device.claims[id(self)] = self._pages
            device.waiting[id(self)] = self._again
            return False
        device.free_pages -= self._pages
        if device.claims.pop(id(self), 0):
            device.waiting.pop(id(self), None)
            self._clock.after(0.0, device.wake)
        self._count("switch_queue_ns", now_ns - self._wanted_ns)
        self._loading, self._wanted_ns = True, None
        self._clock.after(self._load_s, self._done)
        return False

    def evict(self) -> None:
        self._device.free_pages += self._pages
        hardware = self._device.hardware
        self._count("switch_evict_ns", round(page_unmap_s(hardware, -(-self._bytes // hardware.page_bytes)) * 1e9))
        self._clock.after(0.0, self._device.wake)

    def _done(self) -> None:
        self._loading, self._loaded = False, True
        self._count("swaps", 1)
        self._count("switch_weights_ns", round(self._load_s * 1e9))
        self._again()
