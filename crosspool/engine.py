"""The CrossPool engine: KV of all models in one pool, FFN weights of all models in the other, hidden rows between them.

Attention, norms, embeddings, LM head and sampling run beside the KV; router and experts run beside the weights (paper,
"Split"). The KV-pool worker keeps several batches in flight, one in attention while others are in their FFN, and the two
sides find each other through polled mailboxes. Admission reserves a request's declared cap and never preempts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from crosspool.weights_pool import Held, from_plain, legs_of, require_known, share_out, to_plain
from serving.capacity import (
    attention_bytes,
    attention_workspace_bytes,
    ffn_bytes,
    ffn_workspace_bytes,
    require_kv,
    require_weights,
)
from serving.errors import UserError
from serving.host import HostedSystem, pool_config
from serving.interface import Cluster, Demand, Device, DevicePlan, Placement, ServedModel
from serving.options import EngineOptions
from serving.shm.mailbox import MailboxShape
from serving.spec import element_bytes
from serving.workers.config import FFNWorkerConfig, MailboxRef, ModelWorkerConfig, RelayConfig
from serving.workers.process import descriptors, ref

RELAY = Device("relay", "host", 0, 0)  # no device: the process that stands for the host under host-driven control
CONTROLS = ("lowered", "host")


@dataclass(frozen=True)
class CrossPoolOptions(EngineOptions):
    """Beside what every engine has: `lanes`, the number of in-flight batches (the paper has 2), and `control`, which is
    `lowered` (the two sides poll each other's mailbox) or `host` (a third process hands over every stage). The first
    device is the KV pool, all others are the weights pool, over which `ffn_sharding` spreads FFNs: `whole` models, each
    `layer` on one device, or every layer's width over all (`tensor`)."""

    lanes: int = 2
    control: str = "lowered"
    ffn_sharding: str = "whole"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.lanes, int) or self.lanes < 1:
            raise UserError(f"option lanes is {self.lanes!r}; at least one batch must be in flight")
        if self.control not in CONTROLS:
            raise UserError(f"option control is {self.control!r}; known: {', '.join(CONTROLS)}")
        require_known(self.ffn_sharding)


class CrossPool(HostedSystem):
    """Two pools on two or more devices."""

    name = "crosspool"

    def __init__(self, options: CrossPoolOptions | None = None) -> None:
        self.options = options or CrossPoolOptions()
        super().__init__(self.options.timeline_dir)

    def plan(self, cluster: Cluster, models: Sequence[ServedModel], demand: Demand) -> Placement:
        """KV and attention halves on the first device, FFNs on the others as `ffn_sharding` says."""
        if len(cluster.devices) < 2:
            raise UserError("crosspool needs two devices at least: one for the KV pool, one for the weights pool")
        kv_device, *weights_devices = cluster.devices
        pool = share_out(models, weights_devices, self.options.ffn_sharding)
        plans = [self._plan_kv_pool(kv_device, models)]
        for device, held in zip(weights_devices, pool, strict=True):
            plans.append(self._plan_weights_pool(device, models, held))
        return Placement(self.name, tuple(models), tuple(plans), {**asdict(self.options), "ffn": to_plain(pool)})

    def _plan_kv_pool(self, device: Device, models: Sequence[ServedModel]) -> DevicePlan:
        limits, page_bytes = self.options.limits, self.options.page_bytes
        weights = {model.name: attention_bytes(model) for model in models}
        workspace_bytes = self.options.lanes * max(attention_workspace_bytes(model, limits) for model in models)
        used_bytes = sum(weights.values()) + workspace_bytes
        require_weights(device, used_bytes, "attention weights and workspace of the KV pool")
        kv_bytes = (device.memory_bytes - used_bytes) // page_bytes * page_bytes
        require_kv(device, "kv-pool", kv_bytes, page_bytes, models)
        return DevicePlan(device, "kv-pool", weights, kv_bytes)

    def _plan_weights_pool(self, device: Device, models: Sequence[ServedModel], held: Held) -> DevicePlan:
        here = [(model, held[model.name]) for model in models if model.name in held]
        weights = {model.name: ffn_bytes(model, part) for model, part in here}
        limits = self.options.limits
        workspace_bytes = max((ffn_workspace_bytes(part.model(model), limits) for model, part in here), default=0)
        require_weights(
            device, sum(weights.values()) + workspace_bytes, "FFN weights and workspace of the weights pool"
        )
        return DevicePlan(device, "weights-pool", weights, 0)

    def _launch(self, placement: Placement) -> None:
        kv_plan, *weights_plans = placement.devices
        limits, lanes = self.options.limits, self.options.lanes
        models = placement.models
        row_bytes = max(model.spec.hidden_size * element_bytes(model.dtype) for model in models)
        shape = MailboxShape(slots=lanes, slot_bytes=limits.max_rows * row_bytes)
        pool = from_plain(placement.options["ffn"])
        by_name = {model.name: model for model in models}
        mailboxes = []
        for plan, held in zip(weights_plans, pool, strict=True):
            hosted = tuple(by_name[name] for name in held)
            bells = self._new_bells() if self.options.control == "host" else None
            mailbox = MailboxRef(ref(self._new_mailbox_region(shape.region_bytes)), shape, bells)
            role = FFNWorkerConfig(plan.device, hosted, limits, (mailbox,), tuple(held.values()))
            self._start_worker(plan.device, role, descriptors([mailbox]))
            mailboxes.append(mailbox)
        if self.options.control == "host":
            relay = RelayConfig(tuple(mailbox.bells for mailbox in mailboxes))
            self._start_worker(RELAY, relay, descriptors(mailboxes))
        legs = [legs_of(model, pool) for model in models]
        first = [layers[0][0] for layers in legs]
        spread = {} if self.options.ffn_sharding == "whole" else dict(enumerate(legs))
        kv_pool = pool_config(
            "kv-pool", kv_plan.kv_bytes, self.options.page_bytes, range(len(models)), self.options.max_running
        )
        role = ModelWorkerConfig(
            kv_plan.device,
            models,
            (kv_pool,),
            limits,
            lanes,
            ffn_ports=tuple(port for port, _ in first),
            ffn_indices=tuple(index for _, index in first),
            mailboxes=tuple(mailboxes),
            ffn_legs=spread,
        )
        worker = self._start_worker(kv_plan.device, role, descriptors(mailboxes))
        self._register_pools(worker, role, self.options)
