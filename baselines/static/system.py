"""Static partition: one engine a model, each with its own weights and its own fixed share of KV on one device or several.

The paper's "Static partition (SGLang)". Models on one device take turns, a step at a time where they are whole and an
exchange at a time where they are cut, which gives a partition the whole core when its neighbours are idle: kinder to this
baseline than slices of fixed compute. A model of several devices runs in lockstep over them (serving/parallel); MLA models
and models of few KV heads have data-parallel attention, because copying their KV would be a straw man.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from baselines.static.layout import equal_groups, lay_out
from baselines.static.options import StaticOptions
from baselines.static.predict import Predictor
from baselines.static.search import PlacementSearch
from serving.cost.cards import stages_on
from serving.host import pool_config
from serving.interface import Cluster, Demand, DevicePlan, Placement, ServedModel
from serving.parallel.given import given_groups
from serving.parallel.group import GroupPlan
from serving.parallel.host import GroupedSystem, Instance, sharing_devices
from serving.workers.config import ModelWorkerConfig

_DEFAULT_CARD = {"cpu": "cpu2", "cuda": "a100-40gb"}


class StaticPartition(GroupedSystem):
    """Models on devices of their own or shared, KV partitioned by model."""

    name = "static"

    def __init__(self, options: StaticOptions | None = None) -> None:
        self.options = options or StaticOptions()
        super().__init__(self.options.timeline_dir)

    def plan(self, cluster: Cluster, models: Sequence[ServedModel], demand: Demand) -> Placement:
        """Where each model lies and what KV it gets, by the option `placement`."""
        plans, instances = self._lay_out(cluster, models, demand)
        groups = [
            {"model": i.model.name, "devices": list(i.group.devices), "tp": i.group.tp, "dp": i.group.dp}
            for i in instances
        ]
        return Placement(self.name, tuple(models), plans, {**asdict(self.options), "instances": groups})

    def _lay_out(
        self, cluster: Cluster, models: Sequence[ServedModel], demand: Demand
    ) -> tuple[tuple[DevicePlan, ...], list[Instance]]:
        if self.options.placement == "given":
            return lay_out(cluster, given_groups(self.options.groups, cluster, models), self.options)
        if self.options.placement == "searched":
            first = cluster.devices[0]
            card = self.options.card or first.card or _DEFAULT_CARD[first.kind]
            stages = {model.name: stages_on(card, model) for model in models}
            predictor = Predictor(stages, demand, self.options)
            found = PlacementSearch(cluster, models, self.options, predictor).run()
            return lay_out(cluster, found.seated, self.options, found.kv_weight)
        return lay_out(cluster, equal_groups(cluster, models), self.options)

    def _launch(self, placement: Placement) -> None:
        instances = _instances(placement)
        cut = {device for i in instances if i.group.ranks > 1 for device in i.group.devices}
        grouped = [i for i in instances if cut & set(i.group.devices)]
        devices = {plan.device.name: plan.device for plan in placement.devices}
        if self._backend.name == "real" and any(device.kind == "cuda" for device in devices.values()):
            for joined in sharing_devices(grouped):
                self._start_card_groups(joined, devices, self.options)
        else:
            self._start_groups(grouped, list(devices.values()), self.options)
        for plan in placement.devices:
            if plan.weights_bytes and plan.device.name not in cut:
                self._start_whole(plan, [i for i in instances if plan.device.name in i.group.devices])

    def _start_whole(self, plan: DevicePlan, instances: Sequence[Instance]) -> None:
        """A device that no group reaches: whole models, each with a pool of its own."""
        models = tuple(instance.model for instance in instances)
        pools = tuple(
            pool_config(i.pool_name(0), i.kv_bytes, self.options.page_bytes, [index], self.options.max_running)
            for index, i in enumerate(instances)
        )
        local = (-1,) * len(models)
        role = ModelWorkerConfig(plan.device, models, pools, self.options.limits, 1, local, local)
        self._register_pools(self._start_worker(plan.device, role), role, self.options)


def _instances(placement: Placement) -> list[Instance]:
    """The instances that `plan` wrote down, with the KV that the placement's devices give them."""
    models = {model.name: model for model in placement.models}
    quota = {plan.device.name: plan.kv_quota_bytes for plan in placement.devices}
    instances, seen = [], dict.fromkeys(models, 0)
    for entry in placement.options["instances"]:
        name, group = entry["model"], GroupPlan(tuple(entry["devices"]), entry["tp"], entry["dp"])
        kv_bytes = min(quota[device][name] for device in group.devices)
        instances.append(Instance(models[name], group, kv_bytes, seen[name]))
        seen[name] += 1
    return instances
