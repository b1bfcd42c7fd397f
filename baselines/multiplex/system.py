"""Elastic multiplexing (kvcached, the paper's baseline): each model is an engine of its own, all weights are resident, and KV
pages are mapped on demand from what is left of each device, for whoever comes first.

No arbiter: engines launch when they have work and slow each other (`contention`), none has a quota, and one that finds no page
preempts its youngest request and computes it again later. Simulated so far: on the real backend engines of a device would be
processes that share its memory and core.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from serving.backend import Backend
from serving.capacity import require_kv, require_weights
from serving.cost.contention import Contention
from serving.errors import UserError
from serving.interface import Cluster, Demand, DevicePlan, Placement, ServedModel
from serving.options import EngineOptions
from serving.parallel.capacity import exchange_shape, share_model, share_weights_bytes, share_workspace_bytes
from serving.parallel.given import given_groups
from serving.parallel.group import GroupPlan
from serving.parallel.host import GroupedSystem, Instance


@dataclass(frozen=True)
class ElasticOptions(EngineOptions):
    """Beside what every engine has: `groups`, which says on which devices each model lies (as for static; devices may be
    shared), and how engines that share one contend: `contention` (`share` | `time_slice`), `interference`, `slice_s`,
    `switch_s` (serving/cost/contention.py says what each means and rests on)."""

    groups: Mapping[str, Any] = field(default_factory=dict)
    contention: str = "share"
    interference: float = 0.1
    slice_s: float = 2e-3
    switch_s: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.model()  # raises for a contention that makes no sense

    def model(self) -> Contention:
        return Contention(self.contention, self.interference, self.slice_s, self.switch_s)


class Elastic(GroupedSystem):
    """Engines side by side on every device, KV shared first come first served."""

    name = "elastic"

    def __init__(self, options: ElasticOptions | None = None) -> None:
        self.options = options or ElasticOptions()
        super().__init__(self.options.timeline_dir)

    def plan(self, cluster: Cluster, models: Sequence[ServedModel], demand: Demand) -> Placement:
        """Models on the devices that `groups` names (without it, each whole on the emptiest device); all that weights and
        workspaces leave of a device is KV of everyone on it."""
        limits, page_bytes = self.options.limits, self.options.page_bytes
        groups = self.options.groups
        seated = given_groups(groups, cluster, models) if groups else _emptiest(cluster, models)
        plans = []
        for device in cluster.devices:
            seats = [(m, g, g.devices.index(device.name)) for m, g in seated if device.name in g.devices]
            held = {model.name: share_weights_bytes(model, group, rank) for model, group, rank in seats}
            workspace = sum(
                share_workspace_bytes(m, g, r, limits) + exchange_shape(m, g, limits).region_bytes // g.ranks
                for m, g, r in seats
            )
            used_bytes = sum(held.values()) + workspace
            require_weights(device, used_bytes, f"weights and workspaces of {', '.join(held)}")
            kv_bytes = (device.memory_bytes - used_bytes) // page_bytes * page_bytes if held else 0
            require_kv(
                device, "shared by its engines", kv_bytes, page_bytes, [share_model(m, g, r) for m, g, r in seats]
            )
            plans.append(DevicePlan(device, "shared", held, kv_bytes))
        instances = [{"model": m.name, "devices": list(g.devices), "tp": g.tp, "dp": g.dp} for m, g in seated]
        return Placement(self.name, tuple(models), tuple(plans), {**asdict(self.options), "instances": instances})

    def start(self, placement: Placement, backend: Backend | None = None) -> None:
        if backend is None or backend.name != "sim":
            raise UserError("elastic runs simulated only in this version: backend=sim")
        super().start(placement, backend)

    def _launch(self, placement: Placement) -> None:
        models = {model.name: model for model in placement.models}
        kv_bytes = {plan.device.name: plan.kv_bytes for plan in placement.devices}
        instances, seen = [], dict.fromkeys(models, 0)
        for entry in placement.options["instances"]:
            group = GroupPlan(tuple(entry["devices"]), entry["tp"], entry["dp"])
            least = min(kv_bytes[device] for device in group.devices)
            instances.append(Instance(models[entry["model"]], group, least, seen[entry["model"]]))
            seen[entry["model"]] += 1
        self._start_groups(instances, [plan.device for plan in placement.devices], self.options, self.options.model())


def _emptiest(cluster: Cluster, models: Sequence[ServedModel]) -> list[tuple[ServedModel, GroupPlan]]:
    """Whole models: largest first to the device with most free memory."""
    free_bytes = {device.name: device.memory_bytes for device in cluster.devices}
    alone = GroupPlan(("any",))
    weights = {model.name: share_weights_bytes(model, alone, 0) for model in models}
    placed = {}
    for model in sorted(models, key=lambda m: weights[m.name], reverse=True):
        target = max(free_bytes, key=free_bytes.__getitem__)
        placed[model.name] = GroupPlan((target,))
        free_bytes[target] -= weights[model.name]
    return [(model, placed[model.name]) for model in models]
