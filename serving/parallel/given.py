"""Groups as a person states them: on which devices each model lies, and how it is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from serving.errors import UserError
from serving.interface import Cluster, ServedModel
from serving.parallel.capacity import share_model
from serving.parallel.group import GroupPlan, natural_group

Seated = Sequence[tuple[ServedModel, GroupPlan]]


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
