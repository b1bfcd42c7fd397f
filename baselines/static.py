"""Static partition: one engine a model, each with its own weights and its own fixed share of KV on one device.

First form of the paper's "Static partition (SGLang)": models are placed whole, largest first on the emptiest device, and
what a device has left after weights is split equally among its models. Engines of one device take turns a step at a time,
which gives a partition the whole core when its neighbours are idle: kinder to this baseline than slices of fixed compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from serving.capacity import (
    attention_bytes,
    attention_workspace_bytes,
    ffn_bytes,
    ffn_workspace_bytes,
    require_kv,
    require_weights,
)
from serving.host import HostedSystem, pool_config
from serving.interface import Cluster, Demand, Device, DevicePlan, Placement, ServedModel
from serving.options import EngineOptions
from serving.workers.config import ModelWorkerConfig


@dataclass(frozen=True)
class StaticOptions(EngineOptions):
    """What every engine has, and nothing else."""


class StaticPartition(HostedSystem):
    """Whole models on devices, KV partitioned by model."""

    name = "static"

    def __init__(self, options: StaticOptions | None = None) -> None:
        self.options = options or StaticOptions()
        super().__init__(self.options.timeline_dir)

    def plan(self, cluster: Cluster, models: Sequence[ServedModel], demand: Demand) -> Placement:
        """Largest model first to the device with most free memory; equal KV shares on each device."""
        free_bytes = {device.name: device.memory_bytes for device in cluster.devices}
        hosted: dict[str, list[ServedModel]] = {device.name: [] for device in cluster.devices}
        for model in sorted(models, key=lambda m: attention_bytes(m) + ffn_bytes(m), reverse=True):
            target = max(free_bytes, key=free_bytes.__getitem__)
            hosted[target].append(model)
            free_bytes[target] -= attention_bytes(model) + ffn_bytes(model)
        plans = tuple(self._plan_device(device, hosted[device.name]) for device in cluster.devices)
        return Placement(self.name, tuple(models), plans, asdict(self.options))

    def _plan_device(self, device: Device, models: Sequence[ServedModel]) -> DevicePlan:
        if not models:
            return DevicePlan(device, "static", {}, 0)
        limits, page_bytes = self.options.limits, self.options.page_bytes
        weights = {model.name: attention_bytes(model) + ffn_bytes(model) for model in models}
        workspace_bytes = max(
            attention_workspace_bytes(model, limits) + ffn_workspace_bytes(model, limits) for model in models
        )
        used_bytes = sum(weights.values()) + workspace_bytes
        require_weights(device, used_bytes, f"weights and workspace of {', '.join(weights)}")
        share_bytes = (device.memory_bytes - used_bytes) // len(models) // page_bytes * page_bytes
        for model in models:
            require_kv(device, model.name, share_bytes, page_bytes, [model])
        return DevicePlan(device, "static", weights, share_bytes * len(models), dict.fromkeys(weights, share_bytes))

    def _launch(self, placement: Placement) -> None:
        by_name = {model.name: model for model in placement.models}
        for plan in placement.devices:
            models = tuple(by_name[name] for name in plan.weights_bytes)
            if not models:
                continue
            pools = tuple(
                pool_config(
                    model.name, plan.kv_quota_bytes[model.name], self.options.page_bytes, [i], self.options.max_running
                )
                for i, model in enumerate(models)
            )
            local = (-1,) * len(models)
            role = ModelWorkerConfig(plan.device, models, pools, self.options.limits, 1, local, local)
            self._register_pools(self._start_worker(plan.device, role), role, self.options)
