"""From groups to bytes: what each device holds when models are seated, and what KV each of them gets. Pure.

KV of a model = its partition - weights - workspace; all that a device has left goes to KV.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from serving.capacity import require_kv, require_weights
from serving.errors import CapacityError, UserError
from serving.interface import Cluster, DevicePlan, ServedModel
from serving.options import EngineOptions
from serving.parallel.capacity import exchange_shape, share_model, share_weights_bytes, share_workspace_bytes
from serving.parallel.group import GroupPlan, natural_group
from serving.parallel.host import Instance

Seated = Sequence[tuple[ServedModel, GroupPlan]]


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


def given_groups(given: Mapping[str, Any], cluster: Cluster, models: Sequence[ServedModel]) -> Seated:
    """Groups as the option `groups` states them. Raises :class:`UserError` for what it misses, names wrongly or cuts oddly."""
    by_name = {model.name: model for model in models}
    if set(given) != set(by_name):
        wrong = sorted(set(given) ^ set(by_name))
        raise UserError(f"option groups must place the served models {', '.join(by_name)}; look at {', '.join(wrong)}")
    seated = []
    for name, stated in given.items():
        for entry in stated if isinstance(stated, list | tuple) else [stated]:
            seated.append((by_name[name], _group(entry, cluster, by_name[name])))
        taken = [device for model, group in seated if model.name == name for device in group.devices]
        if len(set(taken)) < len(taken):
            raise UserError(f"option groups: two replicas of {name} share a device")
    return seated


def _group(entry: Any, cluster: Cluster, model: ServedModel) -> GroupPlan:
    if not isinstance(entry, Mapping) or not set(entry) <= {"devices", "tp", "dp"} or not entry.get("devices"):
        raise UserError(f"option groups: {model.name} wants devices, and may have tp and dp; got {entry!r}")
    names = [device.name for device in cluster.devices]
    chosen = []
    for device in entry["devices"]:
        position = device if isinstance(device, int) and 0 <= device < len(names) else None
        if position is None and device not in names:
            raise UserError(f"option groups: {model.name} is on {device!r}; devices: 0 to {len(names) - 1}, {names}")
        chosen.append(device if position is None else names[position])
    if "tp" not in entry and "dp" not in entry:
        return natural_group(model.spec, tuple(chosen))
    group = GroupPlan(tuple(chosen), int(entry.get("tp", 1)), int(entry.get("dp", 1)))
    share_model(model, group, 0)  # raises where it cannot be cut so
    return group


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
        workspace = max((share_workspace_bytes(m, g, rank, limits) for _, m, g, rank in seats), default=0)
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
