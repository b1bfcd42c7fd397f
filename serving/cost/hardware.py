"""Hardware as data: what one device can hold, move and compute, and what talking to it costs, each number with its source.

The numbers live in `conf/hardware/*.yaml`, which is a Hydra group too (`hardware=h200`). A card's file may name another
card whose fitted coefficients it borrows (`fitted_on`): efficiencies and fixed costs then come from there and everything
that a datasheet states from here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from serving.errors import CapacityError, UserError
from serving.interface import Device

KINDS = DECODE, PROMPT = ("decode", "prompt")  # of steps, `prompt` with any row of one
HARDWARE_DIRECTORY = Path(__file__).resolve().parents[2] / "conf" / "hardware"


@dataclass(frozen=True)
class Hardware:
    """One device. Bandwidths are bytes a second in one direction, rates dense FLOP/s, times seconds.

    On the CPU a device is one core: `shared_memory_bandwidth` is then what all devices of a host draw on together (0 where
    each device has memory of its own).
    """

    name: str
    title: str
    kind: str  # cuda | cpu
    fitted_on: str  # name of the card whose fitted coefficients are used
    memory_bytes: int
    memory_bandwidth: float
    shared_memory_bandwidth: float
    cache_bytes: int  # last-level cache
    bf16_flops: float
    fp32_flops: float
    num_sms: int  # cores on the CPU
    peer_bandwidth: float
    peer_latency_s: float
    host_bandwidth: float
    host_latency_s: float
    disk_bandwidth: float  # of reading checkpoints into host memory, all devices of a host together
    network_bandwidth: float
    network_latency_s: float
    launch_eager_s: float  # host time to launch one kernel
    launch_graph_s: float  # device time between two kernels of one captured graph
    crossing_lowered_s: float  # one boundary crossing, flag included, when the two sides find each other
    crossing_eager_s: float  # the same issued by each side's host
    relay_s: float  # what a third party adds when it relays a step
    page_bytes: int
    page_create_s: float
    page_map_s: float
    page_access_s: float
    page_unmap_s: float
    sources: Mapping[str, str] = field(repr=False, default_factory=dict)
    # What each further engine costs every other (serving/cost/contention.py). Of cores a part of its own time, beyond bandwidth and
    # arithmetic; of cards parts of kernels, by kinds: own, then the other's.
    interference: float = 0.0
    interference_of: Mapping[str, Mapping[str, float]] = field(repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", MappingProxyType(dict(self.sources)))
        object.__setattr__(self, "interference_of", MappingProxyType(dict(self.interference_of)))
        if self.kind not in ("cuda", "cpu"):
            raise UserError(f"hardware {self.name}: kind {self.kind!r} is not one of: cuda, cpu")
        for name in NUMBERS:
            value = getattr(self, name)
            if value < 0 or (value == 0 and name not in MAY_BE_ZERO):
                raise UserError(f"hardware {self.name}: {name} is {value}, it must be positive")
            if value and not self.sources.get(name):
                raise UserError(f"hardware {self.name}: {name} has no entry under sources")
        known = {own: set(others) for own, others in self.interference_of.items()}
        if known != ({own: set(KINDS) for own in KINDS} if self.kind == "cuda" else {}):
            raise UserError(
                f"hardware {self.name}: interference_of needs {' and '.join(KINDS)} of each, for cards only"
            )

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s of matrix products in `dtype`."""
        return self.fp32_flops if dtype == "float32" else self.bf16_flops

    def capped(self, memory_bytes: int) -> Hardware:
        """This card with its memory capped, to stand for a smaller one. Raises CapacityError when the cap exceeds it."""
        if not 0 < memory_bytes <= self.memory_bytes:
            missing = memory_bytes - self.memory_bytes
            raise CapacityError(f"{self.name}: a cap of {memory_bytes} B is {missing} B more than the card's memory")
        note = f"capped at {memory_bytes} B; the card: {self.sources['memory_bytes']}"
        return dataclasses.replace(self, memory_bytes=memory_bytes, sources={**self.sources, "memory_bytes": note})

    def device(self, index: int, name: str | None = None) -> Device:
        """The device of that index of a cluster of these."""
        return Device(name or f"{self.name}:{index}", self.kind, index, self.memory_bytes)


NUMBERS = tuple(f.name for f in dataclasses.fields(Hardware) if f.type in ("int", "float"))
MAY_BE_ZERO = ("shared_memory_bandwidth", "relay_s", "interference")


def known_hardware() -> tuple[str, ...]:
    """Names of the cards that `conf/hardware` describes."""
    return tuple(sorted(path.stem for path in HARDWARE_DIRECTORY.glob("*.yaml")))


@functools.cache
def load_hardware(name: str) -> Hardware:
    """The card called `name`. Raises :class:`UserError` listing the known ones."""
    path = HARDWARE_DIRECTORY / f"{name}.yaml"
    if name not in known_hardware():
        raise UserError(f"unknown hardware {name!r}; known: {', '.join(known_hardware())}")
    return hardware_from_mapping(yaml.safe_load(path.read_text()))


def hardware_from_mapping(values: Mapping[str, Any]) -> Hardware:
    """A card from the parsed YAML (or a resolved Hydra node). Raises :class:`UserError` naming the wrong key."""
    label, names = values.get("name", "?"), {f.name for f in dataclasses.fields(Hardware)}
    foreign = {"cuda": {"interference"}, "cpu": {"interference_of"}}.get(values.get("kind"))
    if foreign is None:
        raise UserError(f"hardware {label}: kind {values.get('kind')!r} is not one of: cuda, cpu")
    missing, unknown = sorted(names - foreign - set(values)), sorted(set(values) - (names - foreign))
    if missing or unknown:
        raise UserError(f"hardware {label}: missing keys {missing}, unknown keys {unknown}")
    converted = {key: _number(label, key, value) if key in NUMBERS else value for key, value in values.items()}
    return Hardware(**converted)


def _number(label: str, key: str, value: Any) -> float:
    kind = int if key.endswith("_bytes") or key == "num_sms" else float
    try:
        return kind(float(value)) if kind is float else int(value)
    except (TypeError, ValueError):
        raise UserError(f"hardware {label}: {key} is {value!r}, a number is needed") from None
