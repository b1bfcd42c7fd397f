"""From groups to bytes: what each device holds when models are seated, and what KV each of them gets. Pure.

KV of a model = its partition - weights - workspace; all that a device has left goes to KV.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from serving.capacity import require_kv, require_weights
from serving.errors import CapacityError
from serving.interface import Cluster, DevicePlan, ServedModel
from serving.options import EngineOptions
from serving.parallel.capacity import exchange_shape, share_model, share_weights_bytes, share_workspace_bytes
from serving.parallel.given import Seated
from serving.parallel.group import GroupPlan
from serving.parallel.host import Instance


def equal_groups(cluster: Cluster, models: Sequence[ServedModel]) -> Seated:
    """Whole models: largest first to the device with most free memory."""
    free_bytes = {device.name: device.memory_bytes for device in cluster.devices}
    weights = {model.name: share_weights_bytes(model, GroupPlan(("any",)), 0) for model in models}
    groups = {}
    for model in sorted(models, key=lambda m: weights[m.name], reverse=True):
        target = max(free_bytes, key=free_bytes.__getitem__)
        groups[model.name] = GroupPlan((target,))
        free_bytes[target] -= weights[model.name]
    return [(model, groups[model.name]) for model in models]


def lay_out(
    cluster: Cluster, seated: Seated, options: EngineOptions, kv_weight: Mapping[str, float] | None = None
) -> tuple[tuple[DevicePlan, ...], list[Instance]]:
    """Bytes of every device. KV of a device is divided among its models by `kv_weight` (equally without it), in whole pages,
    and all ranks of a group get what the least of them has. Raises :class:`CapacityError`, saying what is missing."""
    limits, page_bytes = options.limits, options.page_bytes
    weight = kv_weight or {model.name: 1.0 for model, _ in seated}
    weights: dict[str, dict[str, int]] = {}
    shares: list[list[int]] = [[] for _ in seated]
    for device in cluster.devices:
        seats = [(n, m, g, g.devices.index(device.name)) for n, (m, g) in enumerate(seated) if device.name in g.devices]
        held = weights[device.name] = {m.name: share_weights_bytes(m, g, rank) for _, m, g, rank in seats}
        workspace = max((share_workspace_bytes(m, g, rank, limits, device.kind) for _, m, g, rank in seats), default=0)
        exchanges = sum(exchange_shape(m, g, limits).region_bytes // g.ranks for _, m, g, _ in seats)
        used_bytes = sum(held.values()) + workspace + exchanges
        require_weights(device, used_bytes, f"weights and workspace of {', '.join(held)}")
        total_weight = sum(weight[m.name] for _, m, _, _ in seats)
        for number, model, _, _ in seats:
            part = (device.memory_bytes - used_bytes) * (weight[model.name] / total_weight)
            shares[number].append(int(part) // page_bytes * page_bytes)
    instances = [Instance(model, group, min(shares[n])) for n, (model, group) in enumerate(seated)]
    plans = []
    for device in cluster.devices:
        quota = {i.model.name: i.kv_bytes for i in instances if device.name in i.group.devices}
        for instance in instances:
            if device.name in instance.group.devices:
                share = share_model(instance.model, instance.group, instance.group.devices.index(device.name))
                require_kv(device, instance.model.name, instance.kv_bytes, page_bytes, [share])
        plans.append(DevicePlan(device, "static", weights[device.name], sum(quota.values()), quota))
    _require_all(seated, cluster)
    return tuple(plans), instances


def _require_all(seated: Seated, cluster: Cluster) -> None:
    names = {device.name for device in cluster.devices}
    for model, group in seated:
        missing = [device for device in group.devices if device not in names]
        if missing:
            raise CapacityError(f"{model.name} is placed on {', '.join(missing)}, which the cluster does not have")
