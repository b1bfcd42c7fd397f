"""What a multiplexed device holds: weights and workspaces of every engine on it, and one KV pool for all that is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from serving.batching import StepLimits
from serving.capacity import require_kv, require_weights
from serving.interface import Cluster, DevicePlan, ServedModel
from serving.parallel.capacity import exchange_shape, share_model, share_weights_bytes, share_workspace_bytes
from serving.parallel.group import GroupPlan

Seated = Sequence[tuple[ServedModel, GroupPlan]]
WeightsBytes = Callable[[ServedModel, GroupPlan, int], int]  # of a model's share, by its group and rank


def emptiest(cluster: Cluster, models: Sequence[ServedModel]) -> Seated:
    """Whole models: largest first to the device with most free memory."""
    free_bytes = {device.name: device.memory_bytes for device in cluster.devices}
    placed = {}
    for model in sorted(models, key=whole_bytes, reverse=True):
        target = max(free_bytes, key=free_bytes.__getitem__)
        placed[model.name] = GroupPlan((target,))
        free_bytes[target] -= whole_bytes(model)
    return [(model, placed[model.name]) for model in models]


def whole_bytes(model: ServedModel) -> int:
    """Weights of a model that is not cut."""
    return share_weights_bytes(model, GroupPlan(("any",)), 0)


def plan_devices(
    cluster: Cluster,
    seated: Seated,
    limits: StepLimits,
    page_bytes: int,
    together: bool = True,
    weights_bytes: WeightsBytes = share_weights_bytes,
) -> tuple[DevicePlan, ...]:
    """Raises CapacityError where weights, which take `weights_bytes` of a share, do not fit, or leave too little KV. Workspaces
    of engines that run `together` add up; of models that take turns the largest counts."""
    plans = []
    for device in cluster.devices:
        seats = [(m, g, g.devices.index(device.name)) for m, g in seated if device.name in g.devices]
        held = {model.name: weights_bytes(model, group, rank) for model, group, rank in seats}
        workspaces = [
            share_workspace_bytes(m, g, r, limits, device.kind) + exchange_shape(m, g, limits).region_bytes // g.ranks
            for m, g, r in seats
        ]
        used_bytes = sum(held.values()) + (sum(workspaces) if together else max(workspaces, default=0))
        require_weights(device, used_bytes, f"weights and workspaces of {', '.join(held)}")
        kv_bytes = (device.memory_bytes - used_bytes) // page_bytes * page_bytes if held else 0
        require_kv(device, "shared by its models", kv_bytes, page_bytes, [share_model(m, g, r) for m, g, r in seats])
        plans.append(DevicePlan(device, "shared", held, kv_bytes))
    return tuple(plans)
