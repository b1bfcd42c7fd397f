"""Elastic multiplexing (kvcached, the paper's baseline): each model is an engine of its own, all weights are resident, and KV
pages are mapped on demand from what is left of each device, for whoever comes first.

No arbiter: engines launch when they have work and slow each other, none has a quota, and one that finds no page preempts its
youngest request and computes it again later. On CPU devices engines are processes that share their device's core, one ledger
and one page table (serving/memory/lent.py); on a card each has a context, streams and memory of its own, as much as the ledger
grants it; simulated, they share it as serving/cost/contention.py says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from baselines.multiplex.layout import Seated, WeightsBytes, emptiest, plan_devices
from baselines.multiplex.options import ElasticOptions
from serving.admission import AdmissionLimits, AdmissionQueue
from serving.cuda.mps import MultiProcessService
from serving.errors import UserError
from serving.host import pool_config
from serving.interface import Cluster, Demand, Device, DevicePlan, Placement, ServedModel
from serving.memory.kv_pool import KVGeometry
from serving.memory.lent import LentShape
from serving.memory.virtual import PhysicalPages
from serving.parallel.capacity import share_weights_bytes
from serving.parallel.given import given_groups
from serving.parallel.group import GroupPlan
from serving.parallel.host import GroupedSystem, Instance
from serving.shm.region import SharedRegion
from serving.workers.config import LentRef, ModelWorkerConfig
from serving.workers.process import ref

__all__ = ["Elastic", "ElasticOptions"]


class Elastic(GroupedSystem):
    """Engines side by side on every device, KV shared first come first served."""

    name = "elastic"
    _evict_idle_s = 0.0  # weights stay

    def __init__(self, options: ElasticOptions | None = None) -> None:
        self.options = options or ElasticOptions()
        self._physical: list[PhysicalPages] = []
        self._mps: MultiProcessService | None = None
        super().__init__(self.options.timeline_dir)

    def plan(self, cluster: Cluster, models: Sequence[ServedModel], demand: Demand) -> Placement:
        """Models on the devices that `groups` names (without it, as `_place` has it); all that weights and workspaces leave of a
        device is KV of everyone on it."""
        groups = self.options.groups
        seated = given_groups(groups, cluster, models) if groups else self._place(cluster, models, demand)
        if self.options.admission == "cap" and any(group.ranks > 1 for _, group in seated):
            raise UserError("option admission is 'cap'; it wants every model on one device")
        plans = plan_devices(
            cluster, seated, self.options.limits, self.options.page_bytes, weights_bytes=self._weights_bytes_on(cluster)
        )
        instances = [{"model": m.name, "devices": list(g.devices), "tp": g.tp, "dp": g.dp} for m, g in seated]
        return Placement(self.name, tuple(models), plans, {**asdict(self.options), "instances": instances})

    def _place(self, cluster: Cluster, models: Sequence[ServedModel], demand: Demand) -> Seated:
        """Each whole on the emptiest device."""
        return emptiest(cluster, models)

    def _weights_bytes_on(self, cluster: Cluster) -> WeightsBytes:
        """What the weights of a share take of its device."""
        return share_weights_bytes

    def _launch(self, placement: Placement) -> None:
        instances = _instances(placement)
        if self._backend.name == "sim":
            devices = [plan.device for plan in placement.devices]
            self._start_groups(
                instances, devices, self.options, self.options.model(), self._admission(placement), self._evict_idle_s
            )
            return
        if self.options.mps:
            if any(plan.device.kind != "cuda" for plan in placement.devices):
                raise UserError("option mps is of cuda devices; engines on others share their cores as the system does")
            self._mps = MultiProcessService()
        if any(i.group.ranks > 1 for i in instances) and placement.devices[0].device.kind == "cuda":
            self._start_card_engines(placement, instances)
            return
        for plan in placement.devices:
            seated = [instance for instance in instances if plan.device.name in instance.group.devices]
            if seated:
                _require_real(plan.device, seated)
                self._start_engines(plan, seated, self._admission(placement)[plan.device.name])

    def notes(self) -> dict[str, object]:
        """What mapping pages cost where it was computed: as much as mapping them ahead of need could save at most."""
        counted = [worker.read_counters() for worker, _ in self._workers]
        mapping_ns, busy_ns = (sum(one.get(name, 0) for one in counted) for name in ("mapping_ns", "busy_ns"))
        if self._backend.name == "sim" or not busy_ns:
            return {}
        pages = sum(one["pages_mapped"] for one in counted)
        return {"pages": {"mapped": pages, "mapping_ns": mapping_ns, "share_of_busy": mapping_ns / busy_ns}}

    def stop(self) -> None:
        super().stop()
        while self._physical:
            self._physical.pop().close()
        mps, self._mps = self._mps, None
        if mps is not None:
            mps.stop()

    @property
    def _mps_pipe_dir(self) -> str:
        return self._mps.pipe_dir if self._mps else ""

    def _admission(self, placement: Placement) -> dict[str, AdmissionQueue | str]:
        """By device: the rule of each engine's queue, or the one queue of all."""
        rule = {"optimistic": "open", "reserved": "cap"}.get(self.options.admission)
        if rule:
            return dict.fromkeys((plan.device.name for plan in placement.devices), rule)
        return {plan.device.name: self._common_queue(plan, placement) for plan in placement.devices}

    def _common_queue(self, plan: DevicePlan, placement: Placement) -> AdmissionQueue:
        return AdmissionQueue(self._common_limits(plan), geometries_of(placement))

    def _common_limits(self, plan: DevicePlan, rule: str = "cap") -> AdmissionLimits:
        return AdmissionLimits(
            plan.kv_bytes // self.options.page_bytes,
            self.options.page_bytes,
            self.options.max_running,
            self.options.max_queued,
            rule,
            self.options.queue_deadline_s,
        )

    def _new_ledger(self, device: Device, num_pages: int, engines: int) -> tuple[SharedRegion, LentShape]:
        """Of `num_pages` pages of a device, which are charged here, once: what engines charge is theirs to hold beside them."""
        shape = LentShape(num_pages, engines, device.memory_bytes - num_pages * self.options.page_bytes)
        return self._new_mailbox_region(shape.region_bytes), shape

    def _start_card_engines(self, placement: Placement, instances: Sequence[Instance]) -> None:
        """A process for each model, which drives the cards of its group: a ledger a card for all engines on it."""
        if self._evict_idle_s:
            raise UserError("idle weights of models over several cards do not leave; set idle_evict_s to 0")
        rule = self._admission(placement)[placement.devices[0].device.name]
        if not isinstance(rule, str):
            raise UserError("models over several cards have a queue each; set admission to optimistic or reserved")
        lent: list[dict[str, LentRef]] = [{} for _ in instances]
        for plan in placement.devices:
            seated = [number for number, i in enumerate(instances) if plan.device.name in i.group.devices]
            ledger, shape = self._new_ledger(plan.device, plan.kv_bytes // self.options.page_bytes, len(seated))
            for engine, number in enumerate(seated):
                lent[number][plan.device.name] = LentRef(ref(ledger), ledger.fd, shape, engine)
        devices = {plan.device.name: plan.device for plan in placement.devices}
        for instance, refs in zip(instances, lent, strict=True):
            self._start_card_groups([instance], devices, self.options, rule, refs, self._mps_pipe_dir)

    def _start_engines(self, plan: DevicePlan, instances: Sequence[Instance], admission: AdmissionQueue | str) -> None:
        """A process for each model on the device: one ledger and one set of pages for all of them."""
        device, page_bytes = plan.device, self.options.page_bytes
        num_pages = plan.kv_bytes // page_bytes
        if self._evict_idle_s:  # weights lie in pages too
            num_pages += sum(plan.weights_bytes.values()) // page_bytes
        ledger, shape = self._new_ledger(device, num_pages, len(instances))
        fds = [ledger.fd]
        if device.kind == "cpu":  # on a card each engine creates what the ledger grants it
            self._physical.append(PhysicalPages(num_pages, page_bytes))
            fds.append(self._physical[-1].fd)
        for engine, instance in enumerate(instances):
            pool = pool_config(instance.model.name, plan.kv_bytes, page_bytes, [0], self.options.max_running)
            role = ModelWorkerConfig(
                device,
                (instance.model,),
                (pool,),
                self.options.limits,
                1,
                (-1,),
                (-1,),
                growth="preempt",
                lent=LentRef(ref(ledger), fds[-1], shape, engine),
                evict_idle_s=self._evict_idle_s,
                mps_pipe_dir=self._mps_pipe_dir,
            )
            worker = self._start_worker(device, role, fds, instance.model.name)
            rule, queue = (admission, None) if isinstance(admission, str) else ("", admission)
            self._register_pools(worker, role, self.options, rule, queue)


def geometries_of(placement: Placement) -> list[KVGeometry]:
    """Of all models, in their order."""
    return [KVGeometry.of(model.spec, model.dtype) for model in placement.models]


def _require_real(device: Device, instances: Sequence[Instance]) -> None:
    if device.kind not in ("cpu", "cuda"):
        raise UserError(f"{device.name}: engines side by side run on CPU and CUDA devices, not on {device.kind!r}")
    for instance in instances:
        if instance.group.ranks > 1:
            raise UserError(
                f"{instance.model.name} is on {instance.group}; engines side by side are whole models on CPU devices; groups "
                "run on CUDA devices, or simulated: backend=sim"
            )


def _instances(placement: Placement) -> list[Instance]:
    models = {model.name: model for model in placement.models}
    kv_bytes = {plan.device.name: plan.kv_bytes for plan in placement.devices}
    instances, seen = [], dict.fromkeys(models, 0)
    for entry in placement.options["instances"]:
        group = GroupPlan(tuple(entry["devices"]), entry["tp"], entry["dp"])
        least = min(kv_bytes[device] for device in group.devices)
        instances.append(Instance(models[entry["model"]], group, least, seen[entry["model"]]))
        seen[entry["model"]] += 1
    return instances
