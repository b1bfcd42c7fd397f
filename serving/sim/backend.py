"""The simulated backend: costs of a card or of a calibrated machine, on a virtual clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from serving.cost.calibrated import CalibratedStages, read_calibration
from serving.cost.cards import hardware_of, stages_on
from serving.cost.measured_card import CardStages, known_measured, shipped_measured, shipped_of_ranks
from serving.cost.operators import CostModel
from serving.cost.stages import ModelStages, StageCosts
from serving.errors import CapacityError, UserError
from serving.interface import Device, ServedModel
from serving.parallel.measured_costs import group_costs
from serving.sim.card_lanes import CardLanes, CardLanesWorker
from serving.sim.clock import VirtualClock
from serving.sim.costs import StageTimes
from serving.sim.groups import SimulatedGroup, SimulatedGroupWorker
from serving.sim.host_cache import SimulatedHostCache
from serving.sim.neighbours import Neighbours
from serving.sim.pipeline import Pipeline
from serving.sim.shared import Crowd, SharedDevice
from serving.sim.swapping import SimulatedSwapWorker
from serving.sim.uncoordinated import UncoordinatedGroup
from serving.sim.workers import SimulatedFFNWorker, SimulatedModelWorker, SimulatedWorker
from serving.spec import ModelSpec
from serving.workers.config import (
    FFNWorkerConfig,
    GroupSeat,
    GroupWorkerConfig,
    ModelWorkerConfig,
    RelayConfig,
    Role,
    SwapWorkerConfig,
)


class SimulatedBackend:
    """Simulated workers whose stages cost what `stages_of(model, device)` says; `hardware` names what is simulated.
    `of_parts` is whether costs are known of models cut into parts too; `compiled`, whether events are worked through by
    machine code where Numba is there, which changes nothing but the time it takes. Without `prefill` prompts come with their KV."""

    name = "sim"

    def __init__(
        self,
        hardware: str,
        stages_of: Callable[[ServedModel, Device], ModelStages],
        of_parts: bool = True,
        compiled: bool = True,
        prefill: bool = True,
    ) -> None:
        self.hardware = hardware
        self.clock = VirtualClock()
        self._pipeline, self._compiled = Pipeline(self.clock, compiled), compiled
        self._card_lanes: CardLanes | None = None
        self._stages_of, self._of_parts, self._prefill = stages_of, of_parts, prefill
        self._stages: dict[tuple[str, ModelSpec, str], ModelStages] = {}
        self._times: dict[ModelStages, StageTimes] = {}
        self._memories: dict[tuple[object, ...], int] = {}  # by the place of the devices that draw on it
        self._ffn_workers: dict[int, SimulatedFFNWorker] = {}  # by the mailbox both ends share
        self._groups: dict[int, SimulatedGroup] = {}  # by the exchange that all ranks share
        self._crowd: Crowd | None = None  # steps of engines that nobody arbitrates
        self._host_caches: dict[int, SimulatedHostCache] = {}  # by node
        self._neighbours = Neighbours()  # devices whose models come and go
        self._nodes: dict[int, int] = {}  # of the first rank of each group

    def start_worker(
        self, name: str, core: int | None, role: Role, inherited_fds: Sequence[int], timeline: Path | None
    ) -> SimulatedWorker:
        if isinstance(role, RelayConfig):
            return SimulatedWorker(name, self.clock)  # its time is part of every crossing
        if isinstance(role, GroupWorkerConfig):
            groups = [self._group(seat, role) for seat in role.seats]
            shared = self._crowd.devices[role.device.name] if role.uncoordinated else None
            return SimulatedGroupWorker(name, self.clock, role, groups, shared)
        memory, stages = self._memory_of(role.device), [self._stages_for(m, role.device) for m in self._as_held(role)]
        if isinstance(role, ModelWorkerConfig):
            behind = [self._ffn_workers[mailbox.region.fd] for mailbox in role.mailboxes]
            times = [self._times_of(each) for each in stages]
            if behind and role.device.kind == "cuda":
                lanes = self._lanes_on_cards(stages)
                return CardLanesWorker(name, self.clock, role, times, behind, lanes, self._prefill, memory)
            return SimulatedModelWorker(name, self.clock, role, times, behind, self._pipeline, self._prefill, memory)
        times = [self._times_of(each) for each in stages]
        if isinstance(role, SwapWorkerConfig):
            host_cache = self._host_cache(role, times[0])
            core = self._neighbours.add(memory)
            return SimulatedSwapWorker(name, self.clock, role, times, host_cache, core, self._prefill)
        device = (self._lanes_on_cards(stages) if role.device.kind == "cuda" else self._pipeline).add_ffn(memory)
        worker = SimulatedFFNWorker(name, self.clock, role, times, device, memory)
        for mailbox in role.mailboxes:
            self._ffn_workers[mailbox.region.fd] = worker
        return worker

    def _lanes_on_cards(self, stages: Sequence[ModelStages]) -> CardLanes:
        """Where stages of steps in flight run on cards, with what they cost each other on the first card that is asked for."""
        if self._card_lanes is None:
            self._card_lanes = CardLanes(self.clock, stages[0].hardware.interference_of, self._compiled)
        return self._card_lanes

    def _memory_of(self, device: Device) -> int:
        """The number of the memory that `device` draws on: a card's, or that of all cores of a host."""
        place = (device.node, device.index, device.card) if device.kind == "cuda" else (device.node,)
        return self._memories.setdefault(place, len(self._memories))

    def _host_cache(self, role: SwapWorkerConfig, times: StageTimes) -> SimulatedHostCache:
        """The cache of the device's host: devices of a node share one."""
        node = role.device.node
        if node not in self._host_caches:
            disk_bandwidth = times.stages.hardware.disk_bandwidth
            self._host_caches[node] = SimulatedHostCache(
                self.clock, role.models, role.host_cache_bytes, role.cache_eviction, disk_bandwidth
            )
        return self._host_caches[node]

    def _group(self, seat: GroupSeat, role: GroupWorkerConfig) -> SimulatedGroup:
        key, plan = seat.group.exchange.fd, seat.group.plan
        if self._nodes.setdefault(key, role.device.node) != role.device.node:
            raise UserError(
                f"{seat.model.name}: {plan} spans nodes; its collectives were measured within one, so keep a group in a node"
            )
        stages = self._stages_for(seat.model, role.device)
        if role.uncoordinated is not None:
            self._share_out(role, stages)
        if key not in self._groups:
            costs = group_costs(stages, plan)
            if role.uncoordinated is None:
                self._groups[key] = SimulatedGroup(seat, costs, role.limits, self.clock, self._prefill)
            else:
                self._groups[key] = UncoordinatedGroup(
                    seat,
                    costs,
                    role.limits,
                    self.clock,
                    self._crowd,
                    self._prefill,
                    role.optimistic,
                    role.evict_idle_s,
                    role.pools[0].page_bytes,
                    role.device.kind,
                )
        return self._groups[key]

    def _share_out(self, role: GroupWorkerConfig, stages: ModelStages) -> None:
        """The device's KV is whoever's maps it: as much as the largest of its pools."""
        if self._crowd is None:
            self._crowd = Crowd(self.clock, role.uncoordinated, stages.dtype)
        if role.device.name not in self._crowd.devices:
            pages = max(pool.num_pages for pool in role.pools)
            memory = self._memory_of(role.device)
            self._crowd.devices[role.device.name] = SharedDevice(stages.hardware, pages, memory)

    def _as_held(self, role: Role) -> Sequence[ServedModel]:
        """The role's models as their worker holds them: narrower where it has a slice of their width."""
        if not isinstance(role, FFNWorkerConfig) or not role.parts:
            return role.models
        if not self._of_parts and any(part.width.parts > 1 for part in role.parts):
            raise UserError(
                f"{self.hardware}: whole models were measured, none cut by width; use whole or layer sharding"
            )
        return [part.model(model) for model, part in zip(role.models, role.parts, strict=True)]

    def _stages_for(self, model: ServedModel, device: Device) -> ModelStages:
        key = (model.name, model.spec, device.card)
        if key not in self._stages:
            self._stages[key] = self._stages_of(model, device)
        return self._stages[key]

    def _times_of(self, stages: ModelStages) -> StageTimes:
        if stages not in self._times:
            self._times[stages] = StageTimes(stages)
        return self._times[stages]


def simulate_card(card: str, compiled: bool = True, prefill: bool = True) -> SimulatedBackend:
    """A backend with the fitted costs of `card` (conf/hardware), or what was measured of our engine on it (`h200-measured`), and
    with those of other cards where devices name theirs. Raises UserError for an unknown one, listing the known, and CapacityError
    for a device with more memory than its card has."""

    known: dict[tuple[ModelSpec, str], ModelStages] = {}  # models that differ in name alone cost the same

    def costs_of(model: ServedModel, device: Device) -> ModelStages:
        name = device.card or card
        hardware = hardware_of(name)
        if device.memory_bytes > hardware.memory_bytes:
            missing = device.memory_bytes - hardware.memory_bytes
            raise CapacityError(
                f"{device.name}: a budget of {device.memory_bytes} bytes is {missing} bytes more than {hardware.name} has"
            )
        key = (dataclasses.replace(model.spec, name=""), name)
        if key not in known:
            measured = name in known_measured()
            known[key] = (
                CardStages(model.spec, shipped_measured(name), shipped_of_ranks(name))
                if measured
                else StageCosts(model.spec, CostModel(hardware))
            )
        return known[key]

    hardware_of(card)
    return SimulatedBackend(card, costs_of, card not in known_measured(), compiled, prefill)


def simulate_datasheet(card: str) -> SimulatedBackend:
    """A backend for searches, not for results: `card` with its fitted costs, or by its datasheet where nothing was fitted."""
    hardware_of(card)
    return SimulatedBackend(
        f"{card} (to compare settings)", lambda model, device: stages_on(device.card or card, model)
    )


def simulate_calibrated(path: str | Path, prefill: bool = True) -> SimulatedBackend:
    """A backend with the costs measured on this machine by `python -m serving.cost calibrate`, kept in `path`."""
    found = read_calibration(path)
    return SimulatedBackend(
        f"calibrated {Path(path).stem}",
        lambda model, device: CalibratedStages(model.spec, found),
        of_parts=False,
        prefill=prefill,
    )
