"""The host side of groups: regions made, a worker started on every device that has a seat, replicas' pools registered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serving.admission import AdmissionQueue
from serving.cost.contention import Contention
from serving.host import HostedSystem, pool_config
from serving.interface import Device, ServedModel
from serving.memory.kv_pool import KVGeometry
from serving.options import EngineOptions
from serving.parallel.capacity import exchange_shape, share_model
from serving.parallel.group import GroupPlan
from serving.shm.region import SharedRegion
from serving.workers.config import (
    CardGroup,
    CardGroupsConfig,
    GroupRef,
    GroupSeat,
    GroupWorkerConfig,
    LentRef,
    PoolConfig,
)
from serving.workers.process import ref

_ORDERS_BYTES = 4 << 20


@dataclass(frozen=True)
class Instance:
    """One copy of a model: the group that serves it, and the KV bytes of each of its ranks. `number` tells it from other
    copies of the model."""

    model: ServedModel
    group: GroupPlan
    kv_bytes: int
    number: int = 0

    def pool_name(self, replica: int) -> str:
        """What the KV of a replica is called, the same on all its ranks."""
        only = self.group.dp == 1 and self.number == 0
        return self.model.name if only else f"{self.model.name}/{self.number}.{replica}"


class GroupedSystem(HostedSystem):
    """Base of systems whose models are served by groups of devices."""

    def _start_groups(
        self,
        instances: Sequence[Instance],
        devices: Sequence[Device],
        options: EngineOptions,
        uncoordinated: Contention | None = None,
        admission: Mapping[str, AdmissionQueue | str] | None = None,
        evict_idle_s: float = 0.0,
    ) -> None:
        """Start a worker on each of `devices` for its seats in `instances`, and let requests in at every replica. Where they
        are `uncoordinated`, what an instance has of KV is what it finds, up to its bytes. `admission` has the rule of each
        device's queues, or the one queue that they share; else promises are kept to each pool's size. Weights leave after
        `evict_idle_s` without a request (0: they stay; uncoordinated instances of one device only)."""
        refs, made = [], []
        for instance in instances:
            group_ref, regions = self._group_ref(instance, options)
            refs.append(group_ref)
            made.append([region.fd for region in regions])
        for device in devices:
            seated = [number for number, i in enumerate(instances) if device.name in i.group.devices]
            if not seated:
                continue
            held = [instances[number] for number in seated]
            seats = tuple(
                GroupSeat(i.model, refs[number], i.group.devices.index(device.name))
                for number, i in zip(seated, held, strict=True)
            )
            pools = tuple(_pool(i, seat.replica, index, options) for index, (i, seat) in enumerate(zip(held, seats)))
            targets = tuple(
                (index, replica)
                for index, seat in enumerate(seats)
                if seat.rank == 0
                for replica in range(seat.group.plan.dp)
            )
            given = (admission or {}).get(device.name, "")
            rule, queue = (given, None) if isinstance(given, str) else ("", given)
            role = GroupWorkerConfig(
                device,
                seats,
                pools,
                options.limits,
                targets,
                uncoordinated=uncoordinated,
                optimistic="open" in (rule, queue and queue.limits.rule),
                evict_idle_s=evict_idle_s,
                tells_first_tokens=queue is not None and queue.minds_first_tokens,
            )
            worker = self._start_worker(device, role, [fd for number in seated for fd in made[number]])
            for target, (index, replica) in enumerate(targets):
                first_rank = held[index].group.ranks_of(replica)[0]
                share = share_model(held[index].model, held[index].group, first_rank)
                geometry = KVGeometry.of(share.spec, share.dtype)
                pool = _pool(held[index], replica, index, options)
                self._register_pool(worker, device, pool, [geometry], {share.name: target}, options, rule, queue)

    def _start_card_groups(
        self,
        instances: Sequence[Instance],
        devices: Mapping[str, Device],
        options: EngineOptions,
        rule: str = "",
        lent: Mapping[str, LentRef] | None = None,
        mps_pipe_dir: str = "",
    ) -> None:
        """Start one process for `instances` on CUDA devices, and let requests in at every replica. With `lent`, by device, the
        one instance is an engine that borrows its pages there, a client of the service at `mps_pipe_dir` where that is given."""
        groups = []
        for instance in instances:
            plan = instance.group
            pools = tuple(_pool(instance, replica, 0, options) for replica in range(plan.dp))
            refs = tuple(lent[name] for name in plan.devices) if lent else ()
            groups.append(CardGroup(instance.model, plan, tuple(devices[name] for name in plan.devices), pools, refs))
        role = CardGroupsConfig(groups[0].devices[0], tuple(groups), options.limits, mps_pipe_dir=mps_pipe_dir)
        fds = sorted({ref.ledger.fd for ref in lent.values()}) if lent else []
        worker = self._start_worker(role.device, role, fds, "+".join(i.pool_name(0) for i in instances))
        number = 0
        for group in groups:
            for replica, pool in enumerate(group.pools):
                first_rank = group.plan.ranks_of(replica)[0]
                share = share_model(group.model, group.plan, first_rank)
                geometry = KVGeometry.of(share.spec, share.dtype)
                self._register_pool(
                    worker, group.devices[first_rank], pool, [geometry], {share.name: number}, options, rule
                )
                number += 1

    def _group_ref(self, instance: Instance, options: EngineOptions) -> tuple[GroupRef, list[SharedRegion]]:
        shape = exchange_shape(instance.model, instance.group, options.limits)
        exchange = self._new_mailbox_region(shape.region_bytes)
        orders = [self._new_mailbox_region(_ORDERS_BYTES) for _ in range(instance.group.ranks - 1)]
        group_ref = GroupRef(instance.group, shape, ref(exchange), tuple(ref(region) for region in orders))
        return group_ref, [exchange, *orders]


def _pool(instance: Instance, replica: int, index: int, options: EngineOptions) -> PoolConfig:
    """The pool of `replica` on a rank whose seat has number `index`."""
    name = instance.pool_name(replica)
    return pool_config(name, instance.kv_bytes, options.page_bytes, [index], options.max_running)


def sharing_devices(instances: Sequence[Instance]) -> list[list[Instance]]:
    """`instances` in lists that share no device, each as small as that allows: what one process must drive together."""
    lists: list[list[Instance]] = []
    for instance in instances:
        met = [one for one in lists if any(set(i.group.devices) & set(instance.group.devices) for i in one)]
        lists = [one for one in lists if one not in met] + [[*(i for one in met for i in one), instance]]
    return lists
