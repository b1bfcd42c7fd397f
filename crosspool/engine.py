"""The CrossPool engine: KV of all models in one pool, FFN weights of all models in the other, hidden rows between them.

Attention, norms, embeddings, LM head and sampling run beside the KV; router and experts run beside the weights (paper,
"Split"). The KV-pool worker keeps several batches in flight, one in attention while others are in their FFN, and the two
sides find each other through polled mailboxes. Admission reserves a request's declared cap and never preempts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from crosspool.expectation import Expectation, RecentUse, compare, expect
from crosspool.planner.from_trace import ServiceModel
from crosspool.weights_pool import Held, Legs, from_plain, legs_of, require_known, share_out, to_plain
from serving.admission import RULES as ADMISSIONS
from serving.batching import StepLimits
from serving.capacity import (
    attention_bytes,
    attention_workspace_bytes,
    ffn_bytes,
    ffn_pool_bytes,
    ffn_workspace_bytes,
    require_kv,
    require_weights,
)
from serving.cuda.config import CardWorkerConfig
from serving.errors import UserError
from serving.host import HostedSystem, pool_config
from serving.interface import Cluster, Demand, Device, DevicePlan, Placement, ServedModel
from serving.options import EngineOptions
from serving.pairing import PAIRINGS, StageProfile, stage_profile
from serving.parallel.ffn_part import FFNPart
from serving.shm.mailbox import MailboxShape
from serving.spec import element_bytes
from serving.workers.config import FFNWorkerConfig, MailboxRef, ModelWorkerConfig, RelayConfig
from serving.workers.messages import PoolUse as PoolReport
from serving.workers.process import descriptors, ref

RELAY = Device("relay", "host", 0, 0)  # no device: the process that stands for the host under host-driven control
CONTROLS = ("lowered", "host", "resident")  # the last on cuda devices only


@dataclass(frozen=True)
class CrossPoolOptions(EngineOptions):
    """Beside what every engine has: `lanes`, the number of in-flight batches (the paper has 2), and `control`, which is
    `lowered` (the two sides poll each other's mailbox) or `host` (a third process hands over every stage), or on cuda
    devices `resident` (lowered, with an FFN kernel that never returns). The first
    `kv_devices` devices are the KV pool, data-parallel ranks that each hold all attention weights and take a request where
    most KV is free; all others are the weights pool, with what `kv_share` of a KV device's memory leaves (cards only, which
    both pools may share; None: what all FFNs leave of a lone card), over which `ffn_sharding` spreads FFNs: `whole` models, each
    `layer` on one device, or every layer's width over all (`tensor`). With `stages` 4 transfers are stages of their own beside
    attention and FFN; with 2 a device is held up by rows that leave it (within a host the core that computes copies them in
    either case, and four stages only tell the two apart).

    The KV pool is all memory that weights and workspace leave. Where the demand is known, the planner says for `quantile` of
    the time how many pages requests hold, with `planned_token_s` for each token of output and a tenth of a second besides;
    that stands in the record, beside what was observed. `admission` promises a request the pages of all it may ask for
    (`cap`), or of the output length that a share `quantile` of its model's requests does not exceed (`quantile`): then more
    run at once, and one that grows beyond its promise may pause until another ends. Neither ever preempts.

    `pairing` says which model steps beside one that is in flight: the one least recently served (`fair`), or one whose stages
    fill the other's gaps (`profile`), as far as none waits for long.

    `chunks_in_flight` chunks of one prompt at most are in flight at once, each a layer or more behind the one before it, whose
    KV it reads: a lone prompt so keeps both pools busy. With 1, one chunk has left the pipeline before the next enters (always
    so on cuda devices, whose steps are whole graphs, and with admission=quantile).

    `lanes_of_model` batches of one model at most are in flight at once; with 0, a model that is asked alone has all lanes. More of
    its requests run then, but each batch reads the experts again, and they get in each other's way where pools share a card."""

    lanes: int = 2
    lanes_of_model: int = 0
    control: str = "lowered"
    kv_devices: int = 1
    kv_share: float | None = 1.0
    ffn_sharding: str = "whole"
    quantile: float = 0.99
    planned_token_s: float = 0.04
    stages: int = 4
    admission: str = "cap"
    pairing: str = "fair"
    chunks_in_flight: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.lanes, int) or self.lanes < 1:
            raise UserError(f"option lanes is {self.lanes!r}; at least one batch must be in flight")
        _ = self.limits  # refuses what its limits refuse
        if not isinstance(self.chunks_in_flight, int) or self.chunks_in_flight < 1:
            raise UserError(
                f"option chunks_in_flight is {self.chunks_in_flight!r}; it must be a whole number of at least 1"
            )
        if not isinstance(self.kv_devices, int) or self.kv_devices < 1:
            raise UserError(f"option kv_devices is {self.kv_devices!r}; the KV pool needs at least one device")
        if self.control not in CONTROLS:
            raise UserError(f"option control is {self.control!r}; known: {', '.join(CONTROLS)}")
        if self.kv_share is not None and not 0 < self.kv_share <= 1:
            raise UserError(
                f"option kv_share is {self.kv_share!r}; it is above 0, 1 where a device is KV's alone, null for what the FFNs "
                "leave of a lone card"
            )
        require_known(self.ffn_sharding)
        if self.admission not in ADMISSIONS:
            raise UserError(f"option admission is {self.admission!r}; known: {', '.join(ADMISSIONS)}")
        if self.pairing not in PAIRINGS:
            raise UserError(f"option pairing is {self.pairing!r}; known: {', '.join(PAIRINGS)}")
        if self.stages not in (2, 4):
            raise UserError(f"option stages is {self.stages!r}; known: 2, 4")
        if not 0 < self.quantile < 1 or not self.planned_token_s > 0:
            raise UserError(
                f"option quantile is {self.quantile!r} and planned_token_s {self.planned_token_s!r}; the one lies between 0 "
                "and 1 (0.99 is usual), the other above 0"
            )

    @property
    def limits(self) -> StepLimits:
        return StepLimits(self.max_batch, self.prefill_chunk, self.lanes_of_model)

    @property
    def service(self) -> ServiceModel:
        """How long the planner takes a request to live."""
        return ServiceModel(base_s=0.1, prompt_token_s=0.0, output_token_s=self.planned_token_s)


class CrossPool(HostedSystem):
    """Two pools on two or more devices."""

    name = "crosspool"

    def __init__(self, options: CrossPoolOptions | None = None) -> None:
        self.options = options or CrossPoolOptions()
        super().__init__(self.options.timeline_dir)
        self._expected: Expectation | None = None
        self._use = RecentUse()
        self._latest_use: dict[str, int] = {}  # pages in use by pool
        self._held_bytes = self._filled_bytes = 0

    def plan(self, cluster: Cluster, models: Sequence[ServedModel], demand: Demand) -> Placement:
        """KV and attention halves on the first `kv_devices` devices, FFNs on the others as `ffn_sharding` says."""
        if self.options.control == "resident" and cluster.devices[0].kind != "cuda":
            raise UserError("option control=resident is of cuda devices; on others lowered control polls mailboxes")
        kv_devices, weights_devices = self._pools_of(cluster, models)
        pool = share_out(models, weights_devices, self.options.ffn_sharding)
        plans = [self._plan_kv_pool(device, models) for device in kv_devices]
        for device, held in zip(weights_devices, pool, strict=True):
            plans.append(self._plan_weights_pool(device, models, held))
        pages = sum(plan.kv_bytes for plan in plans) // self.options.page_bytes
        options = self.options
        expected = expect(models, demand, options.page_bytes, pages, options.quantile, options.service)
        held = {"ffn": to_plain(pool), "expected": expected, "profiles": self._profiles(models, demand)}
        return Placement(self.name, tuple(models), tuple(plans), {**asdict(options), **held})

    def _pools_of(
        self, cluster: Cluster, models: Sequence[ServedModel]
    ) -> tuple[tuple[Device, ...], tuple[Device, ...]]:
        """The devices of the KV pool and those of the weights pool; a card that both share is two devices."""
        ranks, share = self.options.kv_devices, self.options.kv_share
        kv_devices, weights_devices = cluster.devices[:ranks], cluster.devices[ranks:]
        if share != 1:
            if any(device.kind != "cuda" for device in kv_devices):
                raise UserError(f"option kv_share is {share}: pools share devices of kind cuda only")
            whole = kv_devices
            kv_devices = tuple(replace(d, memory_bytes=self._kv_pool_bytes(cluster, d, models)) for d in whole)
            rest = [
                replace(d, name=f"{d.name}-weights", memory_bytes=d.memory_bytes - kv.memory_bytes)
                for d, kv in zip(whole, kv_devices, strict=True)
            ]
            weights_devices = (*weights_devices, *rest)
        if not weights_devices or len(kv_devices) < ranks:
            raise UserError(
                f"crosspool needs {ranks + 1} devices at least, {ranks} for KV and one for the weights pool; "
                f"there are {len(cluster.devices)}"
            )
        return kv_devices, weights_devices

    def _kv_pool_bytes(self, cluster: Cluster, device: Device, models: Sequence[ServedModel]) -> int:
        """What the KV pool has of a device that it shares."""
        if self.options.kv_share is not None:
            return int(device.memory_bytes * self.options.kv_share)
        if len(cluster.devices) > 1:
            raise UserError(
                f"option kv_share is null, what the FFNs leave of a lone card; there are {len(cluster.devices)} devices: give a share"
            )
        needed = ffn_pool_bytes(models, self.options.limits, self.options.lanes)
        require_weights(device, needed, "FFN weights and workspace of the weights pool")
        return device.memory_bytes - needed

    def notes(self) -> dict[str, object]:
        """What the planner expected of the KV demand and what was observed; how pages were mapped, and what of them was lost
        to rounding and mapped ahead of need."""
        found: dict[str, object] = {}
        if self._expected is not None:
            found |= {"planner": self._expected.described(), "observed": compare(self._expected, self._use)}
        counted = [worker.read_counters() for worker, _ in self._workers]
        mapping = {
            name: sum(c.get(name, 0) for c in counted) for name in ("pages_mapped", "mapped_ahead", "mapping_ns")
        }
        if self._held_bytes:
            found["kv_mapping"] = mapping | {"unfilled_share": 1 - self._filled_bytes / self._held_bytes}
        return found

    def _take_sample(self, device: Device, message: PoolReport) -> None:
        super()._take_sample(device, message)
        latest = {pool.name: self._latest_use.get(pool.name, 0) for pool in self._pools}
        latest |= {name: sum(pages.values()) for name, pages in message.pages}
        self._latest_use = latest
        if message.used_bytes >= 0:  # of all samples, which come at even times
            self._held_bytes += sum(sum(pages.values()) for _, pages in message.pages) * self.options.page_bytes
            self._filled_bytes += message.used_bytes
        waiting = sum(pool.queue.waiting_pages for pool in self._pools)
        self._use.add(message.time_ns / 1e9, sum(latest.values()), waiting)

    def _profiles(self, models: Sequence[ServedModel], demand: Demand) -> tuple[StageProfile, ...]:
        if self.options.pairing == "fair":
            return ()
        profiles = []
        for model in models:
            lengths = demand.lengths.get(model.name, ())
            context = sum(prompt + output / 2 for prompt, output in lengths) / max(len(lengths), 1)
            profiles.append(stage_profile(model.spec, model.dtype, self.options.max_batch, context))
        return tuple(profiles)

    def _plan_kv_pool(self, device: Device, models: Sequence[ServedModel]) -> DevicePlan:
        limits, page_bytes = self.options.limits, self.options.page_bytes
        weights = {model.name: attention_bytes(model) for model in models}
        each_lane = max(attention_workspace_bytes(model, limits, device.kind) for model in models)
        workspace_bytes = self.options.lanes * each_lane
        used_bytes = sum(weights.values()) + workspace_bytes
        require_weights(device, used_bytes, "attention weights and workspace of the KV pool")
        kv_bytes = (device.memory_bytes - used_bytes) // page_bytes * page_bytes
        require_kv(device, "kv-pool", kv_bytes, page_bytes, models)
        return DevicePlan(device, "kv-pool", weights, kv_bytes)

    def _plan_weights_pool(self, device: Device, models: Sequence[ServedModel], held: Held) -> DevicePlan:
        here = [(model, held[model.name]) for model in models if model.name in held]
        weights = {model.name: ffn_bytes(model, part) for model, part in here}
        limits = self.options.limits
        # A core serves lanes in turn and needs room for one; a card has a stream for each.
        lanes = self.options.lanes if device.kind == "cuda" else 1
        each_lane = max((ffn_workspace_bytes(part.model(model), limits) for model, part in here), default=0)
        workspace_bytes = lanes * each_lane
        require_weights(
            device, sum(weights.values()) + workspace_bytes, "FFN weights and workspace of the weights pool"
        )
        return DevicePlan(device, "weights-pool", weights, 0)

    def _launch(self, placement: Placement) -> None:
        self._expected, self._use, self._latest_use = placement.options["expected"], RecentUse(), {}
        if self.options.admission == "quantile":
            self._promised_output_tokens = self._expected.promised if self._expected else {}
        if placement.devices[0].device.kind == "cuda" and self._backend.name == "real":
            self._launch_on_cards(placement)
            return
        ranks = self.options.kv_devices
        kv_plans, weights_plans = placement.devices[:ranks], placement.devices[ranks:]
        limits, models = self.options.limits, placement.models
        pool = from_plain(placement.options["ffn"])
        by_name = {model.name: model for model in models}
        mailboxes: list[list[MailboxRef]] = [[] for _ in kv_plans]  # by KV rank, one a weights device
        for plan, held in zip(weights_plans, pool, strict=True):
            boxes = [self._new_mailbox(models) for _ in kv_plans]
            hosted = tuple(by_name[name] for name in held)
            role = FFNWorkerConfig(plan.device, hosted, limits, tuple(boxes), tuple(held.values()), self.options.stages)
            self._start_worker(plan.device, role, descriptors(boxes))
            for rank, box in zip(mailboxes, boxes, strict=True):
                rank.append(box)
        if self.options.control == "host":
            every = [box for rank in mailboxes for box in rank]
            self._start_worker(RELAY, RelayConfig(tuple(box.bells for box in every)), descriptors(every))
        legs = [legs_of(model, pool) for model in models]
        for number, (plan, boxes) in enumerate(zip(kv_plans, mailboxes, strict=True)):
            name = "kv-pool" if ranks == 1 else f"kv-pool-{number}"
            role = self._kv_role(plan, name, models, legs, boxes)
            role = replace(role, profiles=placement.options["profiles"])
            self._register_pools(self._start_worker(plan.device, role, descriptors(boxes)), role, self.options)

    def _new_mailbox(self, models: Sequence[ServedModel]) -> MailboxRef:
        row_bytes = max(model.spec.hidden_size * element_bytes(model.dtype) for model in models)
        shape = MailboxShape(self.options.lanes, self.options.limits.max_rows * row_bytes)
        bells = self._new_bells() if self.options.control == "host" else None
        return MailboxRef(ref(self._new_mailbox_region(shape.region_bytes)), shape, bells)

    def _kv_role(
        self,
        plan: DevicePlan,
        name: str,
        models: tuple[ServedModel, ...],
        legs: Sequence[Legs],
        mailboxes: Sequence[MailboxRef],
    ) -> ModelWorkerConfig:
        first = [layers[0][0] for layers in legs]
        options = self.options
        pool = pool_config(name, plan.kv_bytes, options.page_bytes, range(len(models)), options.max_running)
        return ModelWorkerConfig(
            plan.device,
            models,
            (pool,),
            options.limits,
            options.lanes,
            ffn_ports=tuple(port for port, _ in first),
            ffn_indices=tuple(index for _, index in first),
            mailboxes=tuple(mailboxes),
            stages=options.stages,
            growth="reserved" if options.admission == "cap" else "pause",
            ffn_legs={} if options.ffn_sharding == "whole" else dict(enumerate(legs)),
            chunks_in_flight=options.chunks_in_flight if options.admission == "cap" else 1,
        )

    def _launch_on_cards(self, placement: Placement) -> None:
        """One process drives all cards: what meets without the host are kernels, and two processes on one card would take
        turns on it."""
        kv_plan, *weights_plans = placement.devices
        models = placement.models
        if self.options.admission != "cap":
            raise UserError("cuda devices run with admission=cap")
        if self.options.kv_devices != 1:
            raise UserError("cuda devices run with one KV device (kv_devices=1)")
        if self.options.ffn_sharding == "tensor":
            if self.options.control == "resident":
                raise UserError("control=resident has FFNs whole or dealt out by layer (ffn_sharding=whole, layer)")
            cards = [plan.device.index for plan in weights_plans]
            if len(set(cards)) < len(cards):
                raise UserError(f"slices of an FFN lie on a card each; weights devices are on cards {cards}")
        pool = from_plain(placement.options["ffn"])
        parts: dict[str, list[tuple[Device, FFNPart]]] = {model.name: [] for model in models}
        for plan, held in zip(weights_plans, pool, strict=True):
            for name, part in held.items():
                parts[name].append((plan.device, part))
        kv_pool = pool_config(
            "kv-pool", kv_plan.kv_bytes, self.options.page_bytes, range(len(models)), self.options.max_running
        )
        local = (-1,) * len(models)
        role = CardWorkerConfig(
            kv_plan.device,
            models,
            (kv_pool,),
            self.options.limits,
            self.options.lanes,
            local,
            local,
            ffn_parts=tuple(tuple(parts[model.name]) for model in models),
            control=self.options.control,
        )
        self._register_pools(self._start_worker(kv_plan.device, role), role, self.options)
