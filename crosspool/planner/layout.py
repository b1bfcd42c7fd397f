"""Layout of KV and weights over the two pools, in plain bytes: what lies where, what does not fit and by how much.

Pure arithmetic over numbers that a caller has: the engine passes bytes of checkpoints as loaded, the planner's command
bytes derived from configs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from crosspool.planner.parallelism import ParallelPlan, best_plan
from serving.errors import CapacityError, UserError
from serving.memory.budget import format_bytes

FFN_SPLITS = ("whole", "layers", "even")


@dataclass(frozen=True)
class PoolDevice:
    """A device's name and memory budget."""

    name: str
    memory_bytes: int


@dataclass(frozen=True)
class ModelBytes:
    """What one model asks of the pools. `attention_bytes`: attention side (projections, norms, embedding, LM head);
    `ffn_layer_bytes` [layers]: FFN weights, routers included; `request_kv_bytes`: the largest request that must fit."""

    name: str
    attention_bytes: int
    ffn_layer_bytes: tuple[int, ...]
    num_kv_heads: int = 1
    request_kv_bytes: int = 0

    @property
    def ffn_bytes(self) -> int:
        return sum(self.ffn_layer_bytes)


@dataclass(frozen=True)
class LayoutOptions:
    """`kv_devices`: how many of the devices, the first ones, form the KV pool.

    `ffn_split` over the weights pool: `whole` a model on one device, `layers` each layer on one device, `even` each
    layer over all (expert or tensor parallel). Workspaces are kept free on each device of a pool."""

    kv_devices: int = 1
    ffn_split: str = "layers"
    kv_workspace_bytes: int = 0
    weights_workspace_bytes: int = 0

    def __post_init__(self) -> None:
        if self.ffn_split not in FFN_SPLITS:
            raise UserError(f"unknown ffn_split {self.ffn_split!r}; known: {', '.join(FFN_SPLITS)}")
        if self.kv_devices < 1 or min(self.kv_workspace_bytes, self.weights_workspace_bytes) < 0:
            raise UserError("kv_devices is at least 1, a workspace at least 0 bytes")


@dataclass
class DeviceLoad:
    """What one device holds. `weights_bytes` by model; `kv_bytes` is all that the device can give to KV (KV pool
    only)."""

    device: PoolDevice
    role: str  # kv-pool | weights-pool
    workspace_bytes: int
    weights_bytes: dict[str, int] = field(default_factory=dict)
    kv_bytes: int = 0

    @property
    def free_bytes(self) -> int:
        """Negative where the device is overcommitted."""
        return self.device.memory_bytes - self.workspace_bytes - sum(self.weights_bytes.values()) - self.kv_bytes

    def add(self, model: str, count_bytes: int) -> None:
        self.weights_bytes[model] = self.weights_bytes.get(model, 0) + count_bytes


@dataclass(frozen=True)
class Shortfall:
    """Something that does not fit: on which device or pool, what, and the missing bytes."""

    where: str
    what: str
    missing_bytes: int

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.missing_bytes} bytes ({format_bytes(self.missing_bytes)}) are missing"


@dataclass(frozen=True)
class PoolPlan:
    """The two pools. `parallel` by model; `shortfalls` is empty when all fits; `ffn_of` by model: device index in the
    weights pool of each layer, or -1 where the layer is split over all."""

    kv: tuple[DeviceLoad, ...]
    weights: tuple[DeviceLoad, ...]
    parallel: dict[str, ParallelPlan]
    ffn_of: dict[str, tuple[int, ...]]
    kv_budget_bytes: int  # asked for
    shortfalls: tuple[Shortfall, ...]

    @property
    def kv_bytes(self) -> int:
        """KV memory that the pool has."""
        return sum(load.kv_bytes for load in self.kv)

    def request_bytes(self, model: str) -> int:
        """KV memory that one request of `model` can use."""
        return int(self.parallel[model].request_share * self.kv_bytes)

    def require_fit(self) -> None:
        """Raises CapacityError that names the first shortfall, and how many more there are."""
        if self.shortfalls:
            more = f" (and {len(self.shortfalls) - 1} more)" if len(self.shortfalls) > 1 else ""
            raise CapacityError(f"{self.shortfalls[0]}{more}")


def plan_pools(
    devices: Sequence[PoolDevice],
    models: Sequence[ModelBytes],
    kv_budget_bytes: int,
    page_bytes: int,
    options: LayoutOptions,
) -> PoolPlan:
    """The layout, which fits. Raises CapacityError, naming device or pool and the missing bytes, when none does."""
    plan = lay_out(devices, models, kv_budget_bytes, page_bytes, options)
    plan.require_fit()
    return plan


def lay_out(
    devices: Sequence[PoolDevice],
    models: Sequence[ModelBytes],
    kv_budget_bytes: int,
    page_bytes: int,
    options: LayoutOptions,
) -> PoolPlan:
    """The layout, fitting or not. All memory of KV-pool devices that weights leave goes to KV, in whole pages."""
    if len(devices) < 2 or not options.kv_devices < len(devices):
        raise UserError(f"{len(devices)} devices cannot form two pools with {options.kv_devices} devices for KV")
    if not models or page_bytes < 1 or kv_budget_bytes < 0:
        raise UserError("a layout needs models, a page size and a KV budget of at least 0 bytes")
    parallel = {model.name: best_plan(model.num_kv_heads, options.kv_devices) for model in models}
    kv = [DeviceLoad(device, "kv-pool", options.kv_workspace_bytes) for device in devices[: options.kv_devices]]
    weights = [
        DeviceLoad(device, "weights-pool", options.weights_workspace_bytes) for device in devices[options.kv_devices :]
    ]
    for model in models:
        for load in kv:
            load.add(model.name, -(-model.attention_bytes // parallel[model.name].tensor))
    shortfalls = _overcommitted(kv, "attention weights and workspace do not fit")
    for load in kv:
        load.kv_bytes = max(load.free_bytes, 0) // page_bytes * page_bytes
    ffn_of = {
        model.name: _place_ffn(model, weights, options.ffn_split)
        for model in sorted(models, key=lambda m: m.ffn_bytes, reverse=True)
    }
    shortfalls += _overcommitted(weights, "FFN weights and workspace do not fit")
    plan = PoolPlan(tuple(kv), tuple(weights), parallel, ffn_of, kv_budget_bytes, ())
    return PoolPlan(
        plan.kv, plan.weights, parallel, ffn_of, kv_budget_bytes, (*shortfalls, *_kv_shortfalls(plan, models))
    )


def _place_ffn(model: ModelBytes, weights: list[DeviceLoad], split: str) -> tuple[int, ...]:
    """Charge `model`'s FFN to the weights pool, each part to the device with most room. Returns each layer's device."""
    if split == "even":
        for load in weights:
            load.add(model.name, sum(-(-size // len(weights)) for size in model.ffn_layer_bytes))
        return (-1,) * len(model.ffn_layer_bytes)
    if split == "whole":
        index = max(range(len(weights)), key=lambda i: weights[i].free_bytes)
        weights[index].add(model.name, model.ffn_bytes)
        return (index,) * len(model.ffn_layer_bytes)
    placed = []
    free_bytes = [load.free_bytes for load in weights]
    for size in model.ffn_layer_bytes:
        index = max(range(len(weights)), key=free_bytes.__getitem__)
        weights[index].add(model.name, size)
        free_bytes[index] -= size
        placed.append(index)
    return tuple(placed)


def _overcommitted(loads: Sequence[DeviceLoad], what: str) -> list[Shortfall]:
    return [Shortfall(load.device.name, what, -load.free_bytes) for load in loads if load.free_bytes < 0]


def _kv_shortfalls(plan: PoolPlan, models: Sequence[ModelBytes]) -> list[Shortfall]:
    found = []
    if plan.kv_bytes < plan.kv_budget_bytes:
        has, budget = format_bytes(plan.kv_bytes), format_bytes(plan.kv_budget_bytes)
        what = f"KV pool has {has} for KV, the demand's budget is {budget}"
        found.append(Shortfall("kv-pool", what, plan.kv_budget_bytes - plan.kv_bytes))
    for model in models:
        missing_bytes = model.request_kv_bytes - plan.request_bytes(model.name)
        if missing_bytes > 0:
            share, needs = plan.parallel[model.name].request_share, format_bytes(model.request_kv_bytes)
            what = f"one request of {model.name} needs {needs} and sees {share} of the KV"
            found.append(Shortfall("kv-pool", what, missing_bytes))
    return found
