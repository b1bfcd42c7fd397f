"""The one interface: a system is planned, started, fed and polled, and the runner does not know which one it drives.

    placement = system.plan(cluster, models, demand)     pure; raises CapacityError if it cannot fit
    system.start(placement, backend)                     loads weights, warms up
    system.submit(request); system.poll() -> events      open loop; every request ends exactly once
    system.stop()                                        releases everything

Times in events are `time.monotonic_ns()` of this host (virtual nanoseconds under the simulated backend).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from serving.spec import ModelSpec

if TYPE_CHECKING:
    from serving.backend import Backend


@dataclass(frozen=True, slots=True)
class Request:
    """A request as a system sees it. Greedy decoding; generation ends after `max_new_tokens` or at an end-of-sequence id
    unless `ignore_eos`, which benchmark traces set so that every system generates the same number of tokens."""

    request_id: int
    model: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    ignore_eos: bool = True


class EventKind(enum.Enum):
    """What happened to a request. The last four are terminal: each request gets exactly one of them."""

    ADMITTED = "admitted"  # left the admission queue; its KV is promised
    TOKENS = "tokens"  # new token ids
    PREEMPTED = "preempted"  # lost its KV and will be recomputed (baselines only; CrossPool never)
    COMPLETED = "completed"
    REJECTED = "rejected"
    FAILED = "failed"
    CANCELLED = "cancelled"  # by whoever sent it

    @property
    def terminal(self) -> bool:
        return self in (EventKind.COMPLETED, EventKind.REJECTED, EventKind.FAILED, EventKind.CANCELLED)


class Event(NamedTuple):
    """One thing that happened to one request, at `time_ns`. `reason` says why for rejected, failed and preempted."""

    request_id: int
    kind: EventKind
    time_ns: int
    tokens: tuple[int, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Device:
    """A compute resource with a memory budget. `kind` is `cpu` (index = core) or `cuda` (index = ordinal). Devices of one
    `node` share its fast links. `card` (a name of conf/hardware) is what it is where simulated; empty: what the backend
    simulates."""

    name: str
    kind: str
    index: int
    memory_bytes: int
    node: int = 0
    card: str = ""


@dataclass(frozen=True)
class Cluster:
    """The devices a system may use. Pool devices count: every system of a comparison gets the same cluster."""

    devices: tuple[Device, ...]

    @property
    def memory_bytes(self) -> int:
        return sum(device.memory_bytes for device in self.devices)


@dataclass(frozen=True)
class ServedModel:
    """A model to serve: its spec and where its weights come from. `dtype` is what it computes in and stores KV in."""

    spec: ModelSpec
    checkpoint: Path
    dtype: str = "float32"
    dummy: bool = False  # fill with seeded values instead of reading weights

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True)
class Demand:
    """What a planner may know of the load: per model, the request rate and joint (prompt, output) length samples."""

    rate_rps: Mapping[str, float] = field(default_factory=dict)
    lengths: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class DevicePlan:
    """What one device holds, in bytes. Weights, KV budget and workspace add up to at most the device's memory."""

    device: Device
    role: str  # e.g. "kv-pool", "weights-pool", "static"
    weights_bytes: Mapping[str, int]  # by model
    kv_bytes: int  # the whole KV budget of this device
    kv_quota_bytes: Mapping[str, int] = field(default_factory=dict)  # by model where a system partitions it


@dataclass(frozen=True)
class Placement:
    """A system's answer to `plan`. `options` holds what the system itself needs to start, as plain data."""

    system: str
    models: tuple[ServedModel, ...]
    devices: tuple[DevicePlan, ...]
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class PoolSample:
    """One sample of the KV pages in use, for the time series of a record."""

    time_ns: int
    device: str
    pages_in_use: Mapping[str, int]  # by model
    page_budget: int
    page_bytes: int


# Where the time of a model switch goes: waiting for the link or for others to leave, taking weights away, reading a checkpoint
# that the host cache lacked, copying weights, moving KV, and from the last weights there to the end of the first step.
SWITCH_PARTS = ("queue", "evict", "checkpoint", "weights", "kv", "warm_up")


@dataclass(frozen=True)
class DeviceStats:
    """What one device did between start and now."""

    device: str
    busy_ns: int  # computing, the rest is waiting
    elapsed_ns: int
    bytes_crossed: int = 0  # hidden rows sent to other devices
    steps: int = 0
    preemptions: int = 0
    swaps: int = 0
    switch_ns: Mapping[str, int] = field(default_factory=dict)  # all swaps' time, by SWITCH_PARTS


class System(Protocol):
    """A serving system under test. Any call may raise WorkerDied; `stop` is safe to call at any time and twice."""

    name: str

    def plan(self, cluster: Cluster, models: Sequence[ServedModel], demand: Demand) -> Placement: ...

    def start(self, placement: Placement, backend: Backend | None = None) -> None: ...

    def submit(self, request: Request) -> None: ...

    def cancel(self, request_id: int) -> bool:
        """Nobody waits for this request any more: it ends as CANCELLED, at once while it waits for admission and with its
        next token from then on. False where no such request is live: it has ended, or was never submitted."""
        ...

    def poll(self) -> list[Event]: ...

    def pool_samples(self) -> list[PoolSample]:
        """Samples taken since the last call."""
        ...

    def stats(self) -> list[DeviceStats]: ...

    def notes(self) -> dict[str, object]:
        """What else a record should say of the run, as plain data; asked before `stop`."""
        ...

    def stop(self) -> None: ...
