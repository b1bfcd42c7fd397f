"""Multiplexing with KV quotas (MuxServe, ICML '24): one engine a device holds all models of it and one pool of KV pages, of which
each model may hold its quota and no more.

Quotas start in proportion to rate x layers x KV width and are adapted every few seconds in favour of models that are crowded
and have requests waiting (serving/quota.py). Models with prompts to compute step first, in turns; decode steps fill the rest.
A model that finds no page within its quota preempts its youngest request, which is computed again later.

Deviations: MuxServe divides a pool into blocks of one head's KV, here pages are shared by models of any KV width
(serving/memory/kv_pool.py), which serves the same end. Its prefill and decode jobs run side by side on shares of a GPU's
multiprocessors; here they take turns, on a CPU device because that is one core, on a card because a step is a graph that was
captured once: a share of the multiprocessors is a process's (MPS) or a context's, so each job and share would want graphs, or a
process, of its own; and who may step is decided while nothing is in flight, so that whoever is preempted can be. Its placement
search is not part of this: whole models lie largest first on the emptiest device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from baselines.multiplex.layout import emptiest, plan_devices
from baselines.multiplex.options import QuotaOptions
from serving.errors import UserError
from serving.host import HostedSystem, pool_config
from serving.interface import Cluster, Demand, DevicePlan, Placement, ServedModel
from serving.memory.kv_pool import KVGeometry
from serving.quota import QuotaRule, proportional
from serving.workers.config import ModelWorkerConfig

__all__ = ["Quota", "QuotaOptions"]


class Quota(HostedSystem):
    """All models of a device in one engine, KV by quota."""

    name = "quota"

    def __init__(self, options: QuotaOptions | None = None) -> None:
        self.options = options or QuotaOptions()
        super().__init__(self.options.timeline_dir)

    def plan(self, cluster: Cluster, models: Sequence[ServedModel], demand: Demand) -> Placement:
        """Whole models, largest first on the emptiest device; what weights and one workspace leave is its KV pool."""
        unknown = set(self.options.quotas) - {model.name for model in models}
        if unknown:
            raise UserError(
                f"option quotas names {', '.join(sorted(unknown))}; served: {', '.join(m.name for m in models)}"
            )
        seated = emptiest(cluster, models)
        plans = plan_devices(cluster, seated, self.options.limits, self.options.page_bytes, together=False)
        by_name = {model.name: model for model in models}
        shares = {
            plan.device.name: self._shares([by_name[name] for name in plan.weights_bytes], demand)
            for plan in plans
            if plan.weights_bytes
        }
        return Placement(self.name, tuple(models), plans, {**asdict(self.options), "shares": shares})

    def _shares(self, models: Sequence[ServedModel], demand: Demand) -> dict[str, float]:
        """The share of their device's pool that each of `models` starts with."""
        given = {model.name: self.options.quotas[model.name] for model in models if model.name in self.options.quotas}
        if given:
            if len(given) < len(models):
                missing = ", ".join(model.name for model in models if model.name not in given)
                raise UserError(f"option quotas has none for {missing}, which shares a device with {', '.join(given)}")
            return given
        rates = demand.rate_rps or {model.name: 1.0 for model in models}
        weights = []
        for model in models:
            geometry = KVGeometry.of(model.spec, model.dtype)
            weights.append(rates.get(model.name, 0.0) * geometry.num_layers * geometry.token_bytes)
        return dict(zip([model.name for model in models], proportional(weights), strict=True))

    def _launch(self, placement: Placement) -> None:
        models = {model.name: model for model in placement.models}
        for plan in placement.devices:
            if plan.weights_bytes:
                self._start_engine(plan, [models[name] for name in plan.weights_bytes], placement)

    def _start_engine(self, plan: DevicePlan, models: Sequence[ServedModel], placement: Placement) -> None:
        options = self.options
        shares = placement.options["shares"][plan.device.name]
        pool = pool_config("kv-pool", plan.kv_bytes, options.page_bytes, range(len(models)), options.max_running)
        in_place = (-1,) * len(models)
        role = ModelWorkerConfig(
            plan.device,
            tuple(models),
            (pool,),
            options.limits,
            1,
            in_place,
            in_place,
            growth="preempt",
            quotas=QuotaRule(tuple(shares[model.name] for model in models), options.adapt_every_s, options.crowded),
            prefill_first=True,
        )
        rule = "cap" if options.admission == "cap" else "open"
        self._register_pools(self._start_worker(plan.device, role), role, options, rule)
